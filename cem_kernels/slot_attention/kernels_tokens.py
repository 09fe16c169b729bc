"""What kernels of slot attention do with tokens: they attend to their class's slots, and the way back.

A program has ``CLASSES`` neighboring classes and so ``ROWS = CLASSES · SLOTS`` slots. Their tokens lie side by side in
sorted order; a tile of them meets all the rows at once, and what belongs to another class is masked. It takes every
``num_parts``-th tile and adds to sums of its own.

    l = x̂ (g ∘ q)ᵀ + q·b      p = softmax over the class's slots (l)
    sums = Σ_n (p + eps) x̂      totals = Σ_n (p + eps)

An iteration reads its tokens twice, the second time from the cache, ``B·T·D`` numbers in their dtype; the backward
reads them twice and adds ``B·T·D`` numbers in fp32 to the tokens' gradient. Imports Triton, so only ``triton.py`` files
import this module.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cem_kernels.slot_attention.kernels_slots import (
    OF_COLUMNS,
    OF_UPDATE,
    QUERY,
    QUERY_WEIGHT,
    SHIFT,
    TOTAL,
    W_NUMBERS,
    W_UPDATE,
    load_rows,
    load_vector,
    moments,
    store_rows,
)
from cem_kernels.triton_utils import dot, dot_over_rows, layer_norm_backward


@triton.jit
def rows_of_classes(first_class, num_classes, num_slots, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """Of a program's rows: their index among all slots, their class, and whether they exist."""
    r = tl.arange(0, ROWS)
    c = first_class + r // SLOTS
    slot = r % SLOTS
    return c.to(tl.int64) * num_slots + slot, c, (c < num_classes) & (slot < num_slots)


@triton.jit
def tokens_of_classes(offsets, first_class, num_classes, T, CLASSES: tl.constexpr):
    """First sorted sample of a program's classes, and their number of tokens."""
    first_sample = tl.load(offsets + first_class)
    end = tl.load(offsets + tl.minimum(first_class + CLASSES, num_classes))
    return first_sample, (end - first_sample).to(tl.int32) * T


