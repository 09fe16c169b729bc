"""The kernels of variances: features read once forward; read and written once backward.

Per class ``c`` and column, with ``n`` samples, ``μ`` the batch's mean or a running centroid, and ``v`` the unbiased or
the running variance,

    v = Σ (x − mean)² / (n − 1)        or        v ← v + .1 (Σ (x − mean)² / n + (mean − μ)² − v)
    penalty_c = mean over columns of cost(v)          rob = Σ_c n_c penalty_c / Σ_c n_c
    ∂x = (x − μ) · (2 / C) (cost'(v) ∂penalty_c / (n − 1) + ∂mse_c / n)

Forward, a program owns a class (or a part of its rows) and a block of columns, walks the rows through ``order`` and
merges chunk after chunk into a running mean and sum of squared deviations (Chan, Golub and LeVeque 1979, which never
subtracts two large sums). The last program of a block merges its parts and finishes its columns, the last of a class
adds up its blocks, and the last of all adds up the classes, each in a fixed order: one launch. Running moments are
moved by whoever finishes a block, before anybody can have counted the batch: all blocks of a class have come then. Only
the last of a class knows whether the batch is an outlier, see :func:`cem_kernels.variance.running.judged`; it then puts
back what the others have moved.

It reads ``B·C`` features and writes ``K·C`` centers and slopes (fp32) and ``low`` (bf16), for the backward; with
running moments it reads and writes ``2·K·C`` numbers in fp32 more, and writes the ``K·C`` variances that it found,
which are read again where an outlier is taken back. Backward, a program owns the same piece, reads
features and statistics and writes ``B·C`` gradients in the features' dtype.

Where classes are far tighter than their means are large, ``x − mean`` is no better than the last bit of the mean. So
the mean is carried as two numbers, ``mean + low``, and the second goes to the backward in bf16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cem_kernels.triton_utils import last_to_arrive, log1p
from cem_kernels.variance import running

OUTLIER, OF_A_SAMPLE = tl.constexpr(running.OUTLIER), tl.constexpr(running.OF_A_SAMPLE)
OUTGROWN, EARLY, PATIENCE = (tl.constexpr(each) for each in (running.OUTGROWN, running.EARLY, running.PATIENCE))
VARIANCES_MOVE = tl.constexpr(running.VARIANCES_MOVE)


@triton.jit
def rows_of_part(offsets, c, part, num_parts, BLOCK_R: tl.constexpr):
    """First sorted row, end of the part's rows (both from the class's first), and the class's number of rows."""
    start = tl.load(offsets + c)
    count = tl.load(offsets + c + 1) - start
    rows = tl.cdiv(tl.cdiv(count, num_parts), BLOCK_R) * BLOCK_R
    low = tl.minimum(part * rows, count)
    return start, low, tl.minimum(low + rows, count), count


@triton.jit
def cost_and_slope(variance, threshold_at, threshold, floor, gamma, PENALTY: tl.constexpr):
    """The penalty's value at ``variance``, and its slope with respect to it."""
    if threshold_at is not None:  # a tensor: it may change between two replays of a captured graph
        threshold = tl.load(threshold_at)
    floored = tl.where(variance < floor, floor, variance)  # not their maximum, which would hide a NaN
    if PENALTY == "nats":  # gamma is one over the variance of the noise
        ratio = floored * gamma
        value = 0.5 * log1p(ratio)
        slope = 0.5 * gamma * (1.0 / (1.0 + ratio))
    else:
        height = tl.log(floored + gamma) - tl.log(threshold + gamma)
        value = tl.where(height <= 0.0, 0.0, height)
        if PENALTY == "relu":
            risen = tl.where(height > 0.0, 1.0, 0.0)
        else:
            small = tl.exp(-tl.abs(height))
            value += log1p(small)
            risen = tl.where(height >= 0.0, 1.0, small) / (1.0 + small)
        slope = risen / (floored + gamma)
    slope = tl.where(variance < floor, 0.0, slope)  # below the floor there is no gradient
    return value, slope


