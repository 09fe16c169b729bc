"""The kernels of slot variances: features read twice forward; read and written once backward.

Per class with ``M`` samples, slot ``s`` and column ``d``, with slots as they were before the step,

    l_s = log π_s − ½ Σ_d [ (x_d − c_sd)² / (v_sd + σ²) + log(v_sd + σ²) ]        p = softmax over slots (l / √C)
    W_s = Σ p_s        u_sd = Σ p_s (x_d − c_sd)² / W_s        v ← v + min(.1 S W_s / M, .5) (u − v)
    penalty_c = Σ_s W_s / M · mean over columns of ½ log(1 + v_s / σ²)        rob = Σ_c M_c penalty_c / Σ_c M_c
    ∂x_d = ∂penalty_c Σ_s p_s k_sd (x_d − c_sd)        k_sd = 1 / (C M (v_sd + σ²)), v moved

Forward, a program owns a class, all of it: a batch of few classes keeps few processors busy, and a class of many
samples makes its program long, ``⌈M / 16⌉`` tiles of rows for each of its passes. It looks at everything in tiles of
rows × slots × columns. Who attends to what needs all columns, so a first pass sums distances over them, and a second
one sums squares and steps over rows with the attention that the first has found; in both, distances are differences
squared, never squares multiplied out. What the slots come to is put aside and kept only when all of it is known, finite
and no outlier, see :func:`cem_kernels.variance.running.judged`: nothing is ever taken back. The last class to arrive
adds up the losses in a fixed order: one launch. A class that begins looks at its samples ``S + 3`` times more.

It reads ``B·C`` features, twice where no cache holds them, and ``2·K·S·C`` statistics; it writes these where they move,
and for the backward ``B·S`` attention, in the order of classes, ``center`` and ``coefficient``, ``k`` here, ``K·S·C``
numbers each, and as many thrice that are put aside for a moment. Backward, a program owns a block of columns of a
class, or a part of its rows; it reads features, attention and both statistics and writes ``B·C`` gradients in the
features' dtype.

Memory that a program writes and reads itself is read behind a barrier, and written behind one where another thread
may not have read yet what was there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cem_kernels.slot_variance import running
from cem_kernels.triton_utils import last_to_arrive
from cem_kernels.variance.kernels import (
    VARIANCES_MOVE,
    cost_and_slope,
    is_finite,
    judged,
    lerp,
    losses,
    rows_of_part,
)

CENTROIDS_MOVE, MOST, DEAD = (tl.constexpr(each) for each in (running.CENTROIDS_MOVE, running.MOST, running.DEAD))
TINY = tl.constexpr(2.0**-126)  # the least of what fp32 holds with all digits: of a slot without any, zeros


@triton.jit
def _slots_at(c, cols, S, C, SLOTS: tl.constexpr):
    """Where a block of columns of a class's slots is in ``[K, S, C]``, and which of it there are."""
    slot = tl.arange(0, SLOTS)
    at = (c.to(tl.int64) * S + slot)[:, None] * C + cols[None, :]
    return at, (slot < S)[:, None] & (cols < C)[None, :]


@triton.jit
def _samples(order, start, rows, end):
    return tl.load(order + start + rows, mask=rows < end, other=0).to(tl.int64)


@triton.jit
def _features(x, sample, rows, end, cols, C, stride_row, stride_col):
    inside = (rows < end)[:, None] & (cols < C)[None, :]
    at = sample[:, None] * stride_row + cols[None, :].to(tl.int64) * stride_col
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _attention(attention, start, rows, end, S, SLOTS: tl.constexpr):
    """Where rows of the attention ``[B, S]`` are, and which of it there are."""
    slot = tl.arange(0, SLOTS)
    at = attention + (start + rows).to(tl.int64)[:, None] * S + slot[None, :]
    live = (rows < end)[:, None] & (slot < S)[None, :]
    return at, live