@triton.jit
def _tile(
    order, offsets, first_sample, n, num_live, T, first_class, num_classes, live_rows,
    SLOTS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Whether a tile's tokens exist, their samples, their places in them, and which slots are their class's."""
    live = n < num_live
    place = first_sample + n // T
    sample = tl.load(order + place, mask=live, other=0).to(tl.int64)
    mine = live[:, None] & live_rows[None, :]
    if CLASSES > 1:
        local = tl.zeros(n.shape, tl.int32)
        for i in tl.static_range(1, CLASSES):
            local += (place >= tl.load(offsets + tl.minimum(first_class + i, num_classes))).to(tl.int32)
        mine = mine & (local[:, None] == (tl.arange(0, ROWS) // SLOTS)[None, :])
    return live, sample, (n % T).to(tl.int64), mine


@triton.jit
def _softmax(logits, mine):
    """Over the slots of a token's own class; zero elsewhere."""
    logits = tl.where(mine, logits, -float("inf"))
    highest = tl.max(logits, axis=1)
    # A token that does not exist has no slot at all.
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    exponential = tl.exp(logits - highest[:, None])
    total = tl.sum(exponential, axis=1)
    return exponential / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _normal(x_rows, d, live, mean, rstd, D: tl.constexpr, kind: tl.constexpr):
    """Normalized tokens ``[BLOCK_N, BLOCK]``, zero where there is none."""
    x = load_rows(x_rows, d, live, D).to(tl.float32)
    normal = (x - mean[:, None]) * rstd[:, None]
    return tl.where(live[:, None] & (d < D)[None, :], normal, 0.0).to(kind)


@triton.jit
def _queries(floats, d, live_rows, vectors, D: tl.constexpr, kind: tl.constexpr):
    """``[ROWS, BLOCK]`` of the queries with the inputs' affine."""
    return (load_rows(floats + QUERY * D, d, live_rows, D) * load_vector(vectors + QUERY_WEIGHT * D, d, D)).to(kind)


@triton.jit
def token_statistics(
    x, order, offsets, statistics, stride_b, stride_t, first_class, num_classes, part, num_parts, T, width, ln_eps,
    D: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and 1/deviation of a program's tokens into ``statistics [B, T, 2]``."""
    first_sample, num_live = tokens_of_classes(offsets, first_class, num_classes, T, CLASSES)
    for start in range(part * BLOCK_N, num_live, num_parts * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        live = n < num_live
        sample = tl.load(order + first_sample + n // T, mask=live, other=0).to(tl.int64)
        token = (n % T).to(tl.int64)
        mean, rstd = moments(x + sample * stride_b + token * stride_t, live, width, ln_eps, BLOCK_N, D, BLOCK_D)
        place = statistics + (sample * T + token) * 2
        tl.store(place, mean, mask=live)
        tl.store(place + 1, rstd, mask=live)
    tl.debug_barrier()


@triton.jit
def attend(
    x, order, offsets, statistics, floats, operands, stats, live_rows, vectors, sums, totals,
    stride_b, stride_t, first_class, num_classes, part, num_parts, T, width, eps,
    D: tl.constexpr, PRECISION: tl.constexpr, SLOTS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``Σ_n (p + eps) x̂`` and ``Σ_n (p + eps)`` of this part's tokens, for every row, into ``sums`` and ``totals``."""
    kind = operands.dtype.element_ty  # of products
    first_sample, num_live = tokens_of_classes(offsets, first_class, num_classes, T, CLASSES)
    shift = tl.load(stats + SHIFT, mask=live_rows, other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    begin = part * BLOCK_N
    if begin >= num_live:
        for first in range(0, width, BLOCK_D):
            store_rows(sums, first + tl.arange(0, BLOCK_D), live_rows, tl.zeros([ROWS, BLOCK_D], tl.float32), D)
    for start in range(begin, num_live, num_parts * BLOCK_N):
        live, sample, token, mine = _tile(
            order, offsets, first_sample, start + tl.arange(0, BLOCK_N), num_live, T, first_class, num_classes,
            live_rows, SLOTS, CLASSES, ROWS,
        )  # fmt: skip
        x_rows = x + sample * stride_b + token * stride_t
        place = statistics + (sample * T + token) * 2
        mean = tl.load(place, mask=live, other=0.0)
        rstd = tl.load(place + 1, mask=live, other=0.0)
        logits = tl.zeros([BLOCK_N, ROWS], tl.float32)
        for first in range(0, width, BLOCK_K):
            d = first + tl.arange(0, BLOCK_K)
            query = _queries(floats, d, live_rows, vectors, D, kind)
            logits = dot(_normal(x_rows, d, live, mean, rstd, D, kind), tl.trans(query), logits, PRECISION)
        attention = _softmax(logits + shift[None, :], mine)
        attention = tl.where(mine, attention + eps, 0.0)
        total += tl.sum(attention, axis=0)
        attention_t = tl.trans(attention.to(kind))
        for first in range(0, width, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            # The first tile has nothing to add to.
            before = tl.load(
                sums[:, None] + d[None, :], mask=live_rows[:, None] & (d < tl.where(start > begin, D, 0))[None, :],
                other=0.0,
            )  # fmt: skip
            added = dot(attention_t, _normal(x_rows, d, live, mean, rstd, D, kind), before, PRECISION)
            store_rows(sums, d, live_rows, added, D)
        tl.debug_barrier()
    tl.store(totals, total, mask=live_rows)
    tl.debug_barrier()


@triton.jit
def attend_backward(
    x, order, offsets, statistics, floats, operands, stats, work, live_rows, vectors, d_queries, d_shifts, dx,
    stride_b, stride_t, first_class, num_classes, part, num_parts, T, width, eps, first_time,
    D: tl.constexpr, PRECISION: tl.constexpr, SLOTS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward of :func:`attend` divided by its totals; adds to ``dx [B, T, D]`` what this iteration has to say.

    Means over columns of the gradient of a normalized token are sums over slots: ``mean(G) · w + mean(q) · ∂l`` and
    ``w · (x̂ G) + ∂l · (x̂ q)``, so that no pass is needed before the one that writes.
    """
    kind = operands.dtype.element_ty  # of products
    first_sample, num_live = tokens_of_classes(offsets, first_class, num_classes, T, CLASSES)
    shift = tl.load(stats + SHIFT, mask=live_rows, other=0.0)
    total = tl.load(stats + TOTAL, mask=live_rows, other=1.0)
    share = 1.0 / tl.where(total > 0.0, total, 1.0)
    of_update = tl.load(work + W_NUMBERS * D + OF_UPDATE, mask=live_rows, other=0.0)
    update_sum = tl.load(work + W_NUMBERS * D + OF_COLUMNS, mask=live_rows, other=0.0)
    query_sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        query_sum += tl.sum(_queries(floats, d, live_rows, vectors, D, kind).to(tl.float32), axis=1)
    d_shift = tl.zeros([ROWS], tl.float32)
    begin = part * BLOCK_N
    if begin >= num_live:
        for first in range(0, width, BLOCK_D):
            store_rows(d_queries, first + tl.arange(0, BLOCK_D), live_rows, tl.zeros([ROWS, BLOCK_D], tl.float32), D)
    for start in range(begin, num_live, num_parts * BLOCK_N):
        live, sample, token, mine = _tile(
            order, offsets, first_sample, start + tl.arange(0, BLOCK_N), num_live, T, first_class, num_classes,
            live_rows, SLOTS, CLASSES, ROWS,
        )  # fmt: skip
        row = sample * T + token
        x_rows = x + sample * stride_b + token * stride_t
        mean = tl.load(statistics + row * 2, mask=live, other=0.0)
        rstd = tl.load(statistics + row * 2 + 1, mask=live, other=0.0)
        logits = tl.zeros([BLOCK_N, ROWS], tl.float32)  # without the shift
        upstream = tl.zeros([BLOCK_N, ROWS], tl.float32)
        for first in range(0, width, BLOCK_K):
            d = first + tl.arange(0, BLOCK_K)
            normal = _normal(x_rows, d, live, mean, rstd, D, kind)
            logits = dot(normal, tl.trans(_queries(floats, d, live_rows, vectors, D, kind)), logits, PRECISION)
            update = load_rows(work + W_UPDATE * D, d, live_rows, D).to(kind)
            upstream = dot(normal, tl.trans(update), upstream, PRECISION)
        attention = _softmax(logits + shift[None, :], mine)
        weight = tl.where(mine, attention + eps, 0.0) * share[None, :]
        d_attention = attention * (upstream - of_update[None, :]) * share[None, :]
        d_logits = d_attention - attention * tl.sum(d_attention, axis=1)[:, None]
        d_shift += tl.sum(d_logits, axis=0)
        mean_1 = tl.sum(weight * update_sum[None, :] + d_logits * query_sum[None, :], axis=1) / D
        mean_x = tl.sum(weight * upstream + d_logits * logits, axis=1) / D
        low, weight = d_logits.to(kind), weight.to(kind)
        low_t = tl.trans(low)
        for first in range(0, width, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            normal = _normal(x_rows, d, live, mean, rstd, D, kind)
            before = tl.load(
                d_queries[:, None] + d[None, :],
                mask=live_rows[:, None] & (d < tl.where(start > begin, D, 0))[None, :], other=0.0,
            )  # fmt: skip
            store_rows(d_queries, d, live_rows, dot(low_t, normal, before, PRECISION), D)
            gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            update = load_rows(work + W_UPDATE * D, d, live_rows, D).to(kind)
            gradient = dot_over_rows(weight, update, gradient, PRECISION, ROWS)
            query = _queries(floats, d, live_rows, vectors, D, kind)
            gradient = dot_over_rows(low, query, gradient, PRECISION, ROWS)
            step = layer_norm_backward(gradient, normal.to(tl.float32), mean_1, mean_x, rstd)
            place = dx + row[:, None] * D + d[None, :]
            inside = live[:, None] & (d < D)[None, :]
            earlier = live[:, None] & (d < tl.where(first_time, 0, D))[None, :]
            tl.store(place, tl.load(place, mask=earlier, other=0.0) + step, mask=inside)
        tl.debug_barrier()
    tl.store(d_shifts, d_shift, mask=live_rows)
    tl.debug_barrier()
