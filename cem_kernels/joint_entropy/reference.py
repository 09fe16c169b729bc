"""The entropy's definition: one class and slot at a time, and the whole covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_kernels.groups import ClassGroups


def joint_entropy(
    features: Tensor, attention: Tensor, groups: ClassGroups, counted: Tensor, noise_std: float
) -> tuple[Tensor, ...]:
    """``features [B, T, D]``, ``attention [B, T, S]``, ``counted [K]`` bool to ``(rob_loss, intra_mse)``."""
    tiny = torch.finfo(attention.dtype).tiny
    bounds = groups.offsets.tolist()
    width = features.shape[1] * features.shape[2]
    # An empty slice's sum is zero, and belongs to the graph.
    covariance = features.new_zeros(width, width) + features[:0].sum()
    squares, num_samples = features[:0].sum(), 0
    for c in torch.nonzero(counted).flatten().tolist():
        members = groups.order[bounds[c] : bounds[c + 1]]
        x, p = features[members], attention[members]  # [M, T, D], [M, T, S]
        said, used = torch.zeros_like(x).detach(), x.new_zeros(x.shape[1])
        for s in range(p.shape[2]):
            weight = p[:, :, s]
            share = weight / weight.sum(dim=0).clamp(min=tiny)
            centroid = (share[..., None] * x.detach()).sum(dim=0)
            said += weight[..., None] * centroid
            used += (share * weight).sum(dim=0)
        residual = x - said
        missing = (used / (len(x) - 1)).sqrt()[:, None] * (x - x.detach().mean(dim=0))
        for rows in (residual.flatten(1), missing.flatten(1)):
            covariance = covariance + rows.T @ rows
        squares = squares + residual.square().sum()
        num_samples += len(x)
    num_samples = max(num_samples, 1)
    identity = torch.eye(width, dtype=features.dtype, device=features.device)
    entropy = torch.logdet(identity + covariance / (num_samples * noise_std**2)) / 2
    return entropy / width, squares / (num_samples * width)
