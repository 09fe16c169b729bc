"""Networks, and the cut between client and server."""

from cem.models.bottleneck import Bottleneck, parse_bottleneck
from cem.models.split import ARCHITECTURES, Normalize, SplitModel, build_split_model, split_sequential

__all__ = [
    "ARCHITECTURES",
    "Bottleneck",
    "Normalize",
    "SplitModel",
    "build_split_model",
    "parse_bottleneck",
    "split_sequential",
]
