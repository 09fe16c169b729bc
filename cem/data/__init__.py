"""Data sets and their splits."""

from cem.data.images import ImageSet, make_loader
from cem.data.load import DATASETS, DataSplits, load_data

__all__ = ["DATASETS", "DataSplits", "ImageSet", "load_data", "make_loader"]
