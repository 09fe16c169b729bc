"""What the backends of slot variances share: what running slots remember, and how far a batch moves them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cem_kernels.variance.running import MOMENTUM

CENTROIDS_MOVE, MOST = 1 - MOMENTUM, 0.5
"""How far a batch moves a slot with its part of the class's samples, and the most that it moves variances, which it
moves by ``VARIANCES_MOVE``; see :mod:`cem_kernels.variance.running`."""

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
