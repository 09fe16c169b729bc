"""Class variance over a log threshold in Triton: features read once forward; read and written once backward.

Forward, a program takes one class (or a part of its rows) and a block of columns, walks the rows through ``order`` and
merges chunk after chunk into a running mean and sum of squared deviations (Chan, Golub and LeVeque 1979, which never
subtracts two large sums). The last program of a block merges its parts, the last of a class adds up its blocks, and the
last of all adds up the classes, each in a fixed order: one launch. For the backward a class's ``mean`` and the hinge's
``slope`` with respect to the variance are kept, ``[K, C]`` each; it is one multiplication an element then.

Where classes are far tighter than their means are large, ``x − mean`` is no better than the last bit of the mean. So
the mean is carried as two numbers, ``mean + low``, and the second goes to the backward in bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from cem_kernels.class_variance.kernels import add_up, moments, penalized, rows_of_part
from cem_kernels.groups import ClassGroups
from cem_kernels.launching import ALL_REGISTERS, launch, operator, processors, splits_per_class, tuned

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _finish_columns(
    mean, low, squares, count, cols, c, block, num_blocks, C, eps_var, gamma, threshold, threshold_at, min_samples,
    mean_out, low_out, slope_out, penalty_out, mse_out, HINGE: tl.constexpr,
):  # fmt: skip
    """A block of columns of a class, from its moments to the block's share of penalty and mse, and the slope."""
    live = cols < C
    n = count.to(tl.float32)
    variance = squares / tl.maximum(n - 1.0, 1.0)
    value, slope = penalized(variance, eps_var, gamma, threshold, threshold_at, HINGE)
    counts = cols < tl.where(count >= min_samples, C, 0)
    out = c.to(tl.int64) * C + cols
    tl.store(mean_out + out, mean, mask=live)
    tl.store(low_out + out, low.to(low_out.dtype.element_ty), mask=live)
    tl.store(slope_out + out, slope, mask=live)
    share = c.to(tl.int64) * num_blocks + block
    tl.store(penalty_out + share, tl.sum(tl.where(counts, value, 0.0), axis=0) / C)
    tl.store(mse_out + share, tl.sum(tl.where(counts, squares / tl.maximum(n, 1.0), 0.0), axis=0) / C)


