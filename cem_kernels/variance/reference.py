"""What variances cost, one class at a time: the definition that the other backends are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels.groups import ClassGroups
from cem_kernels.penalty import Penalty
from cem_kernels.variance.running import VARIANCES_MOVE, RunningMoments, Spread, judged


def variance(
    features: Tensor,
    groups: ClassGroups,
    penalty: Penalty,
    min_samples: int,
    running: RunningMoments | None,
    momentum: float,
) -> tuple[Tensor, ...]:
    """``features [B, C]`` to ``(rob_loss, intra_mse, penalty [K], mse [K])``; moves ``running`` where it is given."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    bounds = groups.offsets.tolist()
    penalties, errors = [], []
    for c in range(groups.num_classes):
        x = features[groups.order[bounds[c] : bounds[c + 1]]]
        if len(x) < min_samples:
            # An empty slice's sum is zero, and belongs to the graph.
            penalties.append(x[:0].sum())
            errors.append(x[:0].sum())
        elif running is None:
            mean = x.mean(dim=0)
            penalties.append(penalty.cost(x.var(dim=0, unbiased=True)).mean())
            errors.append(F.mse_loss(x, mean.expand_as(x)))
        else:
            penalties.append(penalty.cost(_around_centroid(x, c, running, momentum, penalty.unit)).mean())
            errors.append((x.detach() - x.detach().mean(dim=0)).square().mean())
    of_classes = torch.stack(penalties), torch.stack(errors if running is None else [e.detach() for e in errors])
    return *groups.weighted_means(min_samples, *of_classes), *of_classes


def _around_centroid(x: Tensor, c: int, running: RunningMoments, momentum: float, unit: float) -> Tensor:
    """The running variance ``[C]`` of class ``c`` with the gradient of that of its samples ``x [M, C]``; moves both."""
    mean, batches = x.detach().mean(dim=0), int(running.batches[c])
    old_centroid, old_variance = running.centroids[c].to(x.dtype), running.variances[c].to(x.dtype)
    centroid = old_centroid if batches else mean
    around = (x - centroid).square().mean(dim=0)

    variance = torch.lerp(old_variance, around.detach(), VARIANCES_MOVE) if batches else around.detach()
    moved = torch.lerp(centroid, mean, 1 - momentum).to(running.centroids.dtype)
    spread = variance.to(running.variances.dtype)
    shown = Spread(around.detach().mean(), x.detach().square().mean())
    known = Spread(old_variance.mean(), (old_centroid.square() + old_variance).mean())
    storable = shown.around.isfinite() & moved.isfinite().all() & spread.isfinite().all()
    verdict = judged(
        shown, known, torch.tensor(len(x), device=x.device), unit, running.batches[c], running.ignored[c], storable
    )
    if verdict.moves:
        running.centroids[c], running.variances[c] = moved, spread
    running.batches[c], running.ignored[c] = verdict.batches, verdict.ignored
    return variance + (around - around.detach())  # of the one, with the gradient of the other
