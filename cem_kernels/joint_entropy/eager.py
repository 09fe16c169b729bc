"""The entropy of all classes at once, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_kernels.groups import ClassGroups


def joint_entropy(
    features: Tensor, attention: Tensor, groups: ClassGroups, counted: Tensor, noise_std: float
) -> tuple[Tensor, ...]:
    """``features [B, T, D]``, ``attention [B, T, S]``, ``counted [K]`` bool to ``(rob_loss, intra_mse)``.

    ``det(I + RᵀR) = det(I + RRᵀ)``: the factor is of the smaller of both.
    """
    own = counted[groups.labels]
    count = groups.counts[groups.labels].to(features.dtype)
    # Chosen, not multiplied by zero: what does not count may be infinite.
    x = torch.where(own[:, None, None], features, 0)
    # What a mean loses to rounding is the same for the whole class, and goes with its second mean.
    x = x - _mean_of_class(x, groups)
    said, used = _explained(x.detach(), torch.where(own[:, None, None], attention, 0), groups)
    missing = (used / (count - 1).clamp(min=1)[:, None]).sqrt()[..., None]
    residual = x - said
    rows = torch.cat((residual, missing * (x - _mean_of_class(x, groups)))).flatten(1)  # [2B, T·D]
    rows = torch.where(own.repeat(2)[:, None], rows, 0)
    num_samples, width = own.sum().clamp(min=1), rows.shape[1]
    rows = rows / (num_samples.to(x.dtype).sqrt() * noise_std)
    gram = rows.T @ rows if width < len(rows) else rows @ rows.T
    factor = torch.linalg.cholesky_ex(gram + torch.eye(len(gram), dtype=x.dtype, device=x.device)).L
    entropy = factor.diagonal().log().sum()
    squares = torch.where(own[:, None, None], residual, 0).square().sum()
    return entropy / width, squares / (num_samples * width)


@torch.no_grad()
def _mean_of_class(x: Tensor, groups: ClassGroups) -> Tensor:
    mean = groups.pad(x).sum(dim=1) / groups.counts.clamp(min=1)[:, None, None]
    return mean[groups.labels]


@torch.no_grad()
def _explained(x: Tensor, attention: Tensor, groups: ClassGroups) -> tuple[Tensor, Tensor]:
    """What slots say of every token, ``[B, T, D]``, and how many samples they used up for it, ``[B, T]``.

    One slot at a time: of all at once there would be S times as much.
    """
    padded = groups.pad(x)  # [K, L, T, D]
    said = torch.zeros_like(x)
    used = attention.new_zeros(groups.num_classes, attention.shape[1])
    for weight in attention.split(1, dim=2):  # [B, T, 1]
        padded_weight = groups.pad(weight)
        share = padded_weight / padded_weight.sum(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        centroid = (share * padded).sum(dim=1)  # [K, T, D]
        said += weight * centroid[groups.labels]
        used += (share * padded_weight).sum(dim=(1, 3))
    return said, used[groups.labels]
