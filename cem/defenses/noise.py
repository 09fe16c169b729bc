"""Additive noise on features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GaussianNoise(nn.Module):
    """Adds independent Gaussian noise to every feature, in training *and* in evaluation.

    Server and attacker only ever see the noisy features, so the noise belongs to the channel and not to the
    training procedure: unlike dropout it is not switched off by ``eval()``.

    Args:
        std: standard deviation (not variance) in units of the features; 0 hands them through.

    Raises:
        ValueError: ``std`` is negative or not finite.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"std must be finite and at least 0, got {std}")
        self.std = float(std)

    def forward(self, z: Tensor) -> Tensor:
        """``z`` of any shape and floating dtype -> ``z + std * ε``, same shape and dtype, ``ε ~ N(0, 1)``."""
        return z if self.std == 0 else z + self.std * torch.randn_like(z)

    def extra_repr(self) -> str:
        return f"std={self.std}"
