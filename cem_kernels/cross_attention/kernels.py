"""The kernels of gated cross attention: tokens read their class's slots in one launch forward and one backward.

With the projections absorbed (``weights.absorb``), LayerNorm's affine folded into the queries and the bias into the
outputs (``Σ_s p = 1`` in each of the ``H`` heads, so ``b / H`` in every row of ``P`` adds up to ``b``), a token ``x``
of a class with queries ``G [H·S, D]``, shifts ``g [H·S]`` and outputs ``P [H·S, D]`` becomes, normalized to ``x̂``,

    l = x̂ Gᵀ + g        p = softmax of each head's slots (l)        y = x + tanh(α) · keep ∘ (p P)

Backward, with ``e = keep ∘ ∂y`` and ``u = e Pᵀ``, where ``Σ_h`` runs over the slots of a head:

    ∂l = tanh(α) · p ∘ (u − Σ_h p u)      ∂x̂ = ∂l G      ∂x = ∂y + rstd · (∂x̂ − mean ∂x̂ − x̂ · mean(∂x̂ ∘ x̂))
    ∂G = Σ_n ∂lᵀ x̂      ∂g = Σ_n ∂l      ∂P = tanh(α) Σ_n pᵀ e      ∂tanh(α) = Σ_n p·u

Both means over columns are sums over slots, ``Σ_d ∂x̂ = ∂l · Σ_d G`` and ``Σ_d ∂x̂ x̂ = ∂l · (l − g)``, so that no pass
over the columns is needed before the one that writes ``∂x``.

A program owns every ``num_parts``-th tile of a class's tokens and walks the columns in blocks. Heads are taken in
groups of at most 32 rows of ``G``: one for 4 heads of 8 slots. Further groups add to ``y`` and ``∂x``. With one group,
forward it reads its tokens (``B·T·D``; the second and third time from the cache) and writes as many numbers in fp32
and two statistics a token; backward it reads tokens and upstream gradients and writes ``B·T·D`` gradients in the
tokens' dtype. Weights are ``2·H·S·D`` numbers a class, read by every program of a class; backward each writes the
gradients of as many, in fp32, in a row of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cem_kernels.triton_utils import dot, layer_norm_backward, tanh, tanh_slope, zero_ignored


@triton.jit
def _tile(order, first_row, n, num_live, T):
    """The rows of a tile of a class's tokens: whether they exist, their samples, and their tokens in the sample."""
    live = n < num_live
    sample = tl.load(order + first_row + n // T, mask=live, other=0).to(tl.int64)
    return live, sample, (n % T).to(tl.int64)


@triton.jit
def _load_rows(rows, d, D: tl.constexpr, BLOCK: tl.constexpr):
    """``[R, BLOCK]`` of a matrix ``[R, D]``: the pointers ``rows [R]`` plus columns ``d``, zero beyond ``D``."""
    if D % BLOCK == 0:
        return tl.load(rows[:, None] + d[None, :])
    return tl.load(rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)


@triton.jit
def _inside(live, d, D: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a block of a tile's tokens exist."""
    if D % BLOCK == 0:
        return tl.broadcast_to(live[:, None], (live.shape[0], BLOCK))
    return live[:, None] & (d < D)[None, :]


@triton.jit
def _attention(logits, shifts, r, BLOCK_N: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr):
    """``[BLOCK_N, HEADS·SLOTS]`` to attention over each head's slots. Shifts are loaded here, tile by tile: kept, they
    would cost registers."""
    by_head = tl.reshape(logits + tl.load(shifts + r)[None, :], (BLOCK_N, HEADS, SLOTS))
    by_head = tl.exp(by_head - tl.max(by_head, axis=2)[:, :, None])
    by_head = by_head / tl.sum(by_head, axis=2)[:, :, None]
    return tl.reshape(by_head, (BLOCK_N, HEADS * SLOTS))


@triton.jit
def _normal(x_row, d, inside, mean, rstd):
    """Normalized tokens ``[BLOCK_N, BLOCK]`` in fp32, zero where there is none."""
    chunk = tl.load(x_row[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, (chunk - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def _keep(seed, row, d, D: tl.constexpr, dropout):
    """Dropout's factors of an element: a function of the seed and of the element's place in the batch alone."""
    drawn = tl.rand(tl.load(seed), row[:, None] * D + d[None, :])
    return tl.where(drawn >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit(do_not_specialize=["num_samples", "T", "num_parts"])
def gated_read_forward_kernel(
    x, order, offsets, queries, shifts, outputs, alpha, seed, y, statistics,
    stride_b, stride_t, num_samples, T, width, num_parts, dropout, eps,
    D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``y [B, T, D]`` and ``statistics [B, T, 2]`` (mean, 1/deviation), contiguous fp32; zeros where ignored.

    Grid: parts × classes.
    """
    part = tl.program_id(0)
    c = tl.program_id(1)
    program = c * num_parts + part
    programs = num_parts * tl.num_programs(1)
    if GROUPS == 1:  # ahead of the walk or behind it, whichever costs no registers
        zero_ignored(y, order, offsets, program, programs, tl.num_programs(1), num_samples, T, width, BLOCK_D)
    first_row = tl.load(offsets + c)
    num_live = (tl.load(offsets + c + 1) - first_row).to(tl.int32) * T
    ROWS: tl.constexpr = GROUPS * HEADS * SLOTS
    queries += c.to(tl.int64) * (ROWS * D)
    outputs += c.to(tl.int64) * (ROWS * D)
    shifts += c.to(tl.int64) * ROWS
    gate = tanh(tl.load(alpha))
    kind = queries.dtype.element_ty  # of products
    for start in range(part * BLOCK_N, num_live, num_parts * BLOCK_N):
        live, sample, token = _tile(order, first_row, start + tl.arange(0, BLOCK_N), num_live, T)
        row = sample * T + token
        x_row = x + sample * stride_b + token * stride_t

        mean = tl.zeros([BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, width, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            inside = _inside(live, d, D, BLOCK_D)
            chunk = tl.load(x_row[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
            new = tl.minimum(D - first, BLOCK_D).to(tl.float32)
            chunk_mean = tl.sum(chunk, axis=1) / new
            deviation = tl.where(inside, chunk - chunk_mean[:, None], 0.0)
            step = chunk_mean - mean
            share = new / (first + new)
            squares += tl.sum(deviation * deviation, axis=1) + step * step * (first * share)
            mean += step * share
        rstd = 1.0 / tl.sqrt(squares / D + eps)
        tl.store(statistics + row * 2, mean, mask=live)
        tl.store(statistics + row * 2 + 1, rstd, mask=live)

        for group in range(GROUPS):
            r = group * (HEADS * SLOTS) + tl.arange(0, HEADS * SLOTS)
            logits = tl.zeros([BLOCK_N, HEADS * SLOTS], tl.float32)
            for first in range(0, width, BLOCK_K):
                d = first + tl.arange(0, BLOCK_K)
                inside = _inside(live, d, D, BLOCK_K)
                normal = _normal(x_row, d, inside, mean, rstd).to(kind)
                logits = dot(normal, tl.trans(_load_rows(queries + r * D, d, D, BLOCK_K)), logits, PRECISION)
            attention = _attention(logits, shifts, r, BLOCK_N, HEADS, SLOTS).to(kind)
            for first in range(0, width, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                inside = _inside(live, d, D, BLOCK_D)
                output = _load_rows(outputs + r * D, d, D, BLOCK_D)
                out = dot(attention, output, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION)
                if group == 0:
                    before = tl.load(x_row[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
                else:
                    before = tl.load(y + row[:, None] * D + d[None, :], mask=inside, other=0.0)
                if DROPOUT:
                    out *= _keep(seed, row, d, D, dropout)
                tl.store(y + row[:, None] * D + d[None, :], before + gate * out, mask=inside)
            if GROUPS > 1:
                tl.debug_barrier()  # the next group reads what other threads wrote
    if GROUPS > 1:
        zero_ignored(y, order, offsets, program, programs, tl.num_programs(1), num_samples, T, width, BLOCK_D)


@triton.jit
def _backward_columns(
    d, x_row, y_row, dx, row, query_row, live, mean, rstd, mean_1, mean_x, low, low_t, attention_t,
    seed, dropout, group, d_query, d_output,
    D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write columns ``d`` of a tile's ``dx``; return these columns of ``∂G`` and ``∂P`` with the tile's share added."""
    inside = _inside(live, d, D, BLOCK_D)
    normal = _normal(x_row, d, inside, mean, rstd)
    upper = tl.load(y_row[:, None] + d[None, :], mask=inside, other=0.0)
    e = upper
    if DROPOUT:
        e *= _keep(seed, row, d, D, dropout)
    d_query = dot(low_t, normal.to(low.dtype), d_query, PRECISION)
    d_output = dot(attention_t, e.to(low.dtype), d_output, PRECISION)

    query = _load_rows(query_row, d, D, BLOCK_D)
    d_normal = dot(low, query, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION)
    step = layer_norm_backward(d_normal, normal, mean_1, mean_x, rstd)
    place = dx + row[:, None] * D + d[None, :]
    if group == 0:
        step += upper
    else:
        step += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, step.to(dx.dtype.element_ty), mask=inside)
    return d_query, d_output


@triton.jit(do_not_specialize=["num_samples", "T", "num_parts"])
def gated_read_backward_kernel(
    x, order, offsets, queries, shifts, outputs, alpha, seed, statistics, query_sums, dy, dx, partials,
    stride_b, stride_t, stride_yb, stride_yt, num_samples, T, width, num_parts, dropout,
    D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``dx [B, T, D]``, contiguous, and one row of ``partials`` a program: ``∂G, ∂P [H·S, D], ∂g [H·S], ∂α``.

    ``query_sums [K, H·S]`` holds ``Σ_d G``. Sums over tokens are kept in the program's own row of ``partials``, which
    stays in the cache: in registers there is no room for them. Grid: parts × classes.
    """
    part = tl.program_id(0)
    c = tl.program_id(1)
    first_row = tl.load(offsets + c)
    num_live = (tl.load(offsets + c + 1) - first_row).to(tl.int32) * T
    ROWS: tl.constexpr = GROUPS * HEADS * SLOTS
    queries += c.to(tl.int64) * (ROWS * D)
    outputs += c.to(tl.int64) * (ROWS * D)
    shifts += c.to(tl.int64) * ROWS
    query_sums += c.to(tl.int64) * ROWS
    gate = tanh(tl.load(alpha))
    kind = queries.dtype.element_ty  # of products

    mine = partials + (c.to(tl.int64) * num_parts + part) * (2 * ROWS * D + ROWS + 1)
    to_outputs = mine + ROWS * D
    to_shifts = to_outputs + ROWS * D
    nothing_yet = part * BLOCK_N
    d_gate = 0.0
    for group in range(GROUPS):
        r = group * (HEADS * SLOTS) + tl.arange(0, HEADS * SLOTS)
        if nothing_yet >= num_live:  # no tile at all, and so nobody else who writes
            tl.store(to_shifts + r, tl.zeros([HEADS * SLOTS], tl.float32))
            for first in range(0, width, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                place = r[:, None] * D + d[None, :]
                nothing = tl.zeros([HEADS * SLOTS, BLOCK_D], tl.float32)
                tl.store(mine + place, nothing, mask=(d < D)[None, :])
                tl.store(to_outputs + place, nothing, mask=(d < D)[None, :])
        for start in range(part * BLOCK_N, num_live, num_parts * BLOCK_N):
            live, sample, token = _tile(order, first_row, start + tl.arange(0, BLOCK_N), num_live, T)
            row = sample * T + token
            x_row = x + sample * stride_b + token * stride_t
            y_row = dy + sample * stride_yb + token * stride_yt
            mean = tl.load(statistics + row * 2, mask=live, other=0.0)
            rstd = tl.load(statistics + row * 2 + 1, mask=live, other=0.0)

            logits = tl.zeros([BLOCK_N, HEADS * SLOTS], tl.float32)  # without the shifts
            upstream = tl.zeros([BLOCK_N, HEADS * SLOTS], tl.float32)
            for first in range(0, width, BLOCK_K):
                d = first + tl.arange(0, BLOCK_K)
                inside = _inside(live, d, D, BLOCK_K)
                normal = _normal(x_row, d, inside, mean, rstd).to(kind)
                e = tl.load(y_row[:, None] + d[None, :], mask=inside, other=0.0)
                if DROPOUT:
                    e *= _keep(seed, row, d, D, dropout)
                logits = dot(normal, tl.trans(_load_rows(queries + r * D, d, D, BLOCK_K)), logits, PRECISION)
                output = _load_rows(outputs + r * D, d, D, BLOCK_K)
                upstream = dot(e.to(kind), tl.trans(output), upstream, PRECISION)
            attention = _attention(logits, shifts, r, BLOCK_N, HEADS, SLOTS)
            attention = tl.where(live[:, None], attention, 0.0)
            weighted = attention * upstream
            d_gate += tl.sum(tl.sum(weighted, axis=0), axis=0)
            of_head = tl.sum(tl.reshape(weighted, (BLOCK_N, HEADS, SLOTS)), axis=2)
            of_head = tl.broadcast_to(of_head[:, :, None], (BLOCK_N, HEADS, SLOTS))
            d_logits = gate * (weighted - attention * tl.reshape(of_head, (BLOCK_N, HEADS * SLOTS)))
            # The first tile has nothing to add to.
            limit = tl.where(start > nothing_yet, D, 0)
            d_shift = tl.load(to_shifts + r, mask=r * 0 < limit, other=0.0) + tl.sum(d_logits, axis=0)
            tl.debug_barrier()  # several warps hold a copy of these few numbers, and all have read them
            tl.store(to_shifts + r, d_shift)
            mean_1 = tl.sum(d_logits * tl.load(query_sums + r)[None, :], axis=1) / D
            mean_x = tl.sum(d_logits * logits, axis=1) / D
            low = d_logits.to(kind)
            low_t = tl.trans(low)
            attention_t = tl.trans((gate * attention).to(kind))
            for first in range(0, width, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                place = r[:, None] * D + d[None, :]
                d_query, d_output = _backward_columns(
                    d, x_row, y_row, dx, row, queries + r * D, live, mean, rstd, mean_1, mean_x,
                    low, low_t, attention_t, seed, dropout, group,
                    tl.load(mine + place, mask=(d < limit)[None, :], other=0.0),
                    tl.load(to_outputs + place, mask=(d < limit)[None, :], other=0.0),
                    D, DROPOUT, PRECISION, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                tl.store(mine + place, d_query, mask=(d < D)[None, :])
                tl.store(to_outputs + place, d_output, mask=(d < D)[None, :])
            tl.debug_barrier()  # the next tile or group reads what other threads wrote
    tl.store(to_shifts + ROWS, d_gate * tanh_slope(tl.load(alpha)))
    program = c * num_parts + part
    programs = num_parts * tl.num_programs(1)
    zero_ignored(dx, order, offsets, program, programs, tl.num_programs(1), num_samples, T, width, BLOCK_D)
