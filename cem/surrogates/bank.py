"""Recent features of every class, for batches that bring a class too few samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cem_kernels import ClassGroups
from cem_kernels.validation import check_labels, check_shape, check_sizes


class MemoryBank(nn.Module):
    """A ring buffer of recent, detached features per class.

    Letters: ``B`` samples in the batch, ``K`` classes. Shapes depend on ``B`` and the sizes below only, nothing waits
    for the device, the buffers are written in place (a CUDA graph can capture both methods), and the same calls give
    the same bits.

    Args:
        num_classes: ``K``.
        size: rows of each class's ring.
        width: numbers in a row.

    Attributes:
        features: ``[K, size, width]``, fp32, zeros where nothing was written yet; always finite.
        written: ``[K]``, int64, rows each class was ever given. The next one goes to ``written % size``, and
            ``min(written, size)`` rows are filled.

    Both are buffers of the state dict, so that a run resumes exactly.

    Raises:
        ValueError: a size below 1.

    Source: the queue of He et al. 2020, "Momentum Contrast" (arXiv:1911.05722), here one per class.
    """

    features: Tensor
    written: Tensor

    def __init__(self, num_classes: int, size: int, width: int) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, size=size, width=width)
        self.num_classes, self.size, self.width = num_classes, size, width
        self.register_buffer("features", torch.zeros(num_classes, size, width))
        self.register_buffer("written", torch.zeros(num_classes, dtype=torch.int64))

    def extend(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch, followed by what the bank remembers.

        Args:
            rows: ``[B, width]``, any floating dtype.
            labels: ``[B]``, integer, in ``0..K-1`` (checked on the CPU only: elsewhere it would cost a sync).

        Returns:
            Rows ``[B + K·size, width]`` in the dtype of ``rows`` and labels ``[B + K·size]``, int64. The batch's rows
            keep their graph, the remembered ones have none; these come class by class, in the order of their places
            in the ring. A place of class ``c`` not yet filled has label ``K + c``: one class for all of them would be
            by far the largest, and where classes are padded its size is that of all.

        Raises:
            ValueError: wrong shape, or label out of range.
            TypeError: labels not integer.
        """
        self._check(rows, labels)
        place = torch.arange(self.size, device=labels.device)
        class_of_ring = torch.arange(self.num_classes, device=labels.device)[:, None]
        remembered = torch.where(place < self.written[:, None], class_of_ring, self.num_classes + class_of_ring)
        return (
            torch.cat((rows, self.features.flatten(0, 1).to(rows.dtype))),
            torch.cat((labels.long(), remembered.flatten())),
        )

    @torch.no_grad()
    def remember(self, rows: Tensor, labels: Tensor) -> None:
        """Write the batch's rows to the rings, in batch order; the newest overwrite the oldest.

        Of a class with more than ``size`` rows the last ``size`` stay, and all count in ``written``. A row that holds
        NaN or infinity (also one that only fp32 cannot hold) is passed over and does not count: it would poison every
        batch until it is overwritten.

        Args:
            rows: ``[B, width]``, any floating dtype.
            labels: ``[B]``, as in :meth:`extend`.

        Raises:
            ValueError: wrong shape, or label out of range.
            TypeError: labels not integer.
        """
        self._check(rows, labels)
        if not len(labels):
            return
        rows = rows.to(self.features.dtype)
        # Rows that are passed over are in a class of their own, behind the others.
        labels = torch.where(rows.isfinite().all(1), labels.long(), self.num_classes)
        groups = ClassGroups.from_labels(labels, self.num_classes + 1)
        start, count = groups.offsets[: self.num_classes, None], groups.counts[: self.num_classes]
        # Each place looks up its row, instead of each row its place: a scatter would meet places written twice.
        place = torch.arange(self.size, device=labels.device)
        newest = (self.written + count - 1)[:, None]
        rank = count[:, None] - 1 - (newest - place) % self.size  # of the class's rows, the last one for this place
        is_new = rank >= 0
        source = groups.order[torch.where(is_new, start + rank, 0)]
        self.features.copy_(torch.where(is_new[..., None], rows[source], self.features))
        self.written.add_(count)

    def _check(self, rows: Tensor, labels: Tensor) -> None:
        check_labels(labels, self.num_classes)
        check_shape("rows", rows, {"B": len(labels), "width": self.width})
