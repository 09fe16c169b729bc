"""Class variance around running centroids, one class at a time: the definition the other backends are held to."""

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
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    bounds = groups.offsets.tolist()
    penalties, errors = [], []
    for c in range(groups.num_classes):
        x = features[groups.order[bounds[c] : bounds[c + 1]]]
        if not len(x):
            # An empty slice's sum is zero, and belongs to the graph.
            penalties.append(x.sum())
            errors.append(x.sum().detach())
            continue
        mean, batches = x.detach().mean(dim=0), int(running.batches[c])
        centroid = running.centroids[c].to(x.dtype) if batches else mean
        around = (x - centroid).square().mean(dim=0)

        of_centroid, of_variance = (max(1 / (batches + 1), least) for least in least_shares(momentum))
        variance = torch.lerp(running.variances[c].to(x.dtype), around.detach(), of_variance)
        moved = torch.lerp(centroid, mean, of_centroid).to(running.centroids.dtype)
        spread = variance.to(running.variances.dtype)
        moves = moved.isfinite() & spread.isfinite()
        running.centroids[c] = torch.where(moves, moved, running.centroids[c])
        running.variances[c] = torch.where(moves, spread, running.variances[c])
        running.batches[c] += int(moves.all())

        value = variance + (around - around.detach())  # of the one, with the gradient of the other
        height = torch.log(torch.clamp(value, min=eps_var) + gamma) - log_threshold(threshold, gamma)
        penalties.append(hinged(height, hinge).mean())
        errors.append((x.detach() - mean).square().mean())
    return over_classes(torch.stack(penalties), torch.stack(errors), groups, min_samples=1)
