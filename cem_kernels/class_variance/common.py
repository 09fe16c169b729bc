"""What the PyTorch backends of both variances share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels.groups import ClassGroups


def log_threshold(threshold: float | Tensor, gamma: float) -> float | Tensor:
    """``log(threshold + γ)``; of a number without a tensor, which would cost a copy to the device."""
    return torch.log(threshold + gamma) if isinstance(threshold, Tensor) else math.log(threshold + gamma)


def hinged(height: Tensor, hinge: str) -> Tensor:
    """``height``, the part of it above zero, or a smooth form of that."""
    if hinge == "relu":
        return F.relu(height)
    return F.softplus(height) if hinge == "softplus" else height


def over_classes(penalty: Tensor, mse: Tensor, groups: ClassGroups, min_samples: int) -> tuple[Tensor, ...]:
    """``penalty [K]`` and ``mse [K]`` to ``(rob_loss, intra_mse, penalty, mse)``; classes too small have no weight."""
    weight = torch.where(groups.counts >= min_samples, groups.counts, 0).to(penalty.dtype)
    total = weight.sum().clamp(min=1)
    return (weight * penalty).sum() / total, (weight * mse).sum() / total, penalty, mse
