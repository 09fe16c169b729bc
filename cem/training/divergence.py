"""When a training has diverged: numbers that are none, weights beyond all bounds, worse than guessing by far."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cem.errors import DivergedError
from cem.training.config import TrainConfig

LARGEST_WEIGHT = 1e6
"""Beyond it a training has diverged, also where no number is infinite yet."""

HOPELESS = 1.0
"""Nats above the cross-entropy of the uniform guess. An untrained network, much noise or a penalty that makes all
classes the same cost up to half of it; weights that grow without end soon cost many."""


class Divergence:
    """What is looked at after every epoch, before anything is saved.

    Args:
        config: the run's options.
        num_classes: ``K``.

    Attributes:
        suspected: whether the last epoch was :data:`HOPELESS`; then it is not to take the place of one that was not.
    """

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self._config, self._guess = config, math.log(num_classes)
        self.suspected, self._before = False, math.nan

    def check_epoch(self, epoch: int, cross_entropy: float, model: nn.Module) -> None:
        """Look at an epoch's numbers, before anything is made of the model.

        Args:
            epoch: counted from 1.
            cross_entropy: of its training steps, a mean.
            model: after it.

        Raises:
            DivergedError: a number is not finite, a weight is beyond :data:`LARGEST_WEIGHT`, or two epochs running,
                not counting those of the warm-up, are :data:`HOPELESS`.
        """
        if not math.isfinite(cross_entropy):
            raise self.error(f"the cross-entropy of epoch {epoch} is {cross_entropy}")
        broken = first_broken(model)
        if broken is not None:
            raise self.error(f"after epoch {epoch} the model's {broken}")
        hopeless = epoch > self._config.warmup_epochs and cross_entropy > self._guess + HOPELESS
        if hopeless and self.suspected:
            raise self.error(
                f"the cross-entropy of epochs {epoch - 1} and {epoch} is {self._before:.3g} and {cross_entropy:.3g}, "
                f"where guessing has {self._guess:.3g}"
            )
        self.suspected, self._before = hopeless, cross_entropy

    def check_features(self, epoch: int, features: Tensor) -> None:
        """Weights that are finite can be so large that features are not.

        Raises:
            DivergedError: a feature is not finite.
        """
        if not features.isfinite().all():
            raise self.error(f"after epoch {epoch} features are not finite")

    def guesses(self, cross_entropy: float) -> bool:
        """Whether a model of this cross-entropy has learned nothing."""
        return cross_entropy >= self._guess

    def error(self, what: str) -> DivergedError:
        """What was found, and which options to turn."""
        lambd = f" or --lambd ({self._config.weight:g})" if self._config.penalized else ""
        return DivergedError(f"{what}: training diverged; lower --lr ({self._config.lr:g}){lambd}")


@torch.no_grad()
def first_broken(model: nn.Module) -> str | None:
    """What is wrong with the first parameter or buffer of ``model`` that holds a NaN or an infinity, or with the first
    parameter that is beyond :data:`LARGEST_WEIGHT`; or ``None``."""
    weights, others = dict(model.named_parameters()), dict(model.named_buffers())
    tensors = {name: tensor for name, tensor in (weights | others).items() if tensor.numel() > 0}
    # One transfer for all of them: on a GPU every question of its own would wait for the device.
    largest = torch.stack([tensor.abs().max().double() for tensor in tensors.values()]).tolist()
    for name, value in zip(tensors, largest, strict=True):
        if not math.isfinite(value):
            return f"{name} is not finite"
        if name in weights and value > LARGEST_WEIGHT:
            return f"{name} has a weight of {value:.2g}, beyond {LARGEST_WEIGHT:.0e}"
    return None
