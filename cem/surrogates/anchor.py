"""Class centroids that move slowly, so that making variances smaller cannot mean making features smaller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import cem_kernels
from cem_kernels import ClassGroups, ClassVariance, RunningMoments
from cem_kernels.validation import check_sizes


class Anchors(nn.Module):
    """The running moments of :func:`cem_kernels.centroid_variance`, as part of a module's state.

    A call moves them, and what it measures depends on them: one call a step, and no activation checkpointing around it.

    Args:
        num_classes: ``K``.
        width: numbers of one sample's features.
        momentum: in (0, 1); ``1 / (1 − momentum)`` batches is how far centroids look back.

    Attributes:
        centroids, variances: ``[K, width]`` fp32, buffers.
        batches: ``[K]`` int64, how many moved each class; a buffer.

    Raises:
        ValueError: a size below 1, or momentum out of range.
    """

    centroids: Tensor
    variances: Tensor
    batches: Tensor

    def __init__(self, num_classes: int, width: int, momentum: float) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, width=width)
        if not 0 < momentum < 1:
            raise ValueError(f"anchor must lie between 0 and 1, got {momentum}")
        self.momentum = momentum
        self.register_buffer("centroids", torch.zeros(num_classes, width))
        self.register_buffer("variances", torch.zeros(num_classes, width))
        self.register_buffer("batches", torch.zeros(num_classes, dtype=torch.int64))

    def forward(self, rows: Tensor, groups: ClassGroups, **options: Any) -> ClassVariance:
        """Move by the batch ``rows [B, width]`` and measure it; ``options`` are those of the operator."""
        running = RunningMoments(self.centroids, self.variances, self.batches)
        return cem_kernels.centroid_variance(rows, groups, running, momentum=self.momentum, **options)
