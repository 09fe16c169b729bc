"""What kernels of variances share: a class's moments, the hinge, and how blocks and classes are added up."""

from __future__ import annotations

import triton
import triton.language as tl

from cem_kernels.kernel_math import last_to_arrive, log1p


@triton.jit
def rows_of_part(offsets, c, part, num_parts, BLOCK_R: tl.constexpr):
    """First sorted row, end of the part's rows (both from the class's first), and the class's number of rows."""
    start = tl.load(offsets + c)
    count = tl.load(offsets + c + 1) - start
    rows = tl.cdiv(tl.cdiv(count, num_parts), BLOCK_R) * BLOCK_R
    low = tl.minimum(part * rows, count)
    return start, low, tl.minimum(low + rows, count), count


@triton.jit
def penalized(variance, eps_var, gamma, threshold, threshold_at, HINGE: tl.constexpr):
    """The hinge's value at ``variance``, and its slope with respect to it."""
    if threshold_at is not None:  # a tensor: it may change between two replays of a captured graph
        threshold = tl.load(threshold_at)
    floored = tl.where(variance < eps_var, eps_var, variance)  # not their maximum, which would hide a NaN
    height = tl.log(floored + gamma) - tl.log(threshold + gamma)
    if HINGE == "relu":
        risen = tl.where(height > 0.0, 1.0, 0.0)
        value = tl.where(height <= 0.0, 0.0, height)
    elif HINGE == "softplus":
        small = tl.exp(-tl.abs(height))
        value = tl.where(height <= 0.0, 0.0, height) + log1p(small)
        risen = tl.where(height >= 0.0, 1.0, small) / (1.0 + small)
    else:
        value = height
        risen = tl.full(height.shape, 1.0, tl.float32)
    slope = tl.where(variance < eps_var, 0.0, risen / (floored + gamma))  # below the floor there is no gradient
    return value, slope


