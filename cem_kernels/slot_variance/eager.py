"""What variances around running slots cost, for all classes at once, in plain PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels import validation
from cem_kernels.groups import ClassGroups
from cem_kernels.penalty import Nats
from cem_kernels.slot_variance.running import CENTROIDS_MOVE, DEAD, MOST, RunningSlots
from cem_kernels.variance.running import VARIANCES_MOVE, Spread, judged

State = tuple[Tensor, Tensor, Tensor]  # centroids and variances [K, S, C], shares [K, S]


def slot_variance(features: Tensor, groups: ClassGroups, running: RunningSlots, penalty: Nats) -> tuple[Tensor, ...]:
    """``features [B, C]`` to ``(rob_loss, intra_mse, penalty [K], mse [K])``; moves ``running``."""
    x = groups.kept(features.to(torch.promote_types(features.dtype, torch.float32)))
    # Copies: the backward wants the slots as they were.
    old = running.centroids.to(x.dtype, copy=True), running.variances.to(x.dtype), running.shares.to(x.dtype)
    seen = x.detach()
    centroids, variances, shares = state = _begun(seen, groups, running.batches, old)
    away = _away(seen, centroids, groups)
    squares = away.square()
    logits = _logits(squares, groups, state, penalty.unit)
    attention = torch.softmax(logits / x.shape[1] ** 0.5, dim=1)
    weights = groups.means(attention)
    masses = weights * groups.counts[:, None].to(x.dtype)
    of_slot = attention / groups.of_samples(masses).clamp(min=torch.finfo(x.dtype).tiny)
    bags = _bags(of_slot, groups)
    around = _sums(squares, bags)

    part = (weights * shares.shape[1])[..., None]  # 1 where every slot has as many samples
    moved_variances = torch.lerp(variances, around, (VARIANCES_MOVE * part).clamp(max=MOST))
    cost = penalty.cost(_WithSlopes.apply(moved_variances, x, of_slot, centroids, groups)).mean(dim=2)
    mse = (weights * around.mean(dim=2)).sum(dim=1)
    with torch.no_grad():
        moved_centroids = torch.addcmul(centroids, part, _sums(away, bags), value=CENTROIDS_MOVE)
        moved = moved_centroids, moved_variances, torch.lerp(shares, weights, CENTROIDS_MOVE)
        moved = _revived(moved, seen, logits, groups, running.batches)
        zero = groups.means(seen.square().mean(dim=1, keepdim=True))[:, 0]
        _remember(running, moved, old, mse, zero, groups.counts, penalty.unit)
    penalties = torch.where(groups.counts > 0, (weights * cost).sum(dim=1), 0)  # whatever an absent class's slots hold
    return *groups.weighted_means(1, penalties, mse), penalties, mse


class _WithSlopes(torch.autograd.Function):
    """``variances [K, S, C]``, whose slopes are those of samples' squared distances from ``centroids [K, S, C]``.

    Distances of ``x [B, C]`` are weighted by ``of_slot [B, S]``; nothing but ``x`` takes a gradient.
    """

    @staticmethod
    def forward(variances: Tensor, x: Tensor, of_slot: Tensor, centroids: Tensor, groups: ClassGroups) -> Tensor:
        return variances.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tensors, ctx.groups = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None, None]:
        x, of_slot, centroids = ctx.saved_tensors
        slopes = _away(x, centroids, ctx.groups).mul_(of_slot[..., None]).mul_(ctx.groups.of_samples(2 * upstream))
        return None, slopes.sum(dim=1), None, None, None


def _away(x: Tensor, centroids: Tensor, groups: ClassGroups) -> Tensor:
    """``x [B, C]`` seen from each slot ``[K, S, C]`` of its class, ``[B, S, C]``."""
    return groups.of_samples(-centroids).add_(x[:, None])


class _Bags(NamedTuple):
    """Rows of ``[B · S]`` that belong to a slot of a class, as an embedding bag wants them."""

    rows: Tensor  # [S · B], by slot, then by class
    begin: Tensor  # [S · (K + 1)], where each bag begins in ``rows``; one more than classes, of the samples of no class
    weights: Tensor  # [S · B], of rows


def _bags(weights: Tensor, groups: ClassGroups) -> _Bags:
    """Of samples that have ``weights [B, S]``."""
    num_samples, num_slots = weights.shape
    slots = torch.arange(num_slots, device=weights.device)[:, None]
    rows = torch.add(slots, groups.order, alpha=num_slots).flatten()
    begin = torch.add(groups.offsets, slots, alpha=num_samples).flatten()
    return _Bags(rows, begin, weights.flatten().index_select(0, rows))


def _sums(x: Tensor, bags: _Bags) -> Tensor:
    """``[K, S, C]``: weighted sums of ``x [B, S, C]`` over the samples of each class.

    Without a product of ``x`` and weights: such tensors cost more to allocate than to compute.
    """
    num_slots = x.shape[1]
    if not len(x):  # an embedding bag wants at least one row
        return x.new_zeros(len(bags.begin) // num_slots - 1, *x.shape[1:])
    sums = F.embedding_bag(bags.rows, x.flatten(0, 1), bags.begin, mode="sum", per_sample_weights=bags.weights)
    return sums.unflatten(0, (num_slots, -1))[:, :-1].transpose(0, 1)


def _logits(squares: Tensor, groups: ClassGroups, state: State, unit: float) -> Tensor:
    """How likely each sample is of each slot of its class, ``[B, S]``, but for a constant; of ``squares [B, S, C]``."""
    _, variances, shares = state
    wide = variances + unit
    distances = groups.of_samples(wide.reciprocal()).mul_(squares).sum(dim=2)
    return groups.of_samples(shares.log() - wide.log().sum(dim=2) / 2) - distances / 2


def _begun(x: Tensor, groups: ClassGroups, batches: Tensor, old: State) -> State:
    """The slots of a step, as they were or, of a class whose first batch it is, as its samples give them."""
    new = batches == 0
    if not len(x) or (validation.values_are_checked(x) and not bool((new & (groups.counts > 0)).any())):
        return old
    num_slots = old[2].shape[1]
    centroids, variances = _first_slots(x, groups, num_slots)
    counts = groups.counts[:, None]
    alive = torch.arange(num_slots, device=x.device) < counts
    shares = torch.where(alive, 1 / counts.clamp(1, num_slots).to(x.dtype), 0)
    first = centroids, variances, shares
    chosen = (torch.where(new.view(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in zip(first, old, strict=True))
    return tuple(chosen)  # type: ignore[return-value]


def _first_slots(x: Tensor, groups: ClassGroups, num_slots: int) -> tuple[Tensor, Tensor]:
    """Of every class, see :func:`cem_kernels.slot_variance.reference.first_slots`."""
    chosen = groups.means(x)[:, None]
    squares = _away(x, chosen, groups).square().sum(dim=2)
    for _ in range(1, num_slots):
        another = x[_first_of(-squares.amin(dim=1), groups)][:, None]
        chosen = torch.cat([chosen, another], dim=1)
        squares = torch.cat([squares, _away(x, another, groups).square().sum(dim=2)], dim=1)
    nearest = squares.argmin(dim=1, keepdim=True)
    members = torch.zeros_like(squares).scatter_(1, nearest, 1)
    counts = groups.means(members) * groups.counts[:, None].to(x.dtype)
    means = _sums(x[:, None].expand(-1, num_slots, -1), _bags(members, groups)) / counts.clamp(min=1)[..., None]
    centroids = torch.where(counts[..., None] > 0, means, chosen)
    around = (x - groups.of_samples(centroids).take_along_dim(nearest[..., None], dim=1)[:, 0]).square()
    return centroids, groups.means(around)[:, None].expand_as(centroids)


def _first_of(values: Tensor, groups: ClassGroups) -> Tensor:
    """The first sample of each class with the least of ``values [B]``, ``[K]``; of an empty class, any."""
    num_samples, num_groups = len(values), groups.num_classes + 1  # one more, of the samples of no class
    least = values.new_full((num_groups,), float("inf")).scatter_reduce(0, groups.labels, values, "amin")
    at = torch.arange(num_samples, device=values.device)
    at = torch.where(values == least[groups.labels], at, num_samples - 1)
    first = at.new_full((num_groups,), num_samples - 1).scatter_reduce(0, groups.labels, at, "amin")
    return first[:-1]


def _worst(x: Tensor, logits: Tensor, groups: ClassGroups) -> Tensor:
    """The sample of each class that its slots explain worst, ``[K, C]``."""
    if not len(x):
        return x.new_zeros(groups.num_classes, x.shape[1])
    return x[_first_of(logits.amax(dim=1), groups)]


def _revived(moved: State, x: Tensor, logits: Tensor, groups: ClassGroups, batches: Tensor) -> State:
    """See :func:`cem_kernels.slot_variance.reference.revive`."""
    centroids, variances, shares = moved
    num_slots = shares.shape[1]
    dead = (shares.amin(dim=1, keepdim=True) < DEAD / num_slots) & (batches > 0)[:, None]
    if validation.values_are_checked(x) and not bool(dead.any()):
        return moved
    lightest, heaviest = shares.argmin(dim=1, keepdim=True), shares.argmax(dim=1, keepdim=True)
    worst = _worst(x, logits, groups)
    slots = torch.arange(num_slots, device=shares.device)
    replaced = dead & (slots == lightest)
    heavy = variances.take_along_dim(heaviest[..., None], dim=1)
    half = (shares.gather(1, lightest) + shares.gather(1, heaviest)) / 2
    return (
        torch.where(replaced[..., None], worst[:, None], centroids),
        torch.where(replaced[..., None], heavy, variances),
        torch.where(dead & ((slots == lightest) | (slots == heaviest)), half, shares),
    )


def _remember(
    running: RunningSlots, moved: State, old: State, mse: Tensor, zero: Tensor, counts: Tensor, unit: float
) -> None:
    """Moves ``running`` where the batch is no outlier of its class."""
    kept = [each.to(state.dtype) for each, state in zip(moved, running[:3], strict=True)]
    centroids, variances, shares = old
    known = Spread(
        (shares * variances.mean(dim=2)).sum(dim=1),
        (shares * torch.addcmul(variances, centroids, centroids).mean(dim=2)).sum(dim=1),
    )
    storable = mse.isfinite()
    for each, state in zip(kept, running[:3], strict=True):
        if mse.dtype != state.dtype:  # else what mse is made of is finite, and so is all that comes of it
            storable &= each.isfinite().flatten(1).all(dim=1)
    verdict = judged(Spread(mse, zero), known, counts, unit, running.batches, running.ignored, storable)
    for state, each in zip(running[:3], kept, strict=True):
        state.copy_(torch.where(verdict.moves.view(-1, *(1,) * (each.dim() - 1)), each, state))
    running.batches.copy_(verdict.batches)
    running.ignored.copy_(verdict.ignored)
