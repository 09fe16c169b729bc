"""What the backends of centroid variance share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

VARIANCES_FASTER = 10
"""How many times shorter running variances look back than running centroids.

Centroids are to stand still, so that shrinking shows. Variances are only to be less noisy than a batch's: what they
were long ago would hide what was achieved since.
"""


class RunningMoments(NamedTuple):
    """What :func:`cem_kernels.centroid_variance` remembers of the batches before: zeros to begin with, each tensor with
    memory of its own.

    Letters: ``K`` classes, ``C`` columns.
    """

    centroids: Tensor  # [K, C] fp32, no gradient
    variances: Tensor  # [K, C] fp32, around the centroids
    batches: Tensor  # [K] int64, how many moved each class


def least_shares(momentum: float) -> tuple[float, float]:
    """The least that a batch moves centroids and variances by."""
    return 1 - momentum, min(VARIANCES_FASTER * (1 - momentum), 1.0)
