"""Class variance over a log threshold for all classes at once, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_kernels.class_variance.common import hinged, log_threshold, over_classes
from cem_kernels.groups import ClassGroups


def class_variance(
    features: Tensor,
    groups: ClassGroups,
    threshold: float | Tensor,
    eps_var: float,
    gamma: float,
    min_samples: int,
    hinge: str,
) -> tuple[Tensor, ...]:
    """``features [B, C]`` to ``(rob_loss, intra_mse, penalty [K], mse [K])``.

    Two passes over the padded classes, mean first: ``E[x²] − E[x]²`` cancels where the variance is small against the
    mean, which is exactly where this penalty drives it.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    qualifies = groups.counts >= min_samples
    counted = (groups.padding.mask & qualifies[:, None])[:, :, None]
    # Chosen, not multiplied by zero: what does not count may be infinite.
    padded = torch.where(counted, groups.pad(features), 0)  # [K, L, C]
    count = groups.counts.to(features.dtype)[:, None]  # [K, 1]
    mean = padded.sum(dim=1) / count.clamp(min=1)
    deviation = torch.where(counted, padded - mean[:, None], 0)
    squares = deviation.square().sum(dim=1)  # [K, C]
    variance = torch.clamp(squares / (count - 1).clamp(min=1), min=eps_var)
    height = hinged(torch.log(variance + gamma) - log_threshold(threshold, gamma), hinge)
    penalty = torch.where(qualifies, height.mean(dim=1), 0)
    mse = (squares / count.clamp(min=1)).mean(dim=1)
    return over_classes(penalty, mse, groups, min_samples)