@triton.jit(do_not_specialize=["num_parts"])
def variance_forward_kernel(
    x, order, offsets, threshold_at, arrived, part_mean, part_low, part_squares, block_penalty, block_mse,
    mean_out, low_out, slope_out, penalty_out, mse_out, rob_out, intra_out, weight_out,
    stride_row, stride_col, C, num_parts, eps_var, gamma, threshold, min_samples,
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
        C, num_parts, min_samples, BLOCK_R, BLOCK_C, BLOCK_P,
    )  # fmt: skip
    if last:
        _finish_columns(
            mean, low, squares, count, cols, c, block, num_blocks, C, eps_var, gamma, threshold, threshold_at,
            min_samples, mean_out, low_out, slope_out, block_penalty, block_mse, HINGE,
        )  # fmt: skip
        add_up(
            offsets, arrived, block_penalty, block_mse, penalty_out, mse_out, rob_out, intra_out, weight_out,
            c, num_blocks, num_classes, min_samples, None, None, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts", "stride_penalty", "stride_mse", "min_samples"])
def variance_backward_kernel(
    x, order, offsets, mean, low, slope, weight, grad_rob, grad_intra, grad_penalty, grad_mse, dx,
    stride_row, stride_col, stride_penalty, stride_mse, C, num_parts, min_samples,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dx = (x − mean − low) · coefficient``, zeros for classes that do not count; ``dx [B, C]`` is contiguous.

    The mean's own gradient vanishes, because deviations sum to zero. Upstream gradients may be None.
    Grid: blocks of columns × parts × classes.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    c = tl.program_id(2)
    start, begin, end, count = rows_of_part(offsets, c, part, num_parts, BLOCK_R)
    qualifies = count >= min_samples
    n = count.to(tl.float32)
    share = n / tl.maximum(tl.load(weight), 1.0)
    penalty = 0.0
    mse = 0.0
    if grad_rob is not None:
        penalty += tl.load(grad_rob).to(tl.float32) * share
    if grad_penalty is not None:
        penalty += tl.load(grad_penalty + c.to(tl.int64) * stride_penalty).to(tl.float32)
    if grad_intra is not None:
        mse += tl.load(grad_intra).to(tl.float32) * share
    if grad_mse is not None:
        mse += tl.load(grad_mse + c.to(tl.int64) * stride_mse).to(tl.float32)
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    at = c.to(tl.int64) * C + cols
    known = cols < tl.where(qualifies, C, 0)
    center = tl.load(mean + at, mask=known, other=0.0)
    remainder = tl.load(low + at, mask=known, other=0.0).to(tl.float32)
    steepness = tl.load(slope + at, mask=known, other=0.0)
    coefficient = 2.0 / C * (steepness * (penalty / tl.maximum(n - 1.0, 1.0)) + mse / tl.maximum(n, 1.0))
    columns = cols[None, :].to(tl.int64)
    for first in range(begin, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        sample = tl.load(order + start + rows, mask=rows < end, other=0)[:, None].to(tl.int64)
        inside = (rows < end)[:, None] & (cols < C)[None, :]
        # Masked, not multiplied by zero: what does not count may be infinite.
        read = (rows < end)[:, None] & known[None, :]
        features = tl.load(x + sample * stride_row + columns * stride_col, mask=read, other=0.0)
        deviation = (features.to(tl.float32) - center[None, :]) - remainder[None, :]
        gradient = tl.where(read, deviation * coefficient[None, :], 0.0)
        tl.store(dx + sample * C + columns, gradient.to(dx.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------------------- launchers

WARP_BYTES = 512
# Programs of one warp that fill a multiprocessor; fewer rows than this are not worth splitting.
PROGRAMS_PER_PROCESSOR, ROWS_PER_PART = 16, 64


class Blocks(NamedTuple):
    """Sizes that the kernels over rows are compiled for. They follow width and dtype, never the batch."""

    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


def blocks(x: Tensor) -> Blocks:
    """A warp reads 512 bytes of a row, and a thread holds all rows of its columns: no reduction crosses warps."""
    return Blocks(16, min(WARP_BYTES // x.element_size(), max(16, triton.next_power_of_2(x.shape[1]))), 1)


def parts_of(x: Tensor, num_classes: int, column_blocks: int) -> int:
    programs = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(x.device), column_blocks)
    return splits_per_class(triton.cdiv(x.shape[0], ROWS_PER_PART), num_classes, programs)


def _forward_shapes(x, order, offsets, *rest):
    num_classes, columns = offsets.shape[0] - 1, x.shape[1]
    per_class, per_column = (num_classes,), (num_classes, columns)
    shapes = ((), (), per_class, per_class, (), per_column, per_column)
    low = x.new_empty(per_column, dtype=torch.bfloat16)
    return *(x.new_empty(shape, dtype=torch.float32) for shape in shapes), low


@operator(
    "class_variance_forward(Tensor x, Tensor order, Tensor offsets, Tensor? threshold_at, float threshold, "
    "float eps_var, float gamma, int min_samples, str hinge) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_shapes,
)
def class_variance_forward(
    x: Tensor, order: Tensor, offsets: Tensor, threshold_at: Tensor | None, threshold: float, eps_var: float,
    gamma: float, min_samples: int, hinge: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``x [B, C]`` to both losses, ``penalty, mse [K]``; for the backward ``Σ M_c``, ``mean, slope, low [K, C]``.

    The threshold is read from ``threshold_at`` where that is given.
    """
    result = _forward_shapes(x, order, offsets)
    rob, intra, penalty, mse, weight, mean, slope, low = result
    num_classes, columns = mean.shape
    sizes = tuned("class_variance_forward", blocks(x))
    column_blocks = triton.cdiv(columns, sizes.BLOCK_C)
    parts = parts_of(x, num_classes, column_blocks)
    # Each in memory of its own: Triton compiles another version for a pointer that is not aligned to 16 bytes.
    block_penalty, block_mse = (x.new_empty((num_classes, column_blocks), dtype=torch.float32) for _ in range(2))
    part_shape = (num_classes, parts, columns) if parts > 1 else (0,)
    part_moments = (x.new_empty(part_shape, dtype=of.dtype) for of in (mean, low, slope))
    arrived = x.new_zeros(num_classes * (column_blocks + 1) + 1, dtype=torch.int32)
    launch(
        variance_forward_kernel, (column_blocks, parts, num_classes), x.device,
        x, order, offsets, threshold_at, arrived, *part_moments, block_penalty, block_mse,
        mean, low, slope, penalty, mse, rob, intra, weight,
        *x.stride(), columns, parts, eps_var, gamma, threshold, min_samples,
        HINGE=hinge, BLOCK_P=4, BLOCK_K=64, **sizes._asdict(), **ALL_REGISTERS,
    )  # fmt: skip
    return result


@operator(
    "class_variance_backward(Tensor x, Tensor order, Tensor offsets, Tensor weight, Tensor mean, Tensor slope, "
    "Tensor low, Tensor? grad_rob, Tensor? grad_intra, Tensor? grad_penalty, Tensor? grad_mse, int min_samples) "
    "-> Tensor",
    fake=lambda x, *rest: x.new_empty(x.shape),
)
def class_variance_backward(
    x: Tensor, order: Tensor, offsets: Tensor, weight: Tensor, mean: Tensor, slope: Tensor,
    low: Tensor, grad_rob: Tensor | None, grad_intra: Tensor | None, grad_penalty: Tensor | None,
    grad_mse: Tensor | None, min_samples: int,
) -> Tensor:  # fmt: skip
    """The gradient of ``x [B, C]``, contiguous, in its dtype."""
    dx = x.new_empty(x.shape)
    num_classes, columns = mean.shape
    sizes = tuned("class_variance_backward", blocks(x))
    column_blocks = triton.cdiv(columns, sizes.BLOCK_C)
    parts = parts_of(x, num_classes, column_blocks)
    launch(
        variance_backward_kernel, (column_blocks, parts, num_classes), x.device,
        x, order, offsets, mean, low, slope, weight, grad_rob, grad_intra, grad_penalty, grad_mse, dx,
        *x.stride(), *(g.stride(0) if g is not None else 0 for g in (grad_penalty, grad_mse)),
        columns, parts, min_samples, **sizes._asdict(),
    )  # fmt: skip
    return dx


# ------------------------------------------------------------------------------------------------- autograd.Function


class _ClassVariance(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx, x, order, offsets, threshold, eps_var, gamma, min_samples, hinge):
        at, number = (threshold, 0.0) if isinstance(threshold, Tensor) else (None, threshold)
        rob, intra, penalty, mse, *kept = class_variance_forward(
            x, order, offsets, at, number, eps_var, gamma, min_samples, hinge
        )
        ctx.save_for_backward(x, order, offsets, *kept)
        ctx.min_samples = min_samples
        ctx.set_materialize_grads(False)
        return rob, intra, penalty, mse

    @staticmethod
    @custom_bwd(device_type="cuda")
    @once_differentiable
    def backward(ctx, *grads):
        if all(grad is None for grad in grads):
            return (None,) * 8
        return class_variance_backward(*ctx.saved_tensors, *grads, ctx.min_samples), *(None,) * 7


def class_variance(
    features: Tensor,
    groups: ClassGroups,
    threshold: float | Tensor,
    eps_var: float,
    gamma: float,
    min_samples: int,
    hinge: str,
) -> tuple[Tensor, ...]:
    """``features [B, C]`` to ``(rob_loss, intra_mse, penalty [K], mse [K])``, differentiable once in the features."""
    result: tuple[Tensor, ...] = _ClassVariance.apply(
        features, groups.order, groups.offsets, threshold, eps_var, gamma, min_samples, hinge
    )
    return result
