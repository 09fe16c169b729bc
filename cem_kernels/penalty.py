"""What a variance costs: nats through the noise, or a hinge on its logarithm."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels.validation import check_positive, check_shape

Hinge = Literal["relu", "softplus"]


@dataclass(frozen=True)
class Nats:
    """``½ log1p(v/σ²)``: what a Gaussian of variance ``v`` tells through Gaussian noise, in nats.

    Args:
        noise_std: ``σ``, standard deviation of the noise, in units of the features.

    Raises:
        ValueError: ``noise_std`` is not finite and positive, or fp32 does not hold its square.

    Example::

        >>> import torch, cem_kernels
        >>> cem_kernels.Nats(noise_std=0.1).cost(torch.tensor([0.0, 0.01]))
        tensor([0.0000, 0.3466])
    """

    noise_std: float

    def __post_init__(self) -> None:
        check_positive(noise_std=self.noise_std)
        fp32 = torch.finfo(torch.float32)
        if not fp32.tiny <= self.noise_std * self.noise_std <= fp32.max:
            raise ValueError(f"noise_std must have a square that fp32 holds, got {self.noise_std!r}")

    @property
    def unit(self) -> float:
        """The variance below which the cost hardly changes: ``σ²``."""
        return self.noise_std**2

    def cost(self, variance: Tensor) -> Tensor:
        """The cost of each ``variance``, of any shape, differentiable."""
        return torch.log1p(variance / self.unit) / 2


@dataclass(frozen=True)
class LogHinge:
    """``hinge(log(max(v, floor) + γ) − log(threshold + γ))``: how far a log-variance exceeds that of a threshold.

    Args:
        threshold: the variance above which something is to pay, a positive float or a 0-dim tensor (a schedule or a
            captured graph can then change it in place; its value is not checked).
        floor: of the variance; below it there is no gradient.
        gamma: ``γ``, added inside both logarithms.
        hinge: ``relu`` (subgradient 0 at 0) or ``softplus``.

    Raises:
        ValueError: threshold, floor or gamma is not finite and positive, a threshold has an axis, or the hinge is
            unknown.

    Example::

        >>> import torch, cem_kernels
        >>> cem_kernels.LogHinge(threshold=0.1).cost(torch.tensor([0.05, 0.1, 0.2]))
        tensor([0.0000, 0.0000, 0.6931])
    """

    threshold: float | Tensor
    floor: float = 1e-4
    gamma: float = 1e-6
    hinge: Hinge = "relu"

    def __post_init__(self) -> None:
        if isinstance(self.threshold, Tensor):
            check_shape("threshold", self.threshold, {})
        else:
            check_positive(threshold=self.threshold)
        check_positive(floor=self.floor, gamma=self.gamma)
        if self.hinge not in get_args(Hinge):
            raise ValueError(f"hinge must be one of {', '.join(get_args(Hinge))}, got {self.hinge!r}")

    @property
    def unit(self) -> float:
        """The variance below which the cost hardly changes: ``floor + γ``."""
        return self.floor + self.gamma

    def cost(self, variance: Tensor) -> Tensor:
        """The cost of each ``variance``, of any shape, differentiable; in a threshold that is a tensor too."""
        start = self.threshold + self.gamma
        # Of a number without a tensor, which would cost a copy to the device.
        zero = torch.log(start) if isinstance(start, Tensor) else math.log(start)
        height = torch.log(torch.clamp(variance, min=self.floor) + self.gamma) - zero
        return F.relu(height) if self.hinge == "relu" else F.softplus(height)


Penalty = Nats | LogHinge


def placed(penalty: Penalty, features: Tensor) -> Penalty:
    """``penalty`` with its threshold, where that is a tensor, on the device of ``features``, fp32 or as wide.

    Raises:
        TypeError: it is no penalty.
    """
    if not isinstance(penalty, (Nats, LogHinge)):
        raise TypeError(f"penalty must be Nats or LogHinge, got {type(penalty).__name__}")
    if isinstance(penalty, Nats) or not isinstance(penalty.threshold, Tensor):
        return penalty
    wide = torch.promote_types(features.dtype, torch.float32)
    return replace(penalty, threshold=penalty.threshold.to(features.device, wide))
