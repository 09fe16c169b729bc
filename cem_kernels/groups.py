"""Samples grouped by class, on the labels' device and without a host synchronization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels import validation
from cem_kernels.validation import IGNORED

__all__ = ["IGNORED", "ClassGroups", "Padding"]


class Padding(NamedTuple):
    """Classes padded to ``L`` samples each: ``K * L`` rows."""

    size: int  # L
    row: Tensor  # [B] int64, the row of each sample, in batch order; K * L where it is in no class
    mask: Tensor  # [K, L] bool, which rows hold a sample


@dataclass(eq=False)
class ClassGroups:
    """Which samples belong to which class. Build it with :meth:`from_labels`.

    Letters: ``B`` samples in the batch, ``K`` classes. All tensors are int64 on the labels' device, and their
    shapes depend on ``B`` and ``K`` only, so that a step can be captured in a CUDA graph.

    Attributes:
        order: ``[B]``, sample indices stably sorted by class, those of no class last. The samples of class ``c`` are
            ``order[offsets[c]:offsets[c + 1]]``.
        offsets: ``[K + 1]``; the last is the number of samples that count.
        counts: ``[K]``, samples of each class; 0 is ordinary.
        labels: ``[B]``, the class of each sample, in batch order; ``K`` where it is in none.
        ignores: False where it is known that every sample is in a class.
        max_class_size: the caller's static bound on ``counts``, or None.
    """

    order: Tensor
    offsets: Tensor
    counts: Tensor
    labels: Tensor = field(repr=False)
    ignores: bool = False
    max_class_size: int | None = None
    _padding: Padding | None = field(default=None, repr=False)

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int, *, max_class_size: int | None = None) -> ClassGroups:
        """Group the samples of a batch.

        Args:
            labels: ``[B]``, of any integer dtype: the class of each sample, in ``[0, num_classes)``, or −100
                (:data:`IGNORED`) for a sample that does not count.
            num_classes: ``K``, static.
            max_class_size: a static bound on the samples of any class. The eager backend pads classes to it and
                then needs no host synchronization; without it, eager reads the largest count once.

        Raises:
            TypeError: labels are not an integer tensor.
            ValueError: labels are not of rank 1, ``num_classes`` or ``max_class_size`` is not positive, a label is
                out of range, or a class is larger than ``max_class_size``. The last two cost a synchronization:
                they are checked on the CPU, and on CUDA only under :func:`cem_kernels.set_debug`. Without the check a
                label out of range is one that does not count, and a class that is too large trips a device assertion
                in eager: no class takes another's rows. Kernels know no bound on the class size.
        """
        given = labels
        labels, ignores = validation.as_labels(labels, num_classes)
        if max_class_size is not None and max_class_size < 1:
            raise ValueError(f"max_class_size must be positive, got {max_class_size}")
        if ignores:
            labels = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)
        elif labels is given:
            labels = labels.clone()  # a backward looks classes up, and the caller may have other labels there by then
        sorted_labels, order = torch.sort(labels, stable=True)
        offsets = torch.searchsorted(sorted_labels, torch.arange(num_classes + 1, device=labels.device))
        groups = cls(order, offsets, offsets.diff(), labels, ignores, max_class_size)
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
    def padding(self) -> Padding:
        """Where :meth:`pad` puts the samples; made on first use. Without a bound it costs one host sync.

        While :func:`torch.compile` traces, the bound is ``B`` where none was given: nothing is read.
        """
        if self._padding is None:
            size = self.max_class_size or (
                self.num_samples if torch.compiler.is_compiling() else int(self.counts.max())
            )
            size, rows = max(size, 1), self.num_classes * max(size, 1)
            positions = torch.arange(max(self.num_samples, size), device=self.order.device)
            classes = self.labels[self.order]
            rank = positions[: self.num_samples] - self.offsets[classes]
            # A sample beyond the bound would land among the next class's rows; out of range it fails loudly.
            row = torch.where(rank < size, classes * size + rank, rows + 1)
            if self.ignores:
                row = torch.where(classes < self.num_classes, row, rows)
            row = torch.empty_like(row).scatter_(0, self.order, row)
            self._padding = Padding(size, row, positions[:size] < self.counts[:, None])
        return self._padding

    def kept(self, rows: Tensor) -> Tensor:
        """``rows [B, ...]``, with zeros for samples of no class, whatever they hold; their gradient is zero too."""
        if not self.ignores:
            return rows
        inside = (self.labels < self.num_classes).view(-1, *(1,) * (rows.dim() - 1))
        return torch.where(inside, rows, 0)

    def means(self, rows: Tensor) -> Tensor:
        """Means ``[K, C]`` of every class's ``rows [B, C]``; 0 for classes without any.

        An embedding bag adds up every class by itself and in a fixed order, needs to know no largest class, as padding
        does, and lets what is not finite stay in its class, as a product with a mask does not.
        """
        if not len(rows):  # an embedding bag wants at least one row
            return rows.new_zeros(self.num_classes, rows.shape[1])
        # One bag more than classes: that of the samples of no class.
        return F.embedding_bag(self.order, rows, self.offsets, mode="mean")[:-1]

    def of_samples(self, statistic: Tensor) -> Tensor:
        """``statistic [K, ...]`` of each sample's class, ``[B, ...]``; zeros for samples of no class."""
        if self.ignores:
            statistic = torch.cat([statistic, statistic.new_zeros(1, *statistic.shape[1:])])
        return statistic.index_select(0, self.labels)

    def weighted_means(self, min_samples: int, *of_classes: Tensor) -> tuple[Tensor, ...]:
        """Means of each of ``of_classes [K]``, weighted by samples, over classes with at least ``min_samples`` of them;
        0 where there is none."""
        weight = torch.where(self.counts >= min_samples, self.counts, 0).to(of_classes[0].dtype)
        total = weight.sum().clamp(min=1)
        return tuple((weight * each).sum() / total for each in of_classes)

    def pad(self, rows: Tensor) -> Tensor:
        """``[B, ...]`` in batch order to ``[K, L, ...]`` by class, zeros where a class has no more samples."""
        size, row, _ = self.padding
        padded = rows.new_zeros((self.num_classes * size + self.ignores, *rows.shape[1:]))
        # Written through a permutation, so that the backward is a gather and not a scatter-add.
        padded.index_copy_(0, row, rows)
        if self.ignores:  # what is in no class went into the last row
            padded = padded[:-1]
        return padded.unflatten(0, (self.num_classes, size))

    def unpad(self, padded: Tensor) -> Tensor:
        """``[K, L, ...]`` by class back to ``[B, ...]`` in batch order; zeros for samples of no class."""
        rows = padded.flatten(0, 1)
        if self.ignores:
            rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        return rows.index_select(0, self.padding.row)
