"""What the backends of variances share: their result, and what running centroids remember."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

VARIANCES_FASTER = 10
"""How many times shorter running variances look back than running centroids.

Centroids are to stand still, so that shrinking shows. Variances are only to be less noisy than a batch's: what they
were long ago would hide what was achieved since.
"""


class ClassVariance(NamedTuple):
    """Result of a variance operator, in fp32 (fp64 for fp64 features), attached to the graph of the features."""

    rob_loss: Tensor  # [] mean of class_penalty over classes, weighted by their samples
    intra_mse: Tensor  # [] mean of class_mse, likewise
    class_penalty: Tensor  # [K], exactly 0 where a class has too few samples
    class_mse: Tensor  # [K], likewise


class RunningMoments(NamedTuple):
    """What :func:`cem_kernels.variance.centroid_variance` remembers of the batches before: zeros to begin with, each
    tensor with memory of its own.

    Letters: ``K`` classes, ``C`` columns.
    """

    centroids: Tensor  # [K, C] fp32, no gradient
    variances: Tensor  # [K, C] fp32, around the centroids
    batches: Tensor  # [K] int64, how many moved each class


def least_shares(momentum: float) -> tuple[float, float]:
    """The least that a batch moves centroids and variances by."""
    return 1 - momentum, min(VARIANCES_FASTER * (1 - momentum), 1.0)
