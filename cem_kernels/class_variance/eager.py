"""Class variance over a log threshold for all classes at once, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels.groups import ClassGroups


def class_variance(
    features: Tensor,
    groups: ClassGroups,
    threshold: Tensor,
    eps_var: float,
    gamma: float,
    min_samples: int,
    hinge: str,
) -> tuple[Tensor, Tensor]:
    """``features [B, C]`` to the penalty and the mean squared error of every class, ``[K]`` each.

    Two passes over the padded classes, mean first: ``E[x²] − E[x]²`` cancels where the variance is small against the
    mean, which is exactly where this penalty drives it.
    """
    padded = groups.pad(features)  # [K, L, C]
    count = groups.counts.to(features.dtype)[:, None]  # [K, 1]
    mean = padded.sum(dim=1) / count.clamp(min=1)
    deviation = (padded - mean[:, None]) * groups.padding.mask.to(features.dtype)[:, :, None]
    squares = deviation.square().sum(dim=1)  # [K, C]
    variance = torch.clamp(squares / (count - 1).clamp(min=1), min=eps_var)
    height = torch.log(variance + gamma) - torch.log(threshold + gamma)
    if hinge == "relu":
        height = F.relu(height)
    elif hinge == "softplus":
        height = F.softplus(height)
    qualifies = (groups.counts >= min_samples).to(features.dtype)
    return height.mean(dim=1) * qualifies, (squares / count.clamp(min=1)).mean(dim=1) * qualifies