@triton.jit
def lerp(old, new, share):
    """``old + share (new − old)``, exactly ``new`` where all of it is taken."""
    step = new - old
    return tl.where(share < 0.5, old + share * step, new - step * (1.0 - share))


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


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
def _moments(
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
def losses(
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
def judged(around, zero, known_around, known_zero, count, unit, batches, ignored, counts):
    """``running.judged`` of one class: whether it moves, and what batches and ignored are afterward.

    ``counts``: it has a sample, and all that would be kept is finite.
    """
    limit = OUTLIER + OF_A_SAMPLE / tl.sqrt(tl.maximum(count, 1).to(tl.float32))
    outlier = counts & (batches >= EARLY) & (around + unit > limit * (known_around + unit))
    moves = counts & (outlier == 0)
    row = tl.where(moves, 0, ignored + tl.where(outlier, 1, 0))
    far = OUTGROWN * limit
    outgrown = (far * (around + unit) < known_around + unit) | (far * (zero + unit) < known_zero + unit)
    anew = (moves & (batches > 0) & (batches < 2 * EARLY) & outgrown) | (outlier & (row >= PATIENCE))
    return moves, tl.where(anew, 0, batches + tl.where(moves, 1, 0)), row


@triton.jit
def _judge(
    offsets, block_spread, centroids, variances, batches, ignored, center, old_variance, c, num_blocks, num_classes, C,
    min_samples, unit, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the batch is for the moments of a class, whose blocks have all come: ``running.judged``.

    Where they are not to move, its columns are put back as they were. The others' writes of the same columns come
    before these, as they do before the reads: each was done before its program arrived, and this one has arrived last.
    """
    count = tl.load(offsets + c + 1) - tl.load(offsets + c)
    before = tl.load(batches + c)
    row = tl.load(ignored + c)
    shares = block_spread + c.to(tl.int64) * num_blocks
    kind = num_classes.to(tl.int64) * num_blocks  # from sums of one kind to those of the next
    around = _sum_of_blocks(shares, num_blocks, BLOCK)
    zero = _sum_of_blocks(shares + kind, num_blocks, BLOCK)
    known_around = _sum_of_blocks(shares + 2 * kind, num_blocks, BLOCK)
    known_zero = _sum_of_blocks(shares + 3 * kind, num_blocks, BLOCK)
    present = count >= min_samples
    moves, after, row = judged(
        around, zero, known_around, known_zero, count, unit, before, row, present & is_finite(around)
    )  # where that is finite, all is that fp32 would keep
    if present & (moves == 0) & (before > 0):  # of a class without a batch nothing is looked at
        at = c.to(tl.int64) * C
        for first in range(0, C, BLOCK):  # few at a time: it is rare, and registers are dear
            cols = first + tl.arange(0, BLOCK)
            tl.store(centroids + at + cols, tl.load(center + at + cols, mask=cols < C), mask=cols < C)
            tl.store(variances + at + cols, tl.load(old_variance + at + cols, mask=cols < C), mask=cols < C)
    tl.debug_barrier()  # every thread has read what one is about to write
    tl.store(batches + c, after)
    tl.store(ignored + c, row)


@triton.jit
def _add_up(
    offsets, arrived, block_penalty, block_mse, penalty_out, mse_out, rob_out, intra_out, weight_out, c, num_blocks,
    num_classes, min_samples, block_spread, centroids, variances, batches, ignored, center, old_variance, C, unit,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The last block of a class adds up the class and judges the batch, the last class adds up the losses."""
    of_class = c.to(tl.int64) * num_blocks
    arrived += num_classes.to(tl.int64) * num_blocks
    if last_to_arrive(arrived + c, num_blocks):
        tl.store(penalty_out + c, _sum_of_blocks(block_penalty + of_class, num_blocks, BLOCK))
        tl.store(mse_out + c, _sum_of_blocks(block_mse + of_class, num_blocks, BLOCK))
        if batches is not None:
            _judge(
                offsets, block_spread, centroids, variances, batches, ignored, center, old_variance, c, num_blocks,
                num_classes, C, min_samples, unit, BLOCK,
            )  # fmt: skip
        if last_to_arrive(arrived + num_classes, num_classes):
            losses(offsets, penalty_out, mse_out, rob_out, intra_out, weight_out, num_classes, min_samples, BLOCK)


@triton.jit
def _finish_columns(
    mean, low, squares, count, cols, c, block, num_blocks, num_classes, C, min_samples, threshold_at, threshold, floor,
    gamma, centroids, variances, batches, of_centroid,
    center_out, low_out, slope_out, old_variance_out, penalty_out, mse_out, spread_out, PENALTY: tl.constexpr,
):  # fmt: skip
    """A block of columns of a class: its running moments moved, its share of penalty and mse, and the slope.

    ``spread_out [4, K, blocks]``: its share of what the batch and the running moments show, see :func:`_judge`.
    """
    at = c.to(tl.int64) * C + cols
    live = cols < C
    counts = cols < tl.where(count >= min_samples, C, 0)
    n = tl.maximum(count, 1).to(tl.float32)
    one_less = tl.maximum(n - 1.0, 1.0)
    mse = squares / n
    share = c.to(tl.int64) * num_blocks + block
    if centroids is None:
        center = mean
        remainder = low
        value, slope = cost_and_slope(squares / one_less, threshold_at, threshold, floor, gamma, PENALTY)
    else:
        before = tl.load(batches + c)
        center = tl.where(before > 0, tl.load(centroids + at, mask=live, other=0.0), mean)
        remainder = tl.where(before > 0, 0.0, low)  # of a centroid that is the batch's own mean
        away = tl.where(before > 0, (mean - center) + low, 0.0)
        moved = lerp(center, mean, of_centroid)
        old = tl.load(variances + at, mask=live, other=0.0)
        around = mse + away * away
        variance = tl.where(before > 0, lerp(old, around, VARIANCES_MOVE), around)
        value, slope = cost_and_slope(variance, threshold_at, threshold, floor, gamma, PENALTY)
        slope *= one_less / n  # the backward divides by n − 1
        moves = counts & is_finite(moved) & is_finite(variance)
        tl.debug_barrier()  # whoever holds a copy of a column has read it
        tl.store(centroids + at, moved, mask=moves)
        tl.store(variances + at, variance, mask=moves)
        tl.store(old_variance_out + at, old, mask=live)
        kind = num_classes.to(tl.int64) * num_blocks
        tl.store(spread_out + share, tl.sum(tl.where(counts, around, 0.0), axis=0) / C)
        tl.store(spread_out + share + kind, tl.sum(tl.where(counts, mean * mean + mse, 0.0), axis=0) / C)
        tl.store(spread_out + share + 2 * kind, tl.sum(old, axis=0) / C)
        tl.store(spread_out + share + 3 * kind, tl.sum(tl.where(live, center * center + old, 0.0), axis=0) / C)
    tl.store(center_out + at, center, mask=live)
    tl.store(low_out + at, remainder.to(low_out.dtype.element_ty), mask=live)
    tl.store(slope_out + at, slope, mask=live)
    tl.store(penalty_out + share, tl.sum(tl.where(counts, value, 0.0), axis=0) / C)
    tl.store(mse_out + share, tl.sum(tl.where(counts, mse, 0.0), axis=0) / C)


@triton.jit(do_not_specialize=["num_parts"])
def variance_forward_kernel(
    x, order, offsets, centroids, variances, batches, ignored, threshold_at, arrived,
    part_mean, part_low, part_squares, block_penalty, block_mse, block_spread, old_variance,
    center_out, low_out, slope_out, penalty_out, mse_out, rob_out, intra_out, weight_out,
    stride_row, stride_col, C, num_parts, min_samples, threshold, floor, gamma, unit, of_centroid,
    PENALTY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From features to losses; ``arrived [K·blocks + K + 1]``, zeros, counts who has come to a block, a class, the end.

    ``centroids, variances, batches, ignored`` are None for variances around the batch's means.
    Grid: blocks of columns × parts × classes.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    c = tl.program_id(2)
    num_blocks = tl.num_programs(0)
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, low, squares, count, last = _moments(
        x, order, offsets, arrived, part_mean, part_low, part_squares, stride_row, stride_col, cols, block, part, c,
        C, num_parts, min_samples, BLOCK_R, BLOCK_C, BLOCK_P,
    )  # fmt: skip
    if last:
        _finish_columns(
            mean, low, squares, count, cols, c, block, num_blocks, tl.num_programs(2), C, min_samples, threshold_at,
            threshold, floor, gamma, centroids, variances, batches, of_centroid,
            center_out, low_out, slope_out, old_variance, block_penalty, block_mse, block_spread, PENALTY,
        )  # fmt: skip
        _add_up(
            offsets, arrived, block_penalty, block_mse, penalty_out, mse_out, rob_out, intra_out, weight_out,
            c, num_blocks, tl.num_programs(2), min_samples, block_spread, centroids, variances, batches, ignored,
            center_out, old_variance, C, unit, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_samples", "num_parts", "stride_penalty", "stride_mse", "min_samples"])
def variance_backward_kernel(
    x, order, offsets, center, low, slope, weight, grad_rob, grad_intra, grad_penalty, grad_mse, dx,
    stride_row, stride_col, stride_penalty, stride_mse, num_samples, C, num_parts, min_samples,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dx = (x − center − low) · coefficient``, zeros for what does not count; ``dx [B, C]`` is contiguous.

    The mean's own gradient vanishes, because deviations sum to zero. Upstream gradients may be None.
    Grid: blocks of columns × parts × classes.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    c = tl.program_id(2)
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    num_classes = tl.num_programs(2)
    # Samples of no class come last in the order.
    for row in range(tl.load(offsets + num_classes) + c * num_parts + part, num_samples, num_parts * num_classes):
        place = dx + tl.load(order + row).to(tl.int64) * C + cols
        tl.store(place, tl.zeros([BLOCK_C], dx.dtype.element_ty), mask=cols < C)
    start, begin, end, count = rows_of_part(offsets, c, part, num_parts, BLOCK_R)
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
    at = c.to(tl.int64) * C + cols
    known = cols < tl.where(count >= min_samples, C, 0)
    middle = tl.load(center + at, mask=known, other=0.0)
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
        deviation = (features.to(tl.float32) - middle[None, :]) - remainder[None, :]
        gradient = tl.where(read, deviation * coefficient[None, :], 0.0)
        tl.store(dx + sample * C + columns, gradient.to(dx.dtype.element_ty), mask=inside)
