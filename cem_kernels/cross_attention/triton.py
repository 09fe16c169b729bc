"""Gated cross attention in Triton: tokens read their class's slots in one launch forward and one backward.

With the projections absorbed (``weights.absorb``), LayerNorm's affine folded into the queries and the bias into the
outputs (``Σ_s p = 1`` in each of the ``H`` heads, so ``b / H`` in every row of ``P`` adds up to ``b``), a token ``x``
of a class with queries ``G [H·S, D]``, shifts ``g [H·S]`` and outputs ``P [H·S, D]`` becomes, normalized to ``x̂``,

    l = x̂ Gᵀ + g        p = softmax of each head's slots (l)        y = x + tanh(α) · keep ∘ (p P)

Backward, with ``e = keep ∘ ∂y`` and ``u = e Pᵀ``, where ``Σ_h`` runs over the slots of a head:

    ∂l = tanh(α) · p ∘ (u − Σ_h p u)      ∂x̂ = ∂l G      ∂x = ∂y + rstd · (∂x̂ − mean ∂x̂ − x̂ · mean(∂x̂ ∘ x̂))
    ∂G = Σ_n ∂lᵀ x̂      ∂g = Σ_n ∂l      ∂P = tanh(α) Σ_n pᵀ e      ∂tanh(α) = Σ_n p·u

Both means over columns are sums over slots, ``Σ_d ∂x̂ = ∂l · Σ_d G`` and ``Σ_d ∂x̂ x̂ = ∂l · (l − g)``, so that no pass
over the columns is needed before the one that writes ``∂x``.

A program takes every ``num_parts``-th tile of a class's tokens and walks the columns in blocks. Heads are taken in
groups of at most ``MOST_ROWS`` rows of ``G``: one for 4 heads of 8 slots. Further groups add to ``y`` and ``∂x``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from cem_kernels.cross_attention.feed_forward import feed_forward_backward, feed_forward_in_chunks, network
from cem_kernels.cross_attention.weights import CrossAttentionWeights, absorb
from cem_kernels.groups import ClassGroups
from cem_kernels.kernel_math import dot, tanh, tanh_slope
from cem_kernels.launching import input_precision, launch, operator, processors, splits_per_class, tuned

LN_EPS = 1e-5  # F.layer_norm's
PADDING_LOGIT = -1e30  # finite, so that a head of nothing but padding is no NaN

# ---------------------------------------------------------------------------------------------------------- kernels


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
def _softmax_of_heads(logits, BLOCK_N: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr):
    """``[BLOCK_N, HEADS·SLOTS]`` to attention over each head's slots."""
    by_head = tl.reshape(logits, (BLOCK_N, HEADS, SLOTS))
    by_head = tl.exp(by_head - tl.max(by_head, axis=2)[:, :, None])
    by_head = by_head / tl.sum(by_head, axis=2)[:, :, None]
    return tl.reshape(by_head, (BLOCK_N, HEADS * SLOTS))


