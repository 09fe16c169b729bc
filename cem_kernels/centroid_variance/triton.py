"""Class variance around running centroids in Triton: features read once forward; read and written once backward.

A class's moments come as in :mod:`cem_kernels.class_variance.triton`, and with them, without another look at a feature,
the variance around any centroid: ``mean of (x − μ)² = mean of (x − mean)² + (mean − μ)²``. Whoever finishes a block of
columns moves its running moments, before anybody can have counted the batch: all blocks of a class have come then. The
backward is that of class variance, with ``μ`` in place of the mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from cem_kernels.centroid_variance.common import RunningMoments, least_shares
from cem_kernels.class_variance.kernels import add_up, moments, penalized
from cem_kernels.class_variance.triton import blocks, class_variance_backward, parts_of
from cem_kernels.groups import ClassGroups
from cem_kernels.launching import ALL_REGISTERS, launch, operator, tuned

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _lerp(old, new, share):
    """``old + share (new − old)``, exactly ``new`` where all of it is taken."""
    step = new - old
    return tl.where(share < 0.5, old + share * step, new - step * (1.0 - share))


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _finish_columns(
    mean, low, squares, count, cols, c, block, num_blocks, C, eps_var, gamma, threshold, threshold_at,
    centroids, variances, batches, least_of_centroid, least_of_variance,
    center_out, low_out, slope_out, penalty_out, mse_out, stuck_out, HINGE: tl.constexpr,
):  # fmt: skip
    """A block of columns of a class: its running moments moved, its share of penalty and mse, and the slope."""
    at = c.to(tl.int64) * C + cols
    n = tl.maximum(count, 1).to(tl.float32)
    present = cols < tl.where(count > 0, C, 0)
    before = tl.load(batches + c)
    first = 1.0 / (before.to(tl.float32) + 1.0)
    centroid = tl.where(before > 0, tl.load(centroids + at, mask=cols < C, other=0.0), mean)
    remainder = tl.where(before > 0, 0.0, low)  # of a centroid that is the batch's own mean
    away = tl.where(before > 0, (mean - centroid) + low, 0.0)
    mse = squares / n
    around = mse + away * away
    moved = _lerp(centroid, mean, tl.maximum(first, least_of_centroid))
    old = tl.load(variances + at, mask=cols < C, other=0.0)
    variance = _lerp(old, around, tl.maximum(first, least_of_variance))
    value, slope = penalized(variance, eps_var, gamma, threshold, threshold_at, HINGE)
    moves = present & _is_finite(moved) & _is_finite(variance)
    tl.store(centroids + at, moved, mask=moves)
    tl.store(variances + at, variance, mask=moves)
    tl.store(center_out + at, centroid, mask=cols < C)
    tl.store(low_out + at, remainder.to(low_out.dtype.element_ty), mask=cols < C)
    # The backward of class variance divides by n − 1.
    tl.store(slope_out + at, slope * (tl.maximum(n - 1.0, 1.0) / n), mask=cols < C)
    share = c.to(tl.int64) * num_blocks + block
    tl.store(penalty_out + share, tl.sum(tl.where(present, value, 0.0), axis=0) / C)
    tl.store(mse_out + share, tl.sum(tl.where(present, mse, 0.0), axis=0) / C)
    stuck = tl.where(cols < C, tl.where(moves, 0.0, 1.0), 0.0)
    tl.store(stuck_out + share, tl.sum(stuck, axis=0))


@triton.jit(do_not_specialize=["num_parts"])
def centroid_forward_kernel(
    x, order, offsets, centroids, variances, batches, threshold_at, arrived, part_mean, part_low, part_squares,
    block_penalty, block_mse, block_stuck,
    center_out, low_out, slope_out, penalty_out, mse_out, rob_out, intra_out, weight_out,
    stride_row, stride_col, C, num_parts, eps_var, gamma, threshold, least_of_centroid, least_of_variance,
    HINGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From features to losses; ``arrived [K·blocks + K + 1]``, zeros, counts who has come to a block, a class, the end.

    Grid: blocks of columns × parts × classes.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    c = tl.program_id(2)
    num_blocks = tl.num_programs(0)
    num_classes = tl.num_programs(2)
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, low, squares, count, last = moments(
        x, order, offsets, arrived, part_mean, part_low, part_squares, stride_row, stride_col, cols, block, part, c,
        C, num_parts, 1, BLOCK_R, BLOCK_C, BLOCK_P,
    )  # fmt: skip
    if last:
        _finish_columns(
            mean, low, squares, count, cols, c, block, num_blocks, C, eps_var, gamma, threshold, threshold_at,
            centroids, variances, batches, least_of_centroid, least_of_variance,
            center_out, low_out, slope_out, block_penalty, block_mse, block_stuck, HINGE,
        )  # fmt: skip
        add_up(
            offsets, arrived, block_penalty, block_mse, penalty_out, mse_out, rob_out, intra_out, weight_out,
            c, num_blocks, num_classes, 1, block_stuck, batches, BLOCK_K,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- launchers


def _forward_shapes(x, order, offsets, centroids, *rest):
    num_classes = centroids.shape[0]
    shapes = ((), (), (num_classes,), (num_classes,), (), centroids.shape, centroids.shape)
    low = x.new_empty(centroids.shape, dtype=torch.bfloat16)
    return *(x.new_empty(shape, dtype=torch.float32) for shape in shapes), low


@operator(
    "centroid_variance_forward(Tensor x, Tensor order, Tensor offsets, Tensor(a!) centroids, Tensor(b!) variances, "
    "Tensor(c!) batches, Tensor? threshold_at, float threshold, float eps_var, float gamma, float least_of_centroid, "
    "float least_of_variance, str hinge) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_shapes,
)
def centroid_variance_forward(
    x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor, variances: Tensor, batches: Tensor,
    threshold_at: Tensor | None, threshold: float, eps_var: float, gamma: float, least_of_centroid: float,
    least_of_variance: float, hinge: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``x [B, C]`` to both losses, ``penalty, mse [K]``; for the backward ``Σ M_c``, ``center, slope, low [K, C]``.

    ``centroids, variances [K, C]`` and ``batches [K]`` are moved. The threshold is read from ``threshold_at`` where
    that is given.
    """
    result = _forward_shapes(x, order, offsets, centroids)
    rob, intra, penalty, mse, weight, center, slope, low = result
    num_classes, columns = center.shape
    sizes = tuned("centroid_variance_forward", blocks(x))
    column_blocks = triton.cdiv(columns, sizes.BLOCK_C)
    parts = parts_of(x, num_classes, column_blocks)
    # Each in memory of its own: Triton compiles another version for a pointer that is not aligned to 16 bytes.
    of_blocks = (x.new_empty((num_classes, column_blocks), dtype=torch.float32) for _ in range(3))
    part_shape = (num_classes, parts, columns) if parts > 1 else (0,)
    # All of them fp32: a distance to a centroid, unlike one to the mean, does not forgive what the mean has lost.
    part_moments = (x.new_empty(part_shape, dtype=torch.float32) for _ in range(3))
    arrived = x.new_zeros(num_classes * (column_blocks + 1) + 1, dtype=torch.int32)
    launch(
        centroid_forward_kernel, (column_blocks, parts, num_classes), x.device,
        x, order, offsets, centroids, variances, batches, threshold_at, arrived, *part_moments, *of_blocks,
        center, low, slope, penalty, mse, rob, intra, weight,
        *x.stride(), columns, parts, eps_var, gamma, threshold, least_of_centroid, least_of_variance,
        HINGE=hinge, BLOCK_P=4, BLOCK_K=64, **sizes._asdict(), **ALL_REGISTERS,
    )  # fmt: skip
    for moved in (centroids, variances, batches):
        torch.autograd.graph.increment_version(moved)  # autograd does not see what a kernel writes
    return result


# ------------------------------------------------------------------------------------------------- autograd.Function


class _CentroidVariance(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx, x, order, offsets, centroids, variances, batches, threshold, momentum, eps_var, gamma, hinge):
        at, number = (threshold, 0.0) if isinstance(threshold, Tensor) else (None, threshold)
        rob, intra, penalty, mse, *kept = centroid_variance_forward(
            x, order, offsets, centroids, variances, batches, at, number, eps_var, gamma, *least_shares(momentum), hinge
        )
        ctx.save_for_backward(x, order, offsets, *kept)
        ctx.mark_non_differentiable(intra, mse)
        ctx.set_materialize_grads(False)
        return rob, intra, penalty, mse

    @staticmethod
    @custom_bwd(device_type="cuda")
    @once_differentiable
    def backward(ctx, rob, intra, penalty, mse):
        if rob is None and penalty is None:
            return (None,) * 11
        return class_variance_backward(*ctx.saved_tensors, rob, None, penalty, None, 1), *(None,) * 10


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
    result: tuple[Tensor, ...] = _CentroidVariance.apply(
        features, groups.order, groups.offsets, *running, threshold, momentum, eps_var, gamma, hinge
    )
    return result
