"""Variance inside the slots of all classes at once, in plain PyTorch."""

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
    """``features [B, T, D]``, ``attention [B, T, S]`` to ``(rob_loss, intra_mse, penalty [K], mse [K])``.

    Two passes over the padded classes, centroids first: ``E[x²] − E[x]²`` cancels where the variance is small. Sums,
    not products with an indicator of the class: those may be rounded to TF32, and mix infinities into all classes.
    """
    tiny = torch.finfo(attention.dtype).tiny
    qualifies = groups.counts >= min_samples
    counted = (groups.padding.mask & qualifies[:, None])[:, :, None, None]
    x = torch.where(counted, groups.pad(features), 0)[:, :, :, None]  # [K, L, T, 1, D]
    with torch.no_grad():
        weight = torch.where(counted, groups.pad(attention), 0)[..., None]  # [K, L, T, S, 1]
        total = weight.sum(dim=1)  # [K, T, S, 1]
        share = weight / total[:, None].clamp(min=tiny)
        centroids = (share * x).sum(dim=1)  # [K, T, S, D]
        samples = 1 / share.square().sum(dim=1).clamp(min=tiny)
        correction = torch.where(samples < 2, 2, samples / (samples - 1))
        mixture = total / groups.counts.clamp(min=1)[:, None, None, None]
    away = torch.where(share > 0, x - centroids[:, None], 0)  # a square may overflow where a slot has nothing
    mse = (share * away.square()).sum(dim=1)  # [K, T, S, D]
    variance = torch.clamp(mse * correction, min=eps_var)
    height = hinged(torch.log(variance + gamma) - log_threshold(threshold, gamma), hinge)
    penalty, error = ((mixture * each).mean(dim=3).sum(dim=2).mean(dim=1) for each in (height, mse))
    return over_classes(penalty, error, groups, min_samples)
