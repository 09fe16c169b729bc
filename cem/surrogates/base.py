"""What the trainer asks of a conditional-entropy surrogate."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def attached_zero(features: Tensor) -> Tensor:
    """A zero that belongs to the graph of ``features``: the sum of an empty slice.

    Its gradient is exactly zero even where ``features`` holds NaN or infinity, which ``0 * sum`` is not.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    return features.flatten()[:0].sum(dtype=dtype)


class Surrogate(nn.Module):
    """A differentiable stand-in for the conditional entropy of features given their class.

    Subclasses implement ``forward(features, labels, unique_labels=None) -> (rob_loss, intra_mse)``:

    * ``features`` ``[B, D]`` or ``[B, C, H, W]``, clean (before noise), on the encoder's graph;
    * ``labels`` ``[B]``, int64;
    * ``rob_loss``: 0-dim, fp32 or wider, the penalty that is minimized, attached to the graph of ``features``;
    * ``intra_mse``: 0-dim, fp32 or wider, mean squared distance to the center; a monitor.

    Attributes:
        needs_refit: whether the trainer must call :meth:`refit` after every epoch.
    """

    needs_refit: bool = False

    def refit(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """Refit on the whole training set's clean features ``[N, ...]`` and labels ``[N]``; default: nothing.

        Returns:
            What the fit says about the features, by name, for the log.
        """
        return {}

    def begin_epoch(self, progress: float) -> None:
        """Told at the start of every epoch with a penalty: ``progress`` goes from 0 (the first) to 1 (the last)."""

    def own_loss(self, features: Tensor, labels: Tensor) -> Tensor | None:
        """What the surrogate's own parameters are trained on, 0-dim, if not ``rob_loss``; default: None, ``rob_loss``.

        Args:
            features, labels: as in ``forward``; features get no gradient from it.
        """
        return None


class NoSurrogate(Surrogate):
    """The third choice: no penalty. Both results are zeros attached to the graph."""

    def forward(self, features: Tensor, labels: Tensor, unique_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`Surrogate`."""
        zero = attached_zero(features)
        return zero, zero
