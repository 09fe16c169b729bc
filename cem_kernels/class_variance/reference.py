"""Class variance over a log threshold, one class at a time: the definition the other backends are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    """``features [B, C]`` to ``(rob_loss, intra_mse, penalty [K], mse [K])``."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    bounds = groups.offsets.tolist()
    penalties, errors = [], []
    for c in range(groups.num_classes):
        x = features[groups.order[bounds[c] : bounds[c + 1]]]
        if len(x) < min_samples:
            # An empty slice's sum is zero, and belongs to the graph.
            penalties.append(x[:0].sum())
            errors.append(x[:0].sum())
            continue
        mean = x.mean(dim=0)
        variance = torch.clamp(x.var(dim=0, unbiased=True), min=eps_var)
        height = torch.log(variance + gamma) - log_threshold(threshold, gamma)
        penalties.append(hinged(height, hinge).mean())
        errors.append(F.mse_loss(x, mean.expand_as(x)))
    return over_classes(torch.stack(penalties), torch.stack(errors), groups, min_samples)
