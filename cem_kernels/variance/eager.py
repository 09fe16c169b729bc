"""What variances cost for all classes at once, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cem_kernels import validation
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
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    if running is None:
        around, mse = _around_means(x, groups, min_samples)
    else:
        around, mse = _around_centroids(groups.kept(x), groups, running, momentum, penalty.unit)
    cost = torch.where(groups.counts >= min_samples, penalty.cost(around).mean(dim=1), 0)
    return *groups.weighted_means(min_samples, cost, mse), cost, mse


def _around_means(x: Tensor, groups: ClassGroups, min_samples: int) -> tuple[Tensor, Tensor]:
    """Unbiased variances ``[K, C]`` of the classes that count, and their mean squared deviations ``[K]``.

    In two passes, mean first: ``E[x²] − E[x]²`` cancels where the variance is small against the mean, which is exactly
    where this penalty drives it.
    """
    counts = groups.counts[:, None].to(x.dtype)
    alive = groups.counts >= min_samples
    if groups.ignores or not (validation.values_are_checked(x) and bool(alive.all())):
        # Chosen, not multiplied by zero: what does not count may be infinite.
        x = torch.where(groups.of_samples(alive[:, None]), x, 0)
    squares: Tensor = _MeanSquares.apply(x, None, groups)
    return squares * (counts / (counts - 1).clamp(min=1)), squares.mean(dim=1)


class _MeanSquares(torch.autograd.Function):
    """Mean squared deviations ``[K, C]`` from centers, by default the means of classes.

    Their own gradient vanishes, because deviations sum to zero, and is left out, but for a second derivative.
    """

    @staticmethod
    def forward(x: Tensor, centers: Tensor | None, groups: ClassGroups) -> Tensor:
        return groups.means(_deviations(x, centers, groups).square())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.groups = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        share = 2 * upstream / ctx.groups.counts.clamp(min=1)[:, None].to(upstream.dtype)
        x, centers = ctx.saved_tensors
        away = _deviations(x, centers, ctx.groups)
        if centers is None:  # once more: where classes are tight, rounding of their means is large
            away = _deviations(away, None, ctx.groups)
        return away * ctx.groups.of_samples(share), None, None


def _deviations(x: Tensor, centers: Tensor | None, groups: ClassGroups) -> Tensor:
    return x - groups.of_samples(groups.means(x) if centers is None else centers)


def _around_centroids(
    x: Tensor, groups: ClassGroups, running: RunningMoments, momentum: float, unit: float
) -> tuple[Tensor, Tensor]:
    """Running variances ``[K, C]`` with the gradient of the batch's, and mean squared deviations ``[K]`` with none."""
    with torch.no_grad():
        mean = groups.means(x)
        mse = groups.means(_deviations(x, mean, groups).square()).mean(dim=1)
        old_centroids, old_variances = running.centroids.to(x.dtype), running.variances.to(x.dtype)
        begun = running.batches[:, None] > 0
        centroids = torch.where(begun, old_centroids, mean)
    around = _MeanSquares.apply(x, centroids, groups)
    with torch.no_grad():
        variance = torch.where(begun, torch.lerp(old_variances, around, VARIANCES_MOVE), around)
        centroids = torch.lerp(centroids, mean, 1 - momentum).to(running.centroids.dtype)
        variances = variance.to(running.variances.dtype)
        shown = Spread(around.mean(dim=1), mean.square().mean(dim=1) + mse)
        known = Spread(old_variances.mean(dim=1), (old_centroids.square() + old_variances).mean(dim=1))
        storable = shown.around.isfinite() & (centroids.isfinite() & variances.isfinite()).all(dim=1)
        verdict = judged(shown, known, groups.counts, unit, running.batches, running.ignored, storable)
        running.centroids.copy_(torch.where(verdict.moves[:, None], centroids, running.centroids))
        running.variances.copy_(torch.where(verdict.moves[:, None], variances, running.variances))
        running.batches.copy_(verdict.batches)
        running.ignored.copy_(verdict.ignored)
    return variance + (around - around.detach()), mse  # of the one, with the gradient of the other
