"""Class centroids that move slowly, so that making variances smaller cannot mean making features smaller."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        """Move by a batch. Nothing waits for the device, if ``groups`` has a bound on its classes.

        Args:
            rows: ``[B, width]``, fp32 or fp64.
            groups: their classes, ``K``.

        Returns:
            Variances ``[K, width]`` with the running values and the gradient of the batch's own ``v``; and the mean
            ``[K]`` of the batch's squared deviations from its own means, without a gradient. Both are 0, the first
            attached to the graph, for classes without samples. A class that is not finite moves nothing of its own,
            and its variance is not finite.
        """
        counted = groups.padding.mask[..., None]
        padded = torch.where(counted, groups.pad(rows), 0)  # [K, L, width]
        count = groups.counts.clamp(min=1)[:, None].to(rows.dtype)
        with torch.no_grad():
            mean = padded.sum(dim=1) / count
            own = torch.where(counted, padded - mean[:, None], 0).square().sum(dim=1) / count
            here = torch.where(self.batches[:, None] > 0, self.centroids.to(rows.dtype), mean)
        around = torch.where(counted, padded - here[:, None], 0).square().sum(dim=1) / count
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