@triton.jit
def _keep(seed, row, d, D: tl.constexpr, dropout):
    """Dropout's factors of an element: a function of the seed and of the element's place in the batch alone."""
    drawn = tl.rand(tl.load(seed), row[:, None] * D + d[None, :])
    return tl.where(drawn >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit(do_not_specialize=["T", "num_parts"])
def gated_read_forward_kernel(
    x, order, offsets, queries, shifts, outputs, alpha, seed, y, statistics,
    stride_b, stride_t, T, width, num_parts, dropout, eps,
    D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``y [B, T, D]`` and ``statistics [B, T, 2]`` (mean, 1/deviation), contiguous fp32. Grid: parts × classes."""
    part = tl.program_id(0)
    c = tl.program_id(1)
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
                chunk = tl.load(x_row[:, None] + d[None, :], mask=inside, other=0.0)
                normal = tl.where(inside, (chunk.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0).to(kind)
                logits = dot(normal, tl.trans(_load_rows(queries + r * D, d, D, BLOCK_K)), logits, PRECISION)
            attention = _softmax_of_heads(logits + tl.load(shifts + r)[None, :], BLOCK_N, HEADS, SLOTS).to(kind)
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


@triton.jit
def _backward_columns(
    d, x_row, y_row, dx, row, query_row, live, mean, rstd, mean_1, mean_x, low, low_t, attention_t,
    seed, dropout, group, d_query, d_output,
    D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write columns ``d`` of a tile's ``dx``; return these columns of ``∂G`` and ``∂P`` with the tile's share added."""
    inside = _inside(live, d, D, BLOCK_D)
    chunk = tl.load(x_row[:, None] + d[None, :], mask=inside, other=0.0)
    normal = tl.where(inside, (chunk.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
    upper = tl.load(y_row[:, None] + d[None, :], mask=inside, other=0.0)
    e = upper
    if DROPOUT:
        e *= _keep(seed, row, d, D, dropout)
    d_query = dot(low_t, normal.to(low.dtype), d_query, PRECISION)
    d_output = dot(attention_t, e.to(low.dtype), d_output, PRECISION)

    query = _load_rows(query_row, d, D, BLOCK_D)
    d_normal = dot(low, query, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION)
    step = rstd[:, None] * (d_normal - mean_1[:, None] - normal * mean_x[:, None])
    place = dx + row[:, None] * D + d[None, :]
    if group == 0:
        step += upper
    else:
        step += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, step.to(dx.dtype.element_ty), mask=inside)
    return d_query, d_output


@triton.jit(do_not_specialize=["T", "num_parts"])
def gated_read_backward_kernel(
    x, order, offsets, queries, shifts, outputs, alpha, seed, statistics, query_sums, dy, dx, partials,
    stride_b, stride_t, stride_yb, stride_yt, T, width, num_parts, dropout,
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
                chunk = tl.load(x_row[:, None] + d[None, :], mask=inside, other=0.0)
                normal = tl.where(inside, (chunk.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0).to(kind)
                e = tl.load(y_row[:, None] + d[None, :], mask=inside, other=0.0)
                if DROPOUT:
                    e *= _keep(seed, row, d, D, dropout)
                logits = dot(normal, tl.trans(_load_rows(queries + r * D, d, D, BLOCK_K)), logits, PRECISION)
                output = _load_rows(outputs + r * D, d, D, BLOCK_K)
                upstream = dot(e.to(kind), tl.trans(output), upstream, PRECISION)
            # Small vectors are loaded tile by tile: kept, they would cost registers.
            attention = _softmax_of_heads(logits + tl.load(shifts + r)[None, :], BLOCK_N, HEADS, SLOTS)
            attention = tl.where(live[:, None], attention, 0.0)
            weighted = attention * upstream
            d_gate += tl.sum(tl.sum(weighted, axis=0), axis=0)
            of_head = tl.sum(tl.reshape(weighted, (BLOCK_N, HEADS, SLOTS)), axis=2)
            of_head = tl.broadcast_to(of_head[:, :, None], (BLOCK_N, HEADS, SLOTS))
            d_logits = gate * (weighted - attention * tl.reshape(of_head, (BLOCK_N, HEADS * SLOTS)))
            # The first tile has nothing to add to.
            limit = tl.where(start > nothing_yet, D, 0)
            d_shift = tl.load(to_shifts + r, mask=r * 0 < limit, other=0.0) + tl.sum(d_logits, axis=0)
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


# --------------------------------------------------------------------------------------------------------- launchers

MOST_ROWS = 32  # rows of G that a program holds at a time
# Programs of a multiprocessor: forward what fills it; backward no more than fit at once, as each writes its own sums.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 8, 2


class Tiles(NamedTuple):
    """Sizes that a kernel is compiled for. They follow widths, dtype and precision, never the batch."""

    GROUPS: int
    HEADS: int
    SLOTS: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def padded_sizes(num_heads: int, num_slots: int) -> tuple[int, int]:
    """Heads and slots that kernels work with: powers of two, at least 16 rows, whole groups of heads."""
    slots = triton.next_power_of_2(num_slots)
    heads = min(triton.next_power_of_2(num_heads), MOST_ROWS // slots)  # of a group
    return triton.cdiv(num_heads, heads) * heads, max(slots, 16 // heads)


def tiles(width: int, rows: int, num_slots: int, precision: str, dtype: torch.dtype, *, backward: bool) -> Tiles:
    """How the work is cut: the largest sizes tried that spill no register on any architecture the tests compile for."""
    group = min(rows, MOST_ROWS)
    heads = (rows // group, group // num_slots, num_slots)
    even = width % 32 == 0  # else the last block's mask costs registers
    if dtype == torch.float32 and precision == "ieee":
        # Products without matrix units keep both operands of a block in registers.
        return Tiles(*heads, 32, 32 if even else 16, 16 if backward else 32, 4, 1)
    if backward:
        return Tiles(*heads, 64 if even else 32, 32 if even else 16, 16, 4, 1)
    return Tiles(*heads, 64, 32, 32, 4, 1)


def _parts(x: Tensor, num_classes: int, block_n: int, programs: int) -> int:
    units = triton.cdiv(x.shape[0] * x.shape[1], block_n)
    return splits_per_class(units, num_classes, programs * processors(x.device))


def _with_rows(tokens: Tensor) -> Tensor:
    """``tokens [B, T, D]`` with any strides of samples and tokens, but a token's elements side by side."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def _forward_shapes(x, *rest):
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty((*x.shape[:2], 2), dtype=torch.float32)


@operator(
    "gated_read_forward(Tensor x, Tensor order, Tensor offsets, Tensor queries, Tensor shifts, Tensor outputs, "
    "Tensor alpha, Tensor? seed, int num_slots, float dropout) -> (Tensor, Tensor)",
    fake=_forward_shapes,
)
def gated_read_forward(
    x: Tensor, order: Tensor, offsets: Tensor, queries: Tensor, shifts: Tensor, outputs: Tensor,
    alpha: Tensor, seed: Tensor | None, num_slots: int, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``x [B, T, D]`` with ``queries, outputs [K, H·S, D]``, ``shifts [K, H·S]`` to ``y`` and ``statistics [B, T, 2]``.

    Heads and slots are padded as :func:`padded_sizes` says; ``num_slots`` is the padded ``S``.
    """
    x = _with_rows(x)
    y, statistics = _forward_shapes(x)
    num_classes, rows, width = queries.shape
    precision = input_precision(queries.dtype)
    t = tuned("gated_read_forward", tiles(width, rows, num_slots, precision, queries.dtype, backward=False))
    parts = _parts(x, num_classes, t.BLOCK_N, FORWARD_PROGRAMS)
    launch(
        gated_read_forward_kernel, (parts, num_classes), x.device,
        x, order, offsets, queries, shifts, outputs, alpha, seed, y, statistics,
        *x.stride()[:2], *x.shape[1:], parts, dropout, LN_EPS, D=width,
        DROPOUT=seed is not None, PRECISION=precision, **t._asdict(),
    )  # fmt: skip
    return y, statistics


def _partial_sizes(queries: Tensor) -> tuple[int, int, int, int]:
    """Widths of a row of partial sums: ``∂G``, ``∂P``, ``∂g``, ``∂α``."""
    _, rows, width = queries.shape
    return rows * width, rows * width, rows, 1


def _backward_shapes(x, order, offsets, queries, *rest):
    sums = queries.new_empty((queries.shape[0], sum(_partial_sizes(queries))), dtype=torch.float32)
    return x.new_empty(x.shape), sums


@operator(
    "gated_read_backward(Tensor x, Tensor order, Tensor offsets, Tensor queries, Tensor shifts, Tensor outputs, "
    "Tensor alpha, Tensor? seed, Tensor statistics, Tensor dy, int num_slots, float dropout) -> (Tensor, Tensor)",
    fake=_backward_shapes,
)
def gated_read_backward(
    x: Tensor, order: Tensor, offsets: Tensor, queries: Tensor, shifts: Tensor, outputs: Tensor, alpha: Tensor,
    seed: Tensor | None, statistics: Tensor, dy: Tensor, num_slots: int, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of ``x``, and for every class the sums of :func:`_partial_sizes` side by side, in fp32."""
    x, dy = _with_rows(x), _with_rows(dy)
    num_classes, rows, width = queries.shape
    precision = input_precision(queries.dtype)
    t = tuned("gated_read_backward", tiles(width, rows, num_slots, precision, queries.dtype, backward=True))
    parts = _parts(x, num_classes, t.BLOCK_N, BACKWARD_PROGRAMS)
    partials = x.new_empty((num_classes, parts, sum(_partial_sizes(queries))), dtype=torch.float32)
    # Several groups of heads add to dx, which should not be rounded in between.
    dx = x.new_empty(x.shape, dtype=torch.float32 if t.GROUPS > 1 else x.dtype)
    launch(
        gated_read_backward_kernel, (parts, num_classes), x.device,
        x, order, offsets, queries, shifts, outputs, alpha, seed, statistics,
        queries.sum(dim=2, dtype=torch.float32), dy, dx, partials,
        *x.stride()[:2], *dy.stride()[:2], *x.shape[1:], parts, dropout,
        D=width, DROPOUT=seed is not None, PRECISION=precision, **t._asdict(),
    )  # fmt: skip
    return dx.to(x.dtype), partials.sum(dim=1)


# One opaque call each for torch.compile: the number of chunks follows the batch.
NETWORK = "Tensor alpha, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, Tensor norm, Tensor norm_bias"


@operator(
    f"feed_forward_forward(Tensor y, {NETWORK}, ScalarType product_dtype) -> Tensor",
    fake=lambda y, *rest: torch.empty_like(y),
)
def feed_forward_forward(y, *net_and_dtype):
    *net, product_dtype = net_and_dtype
    return feed_forward_in_chunks(y.flatten(0, 1), tuple(net), product_dtype).view(y.shape)


@operator(
    f"feed_forward_gradients(Tensor y, Tensor upstream, {NETWORK}, ScalarType product_dtype, bool frozen) -> Tensor[]",
    fake=lambda y, upstream, *rest: [torch.empty_like(t) for t in ((y,) if rest[-1] else (y, *rest[:-2]))],
)
def feed_forward_gradients(y, upstream, *net_and_options):
    *net, product_dtype, frozen = net_and_options
    upstream = upstream.reshape(-1, y.shape[-1])
    dy, *d_net = feed_forward_backward(y.flatten(0, 1), upstream, tuple(net), product_dtype, frozen=frozen)
    return [dy.view(y.shape), *d_net]


# ------------------------------------------------------------------------------------------------- autograd.Function


def _read_gradients(read: tuple[Any, ...], statistics: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of every one of :func:`_read_inputs`."""
    *tensors, num_slots, dropout = read
    queries = tensors[3]
    dx, sums = gated_read_backward(*tensors, statistics, dy, num_slots, dropout)
    d_queries, d_outputs, d_shifts, d_alpha = sums.split(_partial_sizes(queries), dim=1)
    d_queries, d_outputs = (t.reshape(queries.shape).to(queries.dtype) for t in (d_queries, d_outputs))
    return dx, None, None, d_queries, d_shifts, d_outputs, d_alpha.sum(), None, None, None


class _GatedRead(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx, *read):
        y, statistics = gated_read_forward(*read)
        ctx.save_for_backward(*read[:-2], statistics)
        ctx.options = read[-2:]
        return y

    @staticmethod
    @custom_bwd(device_type="cuda")
    @once_differentiable
    def backward(ctx, dy):
        *tensors, statistics = ctx.saved_tensors
        return _read_gradients((*tensors, *ctx.options), statistics, dy)


READ_INPUTS = 10  # arguments of gated_read_forward


class _CrossAttention(torch.autograd.Function):
    """Read and feed-forward. Of what is as large as the tokens, only these are kept: the read is done again."""

    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx, *inputs):
        read, net = inputs[:READ_INPUTS], inputs[READ_INPUTS:]
        y, _ = gated_read_forward(*read)
        ctx.save_for_backward(*read[:-2], *net)
        ctx.options = read[-2:]
        return feed_forward_forward(y, *net, read[3].dtype)

    @staticmethod
    @custom_bwd(device_type="cuda")
    @once_differentiable
    def backward(ctx, upstream):
        tensors, net = ctx.saved_tensors[: READ_INPUTS - 2], ctx.saved_tensors[READ_INPUTS - 2 :]
        read = (*tensors, *ctx.options)
        y, statistics = gated_read_forward(*read)
        frozen = not any(ctx.needs_input_grad[READ_INPUTS:])
        dy, *d_net = feed_forward_gradients(y, upstream, *net, read[3].dtype, frozen)
        return (*_read_gradients(read, statistics, dy), *(d_net or [None] * len(net)))


def _padded(rows: Tensor, num_heads: int, heads: int, slots: int, value: float) -> Tensor:
    """``[K, H·S, D]`` to ``[K, heads·slots, D]``."""
    by_head = rows.unflatten(1, (num_heads, -1))
    return F.pad(by_head, (0, 0, 0, slots - by_head.shape[2], 0, heads - num_heads), value=value).flatten(1, 2)


def _read_inputs(
    tokens: Tensor, slots: Tensor, groups: ClassGroups, weights: CrossAttentionWeights, num_heads: int, dropout: float,
    product_dtype: torch.dtype | None,
) -> tuple[Any, ...]:  # fmt: skip
    """What the kernels take: the foldings in front of them, the padding of heads and slots, dropout's seed."""
    w = weights
    width = tokens.shape[-1]
    context = F.layer_norm(slots, (width,), w.ln_kv_weight, w.ln_kv_bias)
    queries, outputs = absorb(context, w, num_heads)
    seed = None
    if dropout > 0:
        # Drawn on the device: no synchronization, and another draw at every replay of a captured graph.
        seed = torch.randint(2**31 - 1, (1,), device=tokens.device)
    shifts = queries @ w.ln_q_bias
    queries, outputs = queries * w.ln_q_weight, outputs + w.proj_bias / num_heads
    heads, num_slots = padded_sizes(num_heads, slots.shape[1])
    if (heads, num_slots) != (num_heads, slots.shape[1]):
        # A slot that only pads is never attended to; a head that only pads reads zeros.
        queries, outputs = (_padded(t, num_heads, heads, num_slots, 0.0) for t in (queries, outputs))
        shifts = _padded(shifts[:, :, None], num_heads, heads, num_slots, PADDING_LOGIT)[:, :, 0]
    queries, outputs = (t.to(product_dtype or tokens.dtype) for t in (queries, outputs))
    return tokens, groups.order, groups.offsets, queries, shifts, outputs, w.alpha_xattn, seed, num_slots, dropout


def gated_read(
    tokens: Tensor, slots: Tensor, groups: ClassGroups, weights: CrossAttentionWeights, num_heads: int, dropout: float,
    product_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``y [B, T, D]`` in fp32: ``tokens [B, T, D]`` after ``slots [K, S, D]``, without the feed-forward."""
    y: Tensor = _GatedRead.apply(*_read_inputs(tokens, slots, groups, weights, num_heads, dropout, product_dtype))
    return y


def cross_attention(
    tokens: Tensor, slots: Tensor, groups: ClassGroups, weights: CrossAttentionWeights, num_heads: int, dropout: float,
    product_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``tokens [B, T, D]`` read ``slots [K, S, D]`` of their own class; returns ``[B, T, D]`` in fp32."""
    result: Tensor = _CrossAttention.apply(
        *_read_inputs(tokens, slots, groups, weights, num_heads, dropout, product_dtype), *network(weights)
    )
    return result
