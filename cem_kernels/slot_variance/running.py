"""What the backends of slot variances share: what running slots remember, and how far a batch moves them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

CENTROIDS_MOVE, VARIANCES_MOVE, MOST = 0.03, 0.1, 0.5
"""How far a batch moves a slot with its part of the class's samples, and the most that it moves variances.

Centroids are to stand still, so that shrinking shows; variances are only to be less noisy than a batch's.
"""

DEAD = 0.05
"""A slot whose share is below this fraction of ``1 / S`` is dead: it goes where the class is explained worst."""


class RunningSlots(NamedTuple):
    """What :func:`cem_kernels.slot_variance.slot_variance` remembers of the batches before: zeros to begin with, each
    tensor with memory of its own.

    Letters: ``K`` classes, ``S`` slots, ``C`` columns.
    """

    centroids: Tensor  # [K, S, C] fp32, no gradient
    variances: Tensor  # [K, S, C] fp32, around the centroids
    shares: Tensor  # [K, S] fp32, of the class's samples; those of a class that has begun add up to 1
    batches: Tensor  # [K] int64, how many moved each class since it began; of 0, nothing else is looked at
    ignored: Tensor  # [K] int64, outliers in a row before this batch