@triton.jit
def _merge_parts(
    part_mean, part_low, part_squares, count, rows, cols, c, num_parts, C, min_samples,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The parts of a class, of ``rows`` each but the last ones, in their order, to its mean, its low and its squares.

    ``mean = mean_0 + Σ n_i (mean_i − mean_0) / n`` and ``squares = Σ squares_i + n_i (mean_i − mean)²``.
    """
    filled = tl.where(count >= min_samples, tl.cdiv(count, tl.maximum(rows, 1)), 0)
    base = c.to(tl.int64) * num_parts * C + cols
    n = tl.maximum(count, 1).to(tl.float32)
    origin = tl.load(part_mean + base, mask=cols < tl.where(filled > 0, C, 0), other=0.0)
    away = tl.zeros([BLOCK_C], tl.float32)  # of the mean from the first part's
    for first in range(0, filled, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        inside = (part < filled)[:, None] & (cols < C)[None, :]
        at = base[None, :] + part[:, None].to(tl.int64) * C
        share = tl.minimum(count - part * rows, rows).to(tl.float32) / n
        difference = tl.load(part_mean + at, mask=inside, other=0.0) - origin[None, :]
        difference += tl.load(part_low + at, mask=inside, other=0.0)
        away += tl.sum(tl.where(inside, difference * share[:, None], 0.0), axis=0)
    mean = origin + away
    low = away - (mean - origin)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, filled, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        inside = (part < filled)[:, None] & (cols < C)[None, :]
        at = base[None, :] + part[:, None].to(tl.int64) * C
        size = tl.minimum(count - part * rows, rows).to(tl.float32)
        difference = tl.load(part_mean + at, mask=inside, other=0.0) - mean[None, :]
        difference += tl.load(part_low + at, mask=inside, other=0.0) - low[None, :]
        within = tl.load(part_squares + at, mask=inside, other=0.0)
        squares += tl.sum(within + tl.where(inside, difference * difference * size[:, None], 0.0), axis=0)
    return mean, low, squares


@triton.jit
def moments(
    x, order, offsets, arrived, part_mean, part_low, part_squares, stride_row, stride_col, cols, block, part, c,
    C, num_parts, min_samples, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean, low and sum of squared deviations of a block of columns of a class, from a part of its rows.

    Also the class's number of rows, and whether this program is the one that has come to know all of its parts: only
    what that one returns is the class's.
    """
    start, begin, end, count = rows_of_part(offsets, c, part, num_parts, BLOCK_R)
    end = tl.where(count >= min_samples, end, begin)  # nothing is read of a class that does not count
    columns = x + cols[None, :].to(tl.int64) * stride_col
    mean = tl.zeros([BLOCK_C], tl.float32)
    low = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for first in range(begin, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        sample = tl.load(order + start + rows, mask=rows < end, other=0)
        inside = (rows < end)[:, None] & (cols < C)[None, :]
        chunk = tl.load(columns + sample[:, None].to(tl.int64) * stride_row, mask=inside, other=0.0).to(tl.float32)
        before = (first - begin).to(tl.float32)
        new = tl.minimum(end - first, BLOCK_R).to(tl.float32)
        chunk_mean = tl.sum(chunk, axis=0) / new
        deviation = tl.where(inside, chunk - chunk_mean[None, :], 0.0)
        chunk_low = tl.sum(deviation, axis=0) / new  # what rounding took from the chunk's mean
        # The first chunk's mean is no step away from a mean of nothing.
        step = tl.where(before > 0.0, (chunk_mean - mean) + (chunk_low - low), 0.0)
        share = new / (before + new)
        squares += tl.sum(deviation * deviation, axis=0) - new * chunk_low * chunk_low + step * step * (before * share)
        old = tl.where(before > 0.0, mean, chunk_mean)
        mean = old + step * share
        low = tl.where(before > 0.0, low, chunk_low) + (step * share - (mean - old))
    last = True
    if num_parts > 1:
        out = (c.to(tl.int64) * num_parts + part) * C + cols
        tl.store(part_mean + out, mean, mask=cols < C)
        tl.store(part_low + out, low.to(part_low.dtype.element_ty), mask=cols < C)
        tl.store(part_squares + out, squares, mask=cols < C)
        last = last_to_arrive(arrived + c.to(tl.int64) * tl.num_programs(0) + block, num_parts)
        if last:
            _, first_row, end_of_first, _ = rows_of_part(offsets, c, 0, num_parts, BLOCK_R)
            mean, low, squares = _merge_parts(
                part_mean, part_low, part_squares, count, end_of_first - first_row, cols, c, num_parts, C, min_samples,
                BLOCK_C, BLOCK_P,
            )  # fmt: skip
    return mean, low, squares, count, last


@triton.jit
def _sum_of_blocks(shares, num_blocks, BLOCK: tl.constexpr):
    """The sum of ``num_blocks`` numbers, in their order."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        total += tl.load(shares + block, mask=block < num_blocks, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _losses(
    offsets, penalty, mse, rob_out, intra_out, weight_out, num_classes, min_samples, BLOCK: tl.constexpr,
):  # fmt: skip
    """Classes ``[K]`` to both losses and ``Σ M_c``."""
    rob = tl.zeros([BLOCK], tl.float32)
    intra = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_classes, BLOCK):
        c = first + tl.arange(0, BLOCK)
        live = c < num_classes
        count = tl.load(offsets + c + 1, mask=live, other=0) - tl.load(offsets + c, mask=live, other=0)
        weight = tl.where(count >= min_samples, count, 0).to(tl.float32)
        rob += weight * tl.load(penalty + c, mask=live, other=0.0)
        intra += weight * tl.load(mse + c, mask=live, other=0.0)
        total += weight
    weights = tl.sum(total, axis=0)
    tl.store(rob_out, tl.sum(rob, axis=0) / tl.maximum(weights, 1.0))
    tl.store(intra_out, tl.sum(intra, axis=0) / tl.maximum(weights, 1.0))
    tl.store(weight_out, weights)


@triton.jit
def add_up(
    offsets, arrived, block_penalty, block_mse, penalty_out, mse_out, rob_out, intra_out, weight_out,
    c, num_blocks, num_classes, min_samples, block_stuck, batches, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last block of a class adds up the class, the last class the losses.

    ``batches [K]``, where it is given, counts one more for a class of which no column is stuck.
    """
    of_class = c.to(tl.int64) * num_blocks
    arrived += num_classes.to(tl.int64) * num_blocks
    if last_to_arrive(arrived + c, num_blocks):
        tl.store(penalty_out + c, _sum_of_blocks(block_penalty + of_class, num_blocks, BLOCK))
        tl.store(mse_out + c, _sum_of_blocks(block_mse + of_class, num_blocks, BLOCK))
        if batches is not None:
            stuck = _sum_of_blocks(block_stuck + of_class, num_blocks, BLOCK)
            tl.store(batches + c, tl.load(batches + c) + tl.where(stuck == 0.0, 1, 0))
        if last_to_arrive(arrived + num_classes, num_classes):
            _losses(offsets, penalty_out, mse_out, rob_out, intra_out, weight_out, num_classes, min_samples, BLOCK)
