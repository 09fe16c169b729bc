"""Variance inside the slots of all classes at once, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
    x = torch.where(counted, groups.pad(features), 0)  # [K, L, T, D]
    count = groups.counts[:, None, None].to(x.dtype)
    mean = x.detach().sum(dim=1) / count.clamp(min=1)
    squares = torch.where(counted, x - mean[:, None], 0).square().sum(dim=1)
    of_class = squares / (count - 1).clamp(min=1)  # [K, T, D]
    weights = torch.where(counted, groups.pad(attention), 0)  # [K, L, T, S]

    def of_slot(weight: Tensor, x: Tensor, of_class: Tensor) -> tuple[Tensor, Tensor]:
        """Penalty and error ``[K]`` of one slot of every class, of which attention is ``weight [K, L, T, 1]``."""
        total = weight.sum(dim=1)  # [K, T, 1]
        share = weight / total[:, None].clamp(min=tiny)
        centroid = (share * x.detach()).sum(dim=1)
        away = torch.where(share > 0, x - centroid[:, None], 0)  # a square may overflow where a slot has nothing
        mse = (share * away.square()).sum(dim=1)  # [K, T, D]
        samples = 1 / share.square().sum(dim=1).clamp(min=tiny)
        correction = torch.where(samples < 2, samples, samples / (samples - 1))
        missing = torch.where((samples < 2) & (total > 0), (2 - samples) * of_class, 0)
        variance = torch.clamp(mse * correction + missing, min=eps_var)
        height = hinged(torch.log(variance + gamma) - log_threshold(threshold, gamma), hinge)
        of_mixture = total / count.clamp(min=1)
        return (of_mixture * height).mean(dim=(1, 2)), (of_mixture * mse).mean(dim=(1, 2))

    # Kept for the backward are a slot's inputs, which are those of all slots, and not its differences: S times as much.
    each = [
        checkpoint(of_slot, weight, x, of_class, use_reentrant=False, preserve_rng_state=False)
        for weight in weights.split(1, dim=3)
    ]
    penalty, error = (torch.stack(all_slots).sum(dim=0) for all_slots in zip(*each, strict=True))
    return over_classes(penalty, error, groups, min_samples)
