"""Class centroids that move slowly, so that making variances smaller cannot mean making features smaller."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cem_kernels import ClassGroups
from cem_kernels.validation import check_sizes

VARIANCES_FASTER = 10
"""How many times shorter running variances look back than running centroids."""


class Anchors(nn.Module):
    """Running centroids of classes, and running variances around them.

    The variance inside a batch's classes falls as well where an encoder shrinks all of its features: classes come as
    close to each other as samples of a class do, and nothing is gained against the noise but what accuracy pays for.
    Around centroids that stay where they were this is no way out, for then features leave them.

    ``μ ← m μ + (1 − m) mean`` and ``u ← m' u + (1 − m') v``, for every class in the batch, where ``v`` is the mean of
    ``(x − μ)²`` over the batch's samples of a class, and ``μ`` that of before. A single sample counts as well: it has
    a distance to its centroid, which many classes and small batches depend on. Until a class was in ``1 / (1 − m)``
    batches, its centroid is the mean over all of them, and likewise ``u``; in its first one ``μ`` is the batch's own.

    Centroids are to stand still, so that shrinking shows; variances only to be less noisy than a batch's, for what they
    were long ago would hide what was achieved since: ``1 − m' = 10 (1 − m)``, at most 1.

    Args:
        num_classes: ``K``.
        width: numbers of one sample's features.
        momentum: ``m``, in (0, 1); ``1 / (1 − m)`` batches is how far centroids look back.

    Attributes:
        centroids, variances: ``[K, width]`` fp32, buffers.
        batches: ``[K]`` int64, how many moved each class; a buffer.

    Raises:
        ValueError: a size below 1, or momentum out of range.

    Source: the centres of Wen et al. 2016, "A Discriminative Feature Learning Approach for Deep Face Recognition".
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

    def forward(self, rows: Tensor, groups: ClassGroups) -> tuple[Tensor, Tensor]:
        """Move by a batch. Nothing waits for the device.

        Args:
            rows: ``[B, width]``, fp32 or fp64.
            groups: their classes, ``K``.

        Returns:
            Variances ``[K, width]`` with the running values and the gradient of the batch's own ``v``; and the mean
            ``[K]`` of the batch's squared deviations from its own means, without a gradient. Both are 0, the first
            attached to the graph, for classes without samples. A class that is not finite moves nothing of its own,
            and its variance is not finite.
        """
        labels = groups.labels
        with torch.no_grad():
            mean = class_means(rows, groups)
            own = class_means((rows - mean[labels]).square(), groups)
            here = torch.where(self.batches[:, None] > 0, self.centroids.to(rows.dtype), mean)
        around = class_means((rows - here[labels]).square(), groups)
        with torch.no_grad():
            usable = (groups.counts > 0) & (mean.isfinite() & around.isfinite()).all(dim=1)
            first, still = 1 / (self.batches + 1), 1 - self.momentum
            self._move(self.centroids, mean, first.clamp(min=still), usable)
            self._move(self.variances, around, first.clamp(min=min(VARIANCES_FASTER * still, 1.0)), usable)
            self.batches += usable
            value = torch.where(usable[:, None], self.variances.to(rows.dtype), around)
        return value + (around - around.detach()), own.mean(dim=1)

    @staticmethod
    def _move(running: Tensor, new: Tensor, share: Tensor, usable: Tensor) -> None:
        """Towards ``new`` by ``share [K]``, for the classes that are ``usable [K]``."""
        running.copy_(
            torch.where(usable[:, None], running.lerp(new.to(running.dtype), share.to(running.dtype)[:, None]), running)
        )


def class_means(rows: Tensor, groups: ClassGroups) -> Tensor:
    """Means ``[K, width]`` of every class's ``rows [B, width]``; 0 for classes without any.

    An embedding bag adds up every class by itself and in a fixed order, needs to know no largest class, as padding
    does, and lets what is not finite stay in its class, as a product with a mask does not.
    """
    means: Tensor = _ClassMeans.apply(rows, groups)
    return means


class _ClassMeans(torch.autograd.Function):
    """With a backward that is a gather: the one of an embedding bag sorts again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: ClassGroups) -> Tensor:
        ctx.groups = groups
        if not len(rows):  # an embedding bag wants at least one row
            return rows.new_zeros(groups.num_classes, rows.shape[1])
        return F.embedding_bag(groups.order, rows, groups.offsets[:-1], mode="mean")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        groups: ClassGroups = ctx.groups
        share = grad / groups.counts.clamp(min=1)[:, None].to(grad.dtype)
        return share.index_select(0, groups.labels), None
