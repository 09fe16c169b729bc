"""Additive noise on features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cem.defenses.base import Defense
from cem.terms import Context


class GaussianNoise(Defense):
    """Adds independent Gaussian noise to every feature, in training *and* in evaluation.

    Server and attacker only ever see the noisy features, so the noise belongs to the channel and not to the
    training procedure: unlike dropout it is not switched off by ``eval()``.

    Args:
        std: standard deviation (not variance) in units of the features; 0 hands them through.

    Features of any shape and floating dtype keep both.

    Raises:
        ValueError: ``std`` is negative or not finite.

    Example::

        >>> import torch, cem
        >>> cem.GaussianNoise(0.1)(torch.zeros(4, 8)).shape
        torch.Size([4, 8])
    """

    name = "noise"
    summary = "Gaussian noise of --noise-std; always there, first unless it is named in another place"

    def __init__(self, std: float) -> None:
        super().__init__()
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"std must be finite and at least 0, got {std}")
        self.std = float(std)

    @classmethod
    def build(cls, options: Any, context: Context) -> GaussianNoise:
        """See :class:`~cem.Defense`; its option is ``--noise-std``."""
        return cls(context.noise_std)

    def transform(self, z: Tensor) -> Tensor:
        """``z`` → ``z + std * ε``, ``ε ~ N(0, 1)``."""
        return z if self.std == 0 else z + self.std * torch.randn_like(z)

    def sigma(self) -> float | None:
        """``std``."""
        return self.std

    def log_likelihood(self, sent: Tensor, z: Tensor) -> Tensor | None:
        """``log N(sent; z, std²)``, ``[B]``; ``None`` without noise."""
        if self.std == 0:
            return None
        squared = ((sent - z) / self.std).flatten(1).square()
        return -0.5 * (squared + math.log(2 * math.pi * self.std**2)).sum(1)

    def extra_repr(self) -> str:
        return f"std={self.std}"
