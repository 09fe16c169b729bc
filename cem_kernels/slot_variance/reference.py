"""Variance inside slots, one slot of one class at a time: the definition the other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_kernels.class_variance.common import hinged, log_threshold, over_classes
from cem_kernels.groups import ClassGroups


def slot_variance(
    features: Tensor,
    attention: Tensor,
    groups: ClassGroups,
    threshold: float | Tensor,
    eps_var: float,
    gamma: float,
    min_samples: int,
    hinge: str,
) -> tuple[Tensor, ...]:
    """``features [B, T, D]``, ``attention [B, T, S]`` to ``(rob_loss, intra_mse, penalty [K], mse [K])``."""
    tiny = torch.finfo(attention.dtype).tiny
    bounds = groups.offsets.tolist()
    penalties, errors = [], []
    for c in range(groups.num_classes):
        members = groups.order[bounds[c] : bounds[c + 1]]
        x, p = features[members], attention[members]  # [M, T, D], [M, T, S]
        # An empty slice's sum is zero, and belongs to the graph.
        penalty, error = x[:0].sum(), x[:0].sum()
        if len(members) >= min_samples:
            of_class = x.var(dim=0)  # [T, D], unbiased
            for s in range(p.shape[2]):
                weight = p[:, :, s, None]  # [M, T, 1]
                total = weight.sum(dim=0)
                share = weight / total.clamp(min=tiny)  # where a slot has nothing, nothing of it counts
                centroid = (share * x).sum(dim=0).detach()
                away = torch.where(share > 0, x - centroid, 0)
                mse = (share * away.square()).sum(dim=0)  # [T, D]
                samples = 1 / share.square().sum(dim=0).clamp(min=tiny)
                correction = torch.where(samples < 2, samples, samples / (samples - 1))
                missing = torch.where((samples < 2) & (total > 0), (2 - samples) * of_class, 0)
                variance = torch.clamp(mse * correction + missing, min=eps_var)
                height = torch.log(variance + gamma) - log_threshold(threshold, gamma)
                penalty = penalty + (total / len(x) * hinged(height, hinge)).mean()
                error = error + (total / len(x) * mse).mean()
        penalties.append(penalty)
        errors.append(error)
    return over_classes(torch.stack(penalties), torch.stack(errors), groups, min_samples)
