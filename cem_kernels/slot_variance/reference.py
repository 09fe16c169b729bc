"""What variances around running slots cost, one class at a time: the definition that the other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_kernels.groups import ClassGroups
from cem_kernels.penalty import Nats
from cem_kernels.slot_variance.running import CENTROIDS_MOVE, DEAD, MOST, RunningSlots
from cem_kernels.variance.running import VARIANCES_MOVE, Spread, judged


def slot_variance(features: Tensor, groups: ClassGroups, running: RunningSlots, penalty: Nats) -> tuple[Tensor, ...]:
    """``features [B, C]`` to ``(rob_loss, intra_mse, penalty [K], mse [K])``; moves ``running``."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    bounds = groups.offsets.tolist()
    penalties, errors = [], []
    for c in range(groups.num_classes):
        x = features[groups.order[bounds[c] : bounds[c + 1]]]
        # An empty slice's sum is zero, and belongs to the graph.
        cost, mse = _of_class(x, c, running, penalty) if len(x) else (x.sum(), x.detach().sum())
        penalties.append(cost)
        errors.append(mse)
    of_classes = torch.stack(penalties), torch.stack(errors)
    return *groups.weighted_means(1, *of_classes), *of_classes


def first_slots(x: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Centroids and variances ``[S, C]`` that samples ``x [M, C]`` of a class begin with.

    The mean, then the sample farthest from all chosen so far, and once more the means of those nearest to each.
    """
    chosen = x.mean(dim=0, keepdim=True)
    for _ in range(1, num_slots):
        farthest = _squares(x, chosen).amin(dim=1).argmax()
        chosen = torch.cat([chosen, x[farthest, None]])
    nearest = _squares(x, chosen).argmin(dim=1)
    centroids = torch.stack([x[nearest == s].mean(dim=0) if s in nearest else chosen[s] for s in range(num_slots)])
    variance = (x - centroids[nearest]).square().mean(dim=0)
    return centroids, variance.expand_as(centroids)


def _squares(x: Tensor, centroids: Tensor) -> Tensor:
    return (x[:, None] - centroids).square().sum(dim=2)


def _of_class(x: Tensor, c: int, running: RunningSlots, penalty: Nats) -> tuple[Tensor, Tensor]:
    """Penalty and mse of class ``c`` with samples ``x [M, C]``; moves its slots."""
    seen = x.detach()
    old = [each[c].to(x.dtype) for each in running[:3]]
    centroid, variance, share = old
    if not running.batches[c]:
        centroid, variance = first_slots(seen, len(share))
        share = torch.zeros_like(share)  # or slots that begin in one place would stay there together
        share[: len(x)] = 1 / min(len(x), len(share))

    wide = variance + penalty.unit
    logits = share.log() - ((seen[:, None] - centroid).square() / wide + wide.log()).sum(dim=2) / 2
    attention = torch.softmax(logits / x.shape[1] ** 0.5, dim=1)
    weight = attention.sum(dim=0) / len(x)
    of_slot = attention / attention.sum(dim=0).clamp(min=torch.finfo(x.dtype).tiny)  # of a slot without any, zeros

    around = torch.einsum("ns,nsd->sd", of_slot, (x[:, None] - centroid).square())
    step = torch.einsum("ns,nsd->sd", of_slot, seen[:, None] - centroid)
    part = weight[:, None] * len(share)  # 1 where every slot has as many samples
    moved_variance = torch.lerp(variance, around.detach(), (VARIANCES_MOVE * part).clamp(max=MOST))
    cost = penalty.cost(moved_variance + (around - around.detach())).mean(dim=1)
    mse = (weight[:, None] * around.detach()).mean(dim=1).sum()

    moved = [centroid + CENTROIDS_MOVE * part * step, moved_variance, torch.lerp(share, weight, CENTROIDS_MOVE)]
    if running.batches[c]:
        revive(moved, seen[logits.amax(dim=1).argmin()])
    kept = [each.to(state.dtype) for each, state in zip(moved, running[:3], strict=True)]
    storable = mse.isfinite() & torch.stack([each.isfinite().all() for each in kept]).all()
    known = old[2][:, None] * old[1], old[2][:, None] * (old[0].square() + old[1])
    verdict = judged(
        Spread(mse, seen.square().mean()), Spread(*(each.mean(dim=1).sum() for each in known)),
        torch.tensor(len(x), device=x.device), penalty.unit, running.batches[c], running.ignored[c], storable,
    )  # fmt: skip
    if verdict.moves:
        for state, each in zip(running[:3], kept, strict=True):
            state[c] = each
    running.batches[c], running.ignored[c] = verdict.batches, verdict.ignored
    return (weight * cost).sum(), mse


def revive(moved: list[Tensor], worst: Tensor) -> None:
    """Put the lightest slot, where it is dead, on the sample that the slots explain worst, as wide as the heaviest."""
    centroid, variance, share = moved
    lightest, heaviest = share.argmin(), share.argmax()
    if share[lightest] < DEAD / len(share):
        centroid[lightest], variance[lightest] = worst, variance[heaviest]
        share[heaviest] = share[lightest] = (share[heaviest] + share[lightest]) / 2
