"""What surrogates around class variances share: rows, tokens, and the classes of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cem.surrogates.base import Surrogate
from cem.terms import Batch, Measured
from cem_kernels import IGNORED, ClassGroups, ClassVariance
from cem_kernels.validation import check_sizes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

HALF = (torch.bfloat16, torch.float16)


class VarianceSurrogate(Surrogate):
    """The skeleton of a surrogate that penalizes variances inside classes.

    ``measure`` of a subclass is three lines: :meth:`grouped`, an operator of :mod:`cem_kernels`, :meth:`measured`.

    Letters: ``B`` samples, ``T`` tokens a sample, ``D`` their width, ``K`` classes.

    Args:
        num_classes: ``K``; labels lie in ``[0, K)``. None reads the classes off the labels, which costs a host
            synchronization a call.
        max_class_size: static bound on the samples of one class in a batch; spares eager its host synchronization.
        backend: see :mod:`cem_kernels.backends`.
        process_group: see :class:`~cem.Term`.

    Raises:
        ValueError: a size below 1, or an unknown backend.
    """

    def __init__(
        self,
        num_classes: int | None,
        max_class_size: int | None,
        backend: str,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(process_group=process_group)
        given = {"num_classes": num_classes, "max_class_size": max_class_size}
        check_sizes(**{name: size for name, size in given.items() if size is not None})
        self.num_classes, self.max_class_size, self.backend = num_classes, max_class_size, backend

    def grouped(self, batch: Batch) -> tuple[Tensor, ClassGroups]:
        """Clean features, fp32 or wider, and the classes of the batch.

        Not in half precision: the spread inside a class that is left when training succeeds is lost in its rounding.
        """
        features = batch.features.to(torch.promote_types(batch.features.dtype, torch.float32))
        labels, num_classes = batch.labels, self.num_classes
        if num_classes is None:
            inside = labels.long() != IGNORED
            classes, found = torch.unique(labels.long()[inside], return_inverse=True)
            labels = torch.full_like(inside, IGNORED, dtype=torch.int64).masked_scatter_(inside, found)
            num_classes = max(len(classes), 1)
        return features, ClassGroups.from_labels(labels, num_classes, max_class_size=self.max_class_size)

    @staticmethod
    def measured(result: ClassVariance) -> Measured:
        """An operator's result as a term's."""
        return Measured(result.rob_loss, {"intra_mse": result.intra_mse})


def flat(features: Tensor, width: int) -> Tensor:
    """``[B, D]`` or ``[B, C, H, W]`` to ``[B, 1, width]``: one token a sample.

    Raises:
        ValueError: a sample has another number of features.
    """
    rows = features.flatten(1)
    if rows.shape[1] != width:
        raise ValueError(f"a sample must have feature_dim={width} features, got {list(features.shape)}")
    return rows[:, None]


def spatial(features: Tensor, width: int) -> Tensor:
    """``[B, C, H, W]`` to ``[B, H·W, C]``: every position of the map is a token, as wide as the map has channels.

    Raises:
        ValueError: features are no map of ``width`` channels.
    """
    if features.dim() != 4 or features.shape[1] != width:
        raise ValueError(
            f"spatial tokens need a map [B, C, H, W] with C = feature_dim = {width}, got {list(features.shape)}"
        )
    return features.flatten(2).mT