@triton.jit
def _distances(
    x, center, spread, sample, rows, count, c, stride_row, stride_col, seen, S, C, unit,
    SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows, sums over columns: of squares ``[R, S]`` in units of a slot's variance and the noise's, where
    there is a ``spread``, and as they are; and of squared features ``[R]``. Of the first ``seen`` slots alone."""
    scaled = tl.zeros([BLOCK_R, SLOTS], tl.float32)
    plain = tl.zeros([BLOCK_R, SLOTS], tl.float32)
    zero = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, C, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        at, live = _slots_at(c, cols, S, C, SLOTS)
        live = live & (tl.arange(0, SLOTS) < seen)[:, None]
        features = _features(x, sample, rows, count, cols, C, stride_row, stride_col)
        middle = tl.load(center + at, mask=live, other=0.0)
        away = features[:, None, :] - middle[None, :, :]
        plain += tl.sum(away * away, axis=2)
        if spread is not None:
            precision = 1.0 / (tl.load(spread + at, mask=live, other=0.0) + unit)
            scaled += tl.sum(away * away * precision[None, :, :], axis=2)
            zero += tl.sum(features * features, axis=1)
    return scaled, plain, zero


@triton.jit
def _farthest(
    x, order, center, start, count, c, s, stride_row, stride_col, S, C,
    SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Which row of a class is farthest from all of its first ``s`` centers."""
    slot = tl.arange(0, SLOTS)
    most = tl.full([BLOCK_R], -1.0, tl.float32)
    at = tl.zeros([BLOCK_R], tl.int64)
    for first in range(0, count, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        sample = _samples(order, start, rows, count)
        _, plain, _ = _distances(
            x, center, None, sample, rows, count, c, stride_row, stride_col, s, S, C, 0.0, SLOTS, BLOCK_R, BLOCK_C
        )
        near = tl.min(tl.where((slot < s)[None, :], plain, float("inf")), axis=1)
        farther = (near > most) & (rows < count)
        most = tl.where(farther, near, most)
        at = tl.where(farther, rows, at)
    return tl.min(tl.where(most == tl.max(most, axis=0), at, count - 1), axis=0)


@triton.jit
def _begin(
    x, order, attention, center, spread, start, count, c, stride_row, stride_col, S, C,
    SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``reference.first_slots``: ``center`` and ``spread`` of a class that begins. Members are put into ``attention``.

    Means are sums of differences from something near, of which fp32 loses less.
    """
    slot = tl.arange(0, SLOTS)
    n = count.to(tl.float32)
    own = c.to(tl.int64) * S
    nearby = x + tl.load(order + start).to(tl.int64) * stride_row
    for first in range(0, C, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        origin = tl.load(nearby + cols.to(tl.int64) * stride_col, mask=cols < C, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_C], tl.float32)
        for row in range(0, count, BLOCK_R):
            rows = row + tl.arange(0, BLOCK_R)
            each = _samples(order, start, rows, count)
            features = _features(x, each, rows, count, cols, C, stride_row, stride_col)
            total += tl.sum(tl.where((rows < count)[:, None], features - origin[None, :], 0.0), axis=0)
        tl.store(center + own * C + cols, origin + total / n, mask=cols < C)
    for s in range(1, S):
        tl.debug_barrier()
        farthest = _farthest(
            x, order, center, start, count, c, s, stride_row, stride_col, S, C, SLOTS, BLOCK_R, BLOCK_C
        )  # fmt: skip
        chosen = x + tl.load(order + start + farthest).to(tl.int64) * stride_row
        for first in range(0, C, BLOCK_C):
            cols = first + tl.arange(0, BLOCK_C)
            one = tl.load(chosen + cols.to(tl.int64) * stride_col, mask=cols < C, other=0.0).to(tl.float32)
            tl.store(center + (own + s) * C + cols, one, mask=cols < C)
    tl.debug_barrier()
    members = tl.zeros([SLOTS], tl.float32)
    for row in range(0, count, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        sample = _samples(order, start, rows, count)
        _, plain, _ = _distances(
            x, center, None, sample, rows, count, c, stride_row, stride_col, S, S, C, 0.0, SLOTS, BLOCK_R, BLOCK_C
        )
        plain = tl.where((slot < S)[None, :], plain, float("inf"))
        least = tl.min(plain, axis=1)
        nearest = tl.min(tl.where(plain == least[:, None], slot[None, :], SLOTS), axis=1)
        at, live = _attention(attention, start, rows, count, S, SLOTS)
        member = tl.where(live & (slot[None, :] == nearest[:, None]), 1.0, 0.0)
        members += tl.sum(member, axis=0)
        tl.store(at, member, mask=live)
    tl.debug_barrier()
    for first in range(0, C, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        places, known = _slots_at(c, cols, S, C, SLOTS)
        middle = tl.load(center + places, mask=known, other=0.0)
        total = tl.zeros([SLOTS, BLOCK_C], tl.float32)
        for row in range(0, count, BLOCK_R):
            rows = row + tl.arange(0, BLOCK_R)
            sample = _samples(order, start, rows, count)
            features = _features(x, sample, rows, count, cols, C, stride_row, stride_col)
            at, live = _attention(attention, start, rows, count, S, SLOTS)
            member = tl.load(at, mask=live, other=0.0)
            total += tl.sum(member[:, :, None] * (features[:, None, :] - middle[None, :, :]), axis=0)
        middle += total / tl.maximum(members, 1.0)[:, None]
        squares = tl.zeros([SLOTS, BLOCK_C], tl.float32)
        for row in range(0, count, BLOCK_R):
            rows = row + tl.arange(0, BLOCK_R)
            sample = _samples(order, start, rows, count)
            features = _features(x, sample, rows, count, cols, C, stride_row, stride_col)
            at, live = _attention(attention, start, rows, count, S, SLOTS)
            away = tl.load(at, mask=live, other=0.0)[:, :, None] * (features[:, None, :] - middle[None, :, :])
            squares += tl.sum(away * away, axis=0)
        variance = tl.sum(tl.where(known, squares, 0.0), axis=0) / n
        tl.debug_barrier()  # every thread has read the centers that are replaced
        tl.store(center + places, middle, mask=known)
        tl.store(spread + places, tl.broadcast_to(variance[None, :], [SLOTS, BLOCK_C]), mask=known)


@triton.jit
def _found(
    centroids, variances, share, center, spread, before, c, S, C, unit, SLOTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Slots as the step finds them, in ``center`` and ``spread``: of a class that has begun, copies.

    Returns ``Σ log(v + σ²)`` of each slot and what the slots know of their class, see :func:`running.judged`.
    """
    logs = tl.zeros([SLOTS], tl.float32)
    around = tl.zeros([SLOTS], tl.float32)
    zero = tl.zeros([SLOTS], tl.float32)
    for first in range(0, C, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        at, live = _slots_at(c, cols, S, C, SLOTS)
        if before > 0:
            middle = tl.load(centroids + at, mask=live, other=0.0)
            variance = tl.load(variances + at, mask=live, other=0.0)
            tl.store(center + at, middle, mask=live)
            tl.store(spread + at, variance, mask=live)
        else:
            middle = tl.load(center + at, mask=live, other=0.0)
            variance = tl.load(spread + at, mask=live, other=0.0)
        logs += tl.sum(tl.where(live, tl.log(variance + unit), 0.0), axis=1)
        around += tl.sum(variance, axis=1)
        zero += tl.sum(middle * middle + variance, axis=1)
    known = tl.arange(0, SLOTS) < S
    return logs, tl.sum(tl.where(known, share * around, 0.0)) / C, tl.sum(tl.where(known, share * zero, 0.0)) / C


@triton.jit
def _attend(
    x, order, attention, center, spread, share, logs, start, count, c, stride_row, stride_col, S, C, unit, scale,
    SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Who attends to what, in ``attention``; ``W [S]``, sums of squares around slots and around zero, the worst row.

    Those sums are over samples and columns. The worst row is that of which the likeliest slot is least likely.
    """
    slot = tl.arange(0, SLOTS)
    weights = tl.zeros([SLOTS], tl.float32)
    around = tl.zeros([BLOCK_R], tl.float32)
    zero = tl.zeros([BLOCK_R], tl.float32)
    least = tl.full([BLOCK_R], float("inf"), tl.float32)
    worst = tl.zeros([BLOCK_R], tl.int64)
    alive = (slot < S) & (share > 0.0)
    prior = tl.where(alive, tl.log(tl.where(alive, share, 1.0)) - 0.5 * logs, float("-inf"))
    for first in range(0, count, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        sample = _samples(order, start, rows, count)
        scaled, plain, squares = _distances(
            x, center, spread, sample, rows, count, c, stride_row, stride_col, S, S, C, unit, SLOTS, BLOCK_R, BLOCK_C
        )
        at, live = _attention(attention, start, rows, count, S, SLOTS)
        logits = prior[None, :] - 0.5 * scaled
        likeliest = tl.max(logits, axis=1)
        heights = tl.exp((logits - likeliest[:, None]) * scale)
        p = tl.where(live, heights / tl.sum(heights, axis=1)[:, None], 0.0)
        tl.store(at, p, mask=live)
        weights += tl.sum(p, axis=0)
        around += tl.sum(tl.where(live, p * plain, 0.0), axis=1)
        zero += tl.where(rows < count, squares, 0.0)
        worse = (likeliest < least) & (rows < count)
        least = tl.where(worse, likeliest, least)
        worst = tl.where(worse, rows, worst)
    row = tl.min(tl.where(least == tl.min(least, axis=0), worst, count - 1), axis=0)
    return weights, tl.sum(around, axis=0), tl.sum(zero, axis=0), row


@triton.jit
def _move(
    x, order, attention, center, spread, moved_center, moved_spread, coefficient, weights, start, count, c,
    stride_row, stride_col, S, C, gamma, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What slots would come to, put aside, and the ``coefficient``; the penalty, and how many are not finite."""
    n = count.to(tl.float32)
    part = weights / n * S  # 1 where every slot has as many samples
    of_variance = tl.minimum(VARIANCES_MOVE * part, MOST)[:, None]
    per_weight = 1.0 / tl.maximum(weights, TINY)
    cost = tl.zeros([SLOTS], tl.float32)
    broken = tl.zeros([SLOTS], tl.int32)
    for first in range(0, C, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        places, known = _slots_at(c, cols, S, C, SLOTS)
        middle = tl.load(center + places, mask=known, other=0.0)
        variance = tl.load(spread + places, mask=known, other=0.0)
        squares = tl.zeros([SLOTS, BLOCK_C], tl.float32)
        steps = tl.zeros([SLOTS, BLOCK_C], tl.float32)
        for row in range(0, count, BLOCK_R):
            rows = row + tl.arange(0, BLOCK_R)
            sample = _samples(order, start, rows, count)
            features = _features(x, sample, rows, count, cols, C, stride_row, stride_col)
            at, live = _attention(attention, start, rows, count, S, SLOTS)
            p = tl.load(at, mask=live, other=0.0)
            away = features[:, None, :] - middle[None, :, :]
            # Of a square that overflows nothing is hidden, however little it weighs.
            squares += tl.sum(p[:, :, None] * (away * away), axis=0)
            steps += tl.sum(p[:, :, None] * away, axis=0)
        middle += CENTROIDS_MOVE * part[:, None] * (steps * per_weight[:, None])
        variance = lerp(variance, squares * per_weight[:, None], of_variance)
        value, slope = cost_and_slope(variance, None, 0.0, 0.0, gamma, "nats")
        cost += tl.sum(tl.where(known, value, 0.0), axis=1)
        broken += tl.sum(tl.where(known & (is_finite(middle) & is_finite(variance) == 0), 1, 0), axis=1)
        tl.store(moved_center + places, middle, mask=known)
        tl.store(moved_spread + places, variance, mask=known)
        tl.store(coefficient + places, slope * (2.0 / C / n), mask=known)
    slots = tl.arange(0, SLOTS) < S
    return tl.sum(tl.where(slots, weights / n * cost, 0.0), axis=0) / C, tl.sum(broken, axis=0)


@triton.jit
def _keep(
    x, worst, centroids, variances, shares, moved_center, moved_spread, share, before, c, stride_row, stride_col, S, C,
    SLOTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What slots have come to is what they are from now on; a dead one goes to the sample ``worst``."""
    slot = tl.arange(0, SLOTS)
    low = tl.where(slot < S, share, float("inf"))
    high = tl.where(slot < S, share, float("-inf"))
    least = tl.min(low, axis=0)
    most = tl.max(high, axis=0)
    dead = (least * S < DEAD) & (before > 0)
    replaced = tl.where(dead, tl.min(tl.where(low == least, slot, SLOTS), axis=0), -1)
    halved = tl.where(dead, tl.min(tl.where(high == most, slot, SLOTS), axis=0), -1)
    share = tl.where((slot == replaced) | (slot == halved), (least + most) / 2, share)
    tl.store(shares + c.to(tl.int64) * S + slot, share, mask=slot < S)
    for first in range(0, C, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        at, live = _slots_at(c, cols, S, C, SLOTS)
        middle = tl.load(moved_center + at, mask=live, other=0.0)
        variance = tl.load(moved_spread + at, mask=live, other=0.0)
        if dead:
            places = x + worst * stride_row + cols.to(tl.int64) * stride_col
            there = tl.load(places, mask=cols < C, other=0.0).to(tl.float32)
            wide = tl.sum(tl.where((slot == halved)[:, None], variance, 0.0), axis=0)
            middle = tl.where((slot == replaced)[:, None], there[None, :], middle)
            variance = tl.where((slot == replaced)[:, None], wide[None, :], variance)
        tl.store(centroids + at, middle, mask=live)
        tl.store(variances + at, variance, mask=live)


@triton.jit
def slot_variance_forward_kernel(
    x, order, offsets, centroids, variances, shares, batches, ignored, arrived, spread, moved_center, moved_spread,
    rob_out, intra_out, penalty_out, mse_out, weight_out, center, coefficient, attention,
    stride_row, stride_col, S, C, unit, gamma, scale,
    SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From features to losses, slots moved; ``arrived [1]``, zero, counts classes. Grid: classes."""
    c = tl.program_id(0)
    num_classes = tl.num_programs(0)
    start = tl.load(offsets + c)
    count = tl.load(offsets + c + 1) - start
    before = tl.load(batches + c)
    row_of_outliers = tl.load(ignored + c)
    penalty = 0.0
    mse = 0.0
    if count > 0:
        slot = tl.arange(0, SLOTS)
        share = tl.load(shares + c.to(tl.int64) * S + slot, mask=slot < S, other=1.0)
        if before == 0:
            share = tl.where(slot < count, 1.0 / tl.minimum(count, S).to(tl.float32), 0.0)
            _begin(
                x, order, attention, center, spread, start, count, c, stride_row, stride_col, S, C,
                SLOTS, BLOCK_R, BLOCK_C,
            )  # fmt: skip
            tl.debug_barrier()
        logs, known_around, known_zero = _found(
            centroids, variances, share, center, spread, before, c, S, C, unit, SLOTS, BLOCK_C
        )
        tl.debug_barrier()
        weights, around, zero, worst = _attend(
            x, order, attention, center, spread, share, logs, start, count, c, stride_row, stride_col, S, C, unit,
            scale, SLOTS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        tl.debug_barrier()
        penalty, broken = _move(
            x, order, attention, center, spread, moved_center, moved_spread, coefficient, weights, start, count, c,
            stride_row, stride_col, S, C, gamma, SLOTS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        n = count.to(tl.float32)
        mse = around / n / C
        moves, batches_after, row_of_outliers = judged(
            mse, zero / n / C, known_around, known_zero, count, unit, before, row_of_outliers,
            is_finite(mse) & (broken == 0),
        )  # fmt: skip
        tl.debug_barrier()  # what is kept has been written, and what was there has been read
        if moves:
            _keep(
                x, tl.load(order + start + worst).to(tl.int64), centroids, variances, shares, moved_center,
                moved_spread, lerp(share, weights / n, CENTROIDS_MOVE), before, c, stride_row, stride_col, S, C,
                SLOTS, BLOCK_C,
            )  # fmt: skip
        tl.store(batches + c, batches_after)
        tl.store(ignored + c, row_of_outliers)
    else:
        for first in range(0, C, BLOCK_C):
            at, live = _slots_at(c, first + tl.arange(0, BLOCK_C), S, C, SLOTS)
            tl.store(center + at, tl.zeros([SLOTS, BLOCK_C], tl.float32), mask=live)
            tl.store(coefficient + at, tl.zeros([SLOTS, BLOCK_C], tl.float32), mask=live)
    tl.store(penalty_out + c, penalty)
    tl.store(mse_out + c, mse)
    if last_to_arrive(arrived, num_classes):
        losses(offsets, penalty_out, mse_out, rob_out, intra_out, weight_out, num_classes, 1, BLOCK_K)


@triton.jit(do_not_specialize=["num_samples", "num_parts", "stride_penalty"])
def slot_variance_backward_kernel(
    x, order, offsets, weight, center, coefficient, attention, grad_rob, grad_penalty, dx,
    stride_row, stride_col, stride_penalty, num_samples, num_parts, S, C,
    SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dx = Σ_s p_s k_s (x − c_s)`` times what the class's penalty is worth, zeros for samples of no class.

    ``dx [B, C]`` is contiguous. Upstream gradients may be None. Grid: blocks of columns × parts × classes.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    c = tl.program_id(2)
    num_classes = tl.num_programs(2)
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    # Samples of no class come last in the order.
    for row in range(tl.load(offsets + num_classes) + c * num_parts + part, num_samples, num_parts * num_classes):
        place = dx + tl.load(order + row).to(tl.int64) * C + cols
        tl.store(place, tl.zeros([BLOCK_C], dx.dtype.element_ty), mask=cols < C)
    start, begin, end, count = rows_of_part(offsets, c, part, num_parts, BLOCK_R)
    upstream = 0.0
    if grad_rob is not None:
        upstream += tl.load(grad_rob).to(tl.float32) * (count.to(tl.float32) / tl.maximum(tl.load(weight), 1.0))
    if grad_penalty is not None:
        upstream += tl.load(grad_penalty + c.to(tl.int64) * stride_penalty).to(tl.float32)
    places, known = _slots_at(c, cols, S, C, SLOTS)
    middle = tl.load(center + places, mask=known, other=0.0)
    steepness = tl.load(coefficient + places, mask=known, other=0.0) * upstream
    for first in range(begin, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        sample = _samples(order, start, rows, end)
        features = _features(x, sample, rows, end, cols, C, stride_row, stride_col)
        at, live = _attention(attention, start, rows, end, S, SLOTS)
        p = tl.load(at, mask=live, other=0.0)
        pull = (p[:, :, None] * steepness[None, :, :]) * (features[:, None, :] - middle[None, :, :])
        gradient = tl.sum(tl.where(known[None, :, :], pull, 0.0), axis=1)  # infinity times a slot that is none
        inside = (rows < end)[:, None] & (cols < C)[None, :]
        place = dx + sample[:, None] * C + cols[None, :]
        tl.store(place, gradient.to(dx.dtype.element_ty), mask=inside)
