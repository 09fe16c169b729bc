"""Class variance around running centroids for all classes at once, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_kernels.centroid_variance.common import RunningMoments, least_shares
from cem_kernels.class_variance.common import hinged, log_threshold, over_classes
from cem_kernels.groups import ClassGroups


def centroid_variance(
    features: Tensor,
    groups: ClassGroups,
    running: RunningMoments,
    threshold: float | Tensor,
    momentum: float,
    eps_var: float,
    gamma: float,
    hinge: str,
) -> tuple[Tensor, ...]:
    """``features [B, C]`` to ``(rob_loss, intra_mse, penalty [K], mse [K])``; moves ``running``."""
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    labels, present = groups.labels, groups.counts > 0
    with torch.no_grad():
        mean = groups.means(x)
        mse = groups.means((x - mean[labels]).square()).mean(dim=1)
        centroids = torch.where(running.batches[:, None] > 0, running.centroids.to(x.dtype), mean)
    around = groups.means((x - centroids[labels]).square())
    with torch.no_grad():
        first = 1 / (running.batches[:, None] + 1).to(x.dtype)
        of_centroid, of_variance = (first.clamp(min=least) for least in least_shares(momentum))
        variance = torch.lerp(running.variances.to(x.dtype), around, of_variance)
        centroids = torch.lerp(centroids, mean, of_centroid).to(running.centroids.dtype)
        variances = variance.to(running.variances.dtype)
        moves = present[:, None] & centroids.isfinite() & variances.isfinite()
        running.centroids.copy_(torch.where(moves, centroids, running.centroids))
        running.variances.copy_(torch.where(moves, variances, running.variances))
        running.batches.add_(moves.all(dim=1))
    value = variance + (around - around.detach())  # of the one, with the gradient of the other
    height = torch.log(torch.clamp(value, min=eps_var) + gamma) - log_threshold(threshold, gamma)
    penalty = torch.where(present, hinged(height, hinge).mean(dim=1), 0)
    return over_classes(penalty, mse, groups, min_samples=1)
