"""Class centroids that move slowly, so that making variances smaller cannot mean making features smaller."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cem_kernels import ClassGroups
from cem_kernels.validation import check_sizes


class Anchors(nn.Module):
    """Running centroids of classes, and running variances around them.

    The variance inside a batch's classes falls as well where an encoder shrinks all of its features: classes come as
    close to each other as samples of a class do, and nothing is gained against the noise but what accuracy pays for.
    Around centroids that stay where they were this is no way out, for then features leave them.

    ``μ ← m μ + (1 − m) mean`` and ``u ← m u + (1 − m) v``, for classes of at least ``min_samples`` samples, where ``v``
    is the mean of ``(x − μ)²`` over the batch's samples of a class, and ``μ`` that of before. The first batch of a
    class sets both.

    Args:
        num_classes: ``K``.
        width: numbers of one sample's features.
        momentum: ``m``, in (0, 1); ``1 / (1 − m)`` steps is how far it looks back.

    Attributes:
        centroids, variances: ``[K, width]`` fp32, buffers.
        seen: ``[K]`` bool, a buffer.

    Raises:
        ValueError: a size below 1, or momentum out of range.

    Source: the centres of Wen et al. 2016, "A Discriminative Feature Learning Approach for Deep Face Recognition".
    """

    centroids: Tensor
    variances: Tensor
    seen: Tensor

    def __init__(self, num_classes: int, width: int, momentum: float) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, width=width)
        if not 0 < momentum < 1:
            raise ValueError(f"anchor must lie between 0 and 1, got {momentum}")
        self.momentum = momentum
        self.register_buffer("centroids", torch.zeros(num_classes, width))
        self.register_buffer("variances", torch.zeros(num_classes, width))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, rows: Tensor, groups: ClassGroups, min_samples: int) -> tuple[Tensor, Tensor]:
        """Move by a batch. Nothing waits for the device, if ``groups`` has a bound on its classes.

        Args:
            rows: ``[B, width]``, fp32 or fp64.
            groups: their classes, ``K``.
            min_samples: classes with fewer samples move nothing.

        Returns:
            Variances ``[K, width]`` with the running values and the gradient of the batch's own ``v``; and the mean
            ``[K]`` of the batch's squared deviations from its own means, without a gradient. Both are 0, the first
            attached to the graph, for classes with too few samples. A class that is not finite moves nothing of its
            own, and its variance is not finite.
        """
        qualifies = groups.counts >= min_samples
        counted = (groups.padding.mask & qualifies[:, None])[..., None]
        padded = torch.where(counted, groups.pad(rows), 0)  # [K, L, width]
        count = groups.counts.clamp(min=1)[:, None].to(rows.dtype)
        with torch.no_grad():
            mean = padded.sum(dim=1) / count
            own = torch.where(counted, padded - mean[:, None], 0).square().sum(dim=1) / count
            here = torch.where(self.seen[:, None], self.centroids.to(rows.dtype), mean)
        around = torch.where(counted, padded - here[:, None], 0).square().sum(dim=1) / count
        with torch.no_grad():
            usable = qualifies & (mean.isfinite() & around.isfinite()).all(dim=1)
            self._move(self.centroids, mean, usable)
            self._move(self.variances, around, usable)
            self.seen |= usable
            value = torch.where(usable[:, None], self.variances.to(rows.dtype), around)
        return value + (around - around.detach()), own.mean(dim=1)

    def _move(self, running: Tensor, new: Tensor, usable: Tensor) -> None:
        moved = torch.where(self.seen[:, None], self.momentum * running + (1 - self.momentum) * new, new)
        running.copy_(torch.where(usable[:, None], moved, running))
