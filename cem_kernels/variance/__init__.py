"""What the variance of features inside their classes costs, around the batch's means or around running centroids."""

from cem_kernels.variance.api import centroid_variance, class_variance
from cem_kernels.variance.running import ClassVariance, RunningMoments

__all__ = ["ClassVariance", "RunningMoments", "centroid_variance", "class_variance"]
