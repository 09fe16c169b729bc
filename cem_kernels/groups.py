"""Samples grouped by class, on the labels' device and without a host synchronization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels import validation


class Padding(NamedTuple):
    """Classes padded to ``L`` samples each: ``K * L`` rows."""

    size: int  # L
    row: Tensor  # [B] int64, the row of each sample, in batch order
    mask: Tensor  # [K, L] bool, which rows hold a sample


@dataclass(eq=False)
class ClassGroups:
    """Which samples belong to which class. Build it with :meth:`from_labels`.

    Letters: ``B`` samples in the batch, ``K`` classes. All tensors are int64 on the labels' device, and their
    shapes depend on ``B`` and ``K`` only, so that a step can be captured in a CUDA graph.

    Attributes:
        order: ``[B]``, sample indices stably sorted by class. The samples of class ``c`` are
            ``order[offsets[c]:offsets[c + 1]]``.
        offsets: ``[K + 1]``.
        counts: ``[K]``, samples of each class; 0 is ordinary.
        max_class_size: the caller's static bound on ``counts``, or None.
    """

    order: Tensor
    offsets: Tensor
    counts: Tensor
    sorted_labels: Tensor = field(repr=False)
    max_class_size: int | None = None
    _padding: Padding | None = field(default=None, repr=False)

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int, *, max_class_size: int | None = None) -> ClassGroups:
        """Group the samples of a batch.

        Args:
            labels: ``[B]`` integer class of each sample, in ``[0, num_classes)``.
            num_classes: ``K``, static.
            max_class_size: a static bound on the samples of any class. The eager backend pads classes to it and
                then needs no host synchronization; without it, eager reads the largest count once.

        Raises:
            TypeError: labels are not an integer tensor.
            ValueError: labels are not of rank 1, ``num_classes`` or ``max_class_size`` is not positive, a label is
                out of range, or a class is larger than ``max_class_size``. The last two cost a synchronization:
                they are checked on the CPU, and on CUDA only under :func:`cem_kernels.set_debug`. Without the check
                either of them trips a device assertion in eager: no class takes another's rows. Kernels know no bound
                on the class size; a sample whose label is out of range is in no class, and its row of a result is
                never written.
        """
        validation.check_labels(labels, num_classes)
        if max_class_size is not None and max_class_size < 1:
            raise ValueError(f"max_class_size must be positive, got {max_class_size}")
        labels = labels.long()
        sorted_labels, order = torch.sort(labels, stable=True)
        bounds = torch.arange(num_classes + 1, device=labels.device)
        offsets = torch.searchsorted(sorted_labels, bounds)
        groups = cls(order, offsets, offsets.diff(), sorted_labels, max_class_size)
        if max_class_size is not None and validation.values_are_checked(labels):
            largest = int(groups.counts.max())
            if largest > max_class_size:
                raise ValueError(f"max_class_size is {max_class_size}, but a class has {largest} samples")
        return groups

    @property
    def num_samples(self) -> int:
        """``B``."""
        return self.order.shape[0]

    @property
    def num_classes(self) -> int:
        """``K``."""
        return self.counts.shape[0]

    @property
    def labels(self) -> Tensor:
        """``[B]``, the class of each sample, in batch order."""
        return torch.empty_like(self.sorted_labels).scatter_(0, self.order, self.sorted_labels)

    @property
    def padding(self) -> Padding:
        """Where :meth:`pad` puts the samples; made on first use. Without a bound it costs one host sync."""
        if self._padding is None:
            size = self.max_class_size or max(int(self.counts.max()), 1)
            positions = torch.arange(max(self.num_samples, size), device=self.order.device)
            rank = positions[: self.num_samples] - self.offsets[self.sorted_labels]
            # A sample beyond the bound would land among the next class's rows; out of range it fails loudly.
            row = torch.where(rank < size, self.sorted_labels * size + rank, self.num_classes * size)
            row = torch.empty_like(row).scatter_(0, self.order, row)
            self._padding = Padding(size, row, positions[:size] < self.counts[:, None])
        return self._padding

    def means(self, rows: Tensor) -> Tensor:
        """Means ``[K, C]`` of every class's ``rows [B, C]``; 0 for classes without any.

        An embedding bag adds up every class by itself and in a fixed order, needs to know no largest class, as padding
        does, and lets what is not finite stay in its class, as a product with a mask does not.
        """
        means: Tensor = _ClassMeans.apply(rows, self)
        return means

    def pad(self, rows: Tensor) -> Tensor:
        """``[B, ...]`` in batch order to ``[K, L, ...]`` by class, zeros where a class has no more samples."""
        size, row, _ = self.padding
        padded = rows.new_zeros((self.num_classes * size, *rows.shape[1:]))
        # Written through a permutation, so that the backward is a gather and not a scatter-add.
        padded.index_copy_(0, row, rows)
        return padded.unflatten(0, (self.num_classes, size))

    def unpad(self, padded: Tensor) -> Tensor:
        """``[K, L, ...]`` by class back to ``[B, ...]`` in batch order."""
        return padded.flatten(0, 1).index_select(0, self.padding.row)


class _ClassMeans(torch.autograd.Function):
    """With a backward that is a gather: the one of an embedding bag sorts again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: ClassGroups) -> Tensor:
        ctx.groups = groups
        if not len(rows):  # an embedding bag wants at least one row
            return rows.new_zeros(groups.num_classes, rows.shape[1])
        return F.embedding_bag(groups.order, rows, groups.offsets[:-1], mode="mean")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        groups: ClassGroups = ctx.groups
        share = grad / groups.counts.clamp(min=1)[:, None].to(grad.dtype)
        return share.index_select(0, groups.labels), None
