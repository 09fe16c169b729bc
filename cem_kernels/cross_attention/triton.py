"""Gated cross attention in Triton: ``kernels.py`` reads the slots, library products feed forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from cem_kernels.cross_attention.kernels import gated_read_backward_kernel, gated_read_forward_kernel
from cem_kernels.cross_attention.weights import CrossAttentionWeights, absorb
from cem_kernels.groups import ClassGroups
from cem_kernels.triton_utils import (
    LN_EPS,
    backward_once,
    input_precision,
    launch,
    operator,
    processors,
    splits_per_class,
    tuned,
    with_rows,
)

PADDING_LOGIT = -1e30  # finite, so that a head of nothing but padding is no NaN

# --------------------------------------------------------------------------------------------------------- launchers

MOST_ROWS = 32  # rows of G that a program holds at a time
# Programs of a multiprocessor: forward what fills it; backward no more than fit at once, as each writes its own sums.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 8, 2
# Triton 3.6 spills in wider blocks, and on sm_100 does not compile the larger tiles of the backward.
OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


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
        if heads[0] > 1 and not backward:
            return Tiles(*heads, 32, 16, 16, 4, 1)
        wide = even and not (backward and OLDER)
        return Tiles(*heads, 32, 32 if wide else 16, 16 if backward or OLDER else 32, 4, 1)
    if even and OLDER:
        return Tiles(*heads, 32, 16, 16, 4, 2) if backward else Tiles(*heads, 64, 32, 16, 4, 1)
    if backward:
        return Tiles(*heads, 64 if even else 32, 32 if even else 16, 16, 4, 1)
    return Tiles(*heads, 64, *((32, 32) if even or OLDER else (16, 16)), 4, 1)


def _parts(x: Tensor, num_classes: int, block_n: int, programs: int) -> int:
    units = triton.cdiv(x.shape[0] * x.shape[1], block_n)
    return splits_per_class(units, num_classes, programs * processors(x.device))


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
    x = with_rows(x)
    y, statistics = _forward_shapes(x)
    num_classes, rows, width = queries.shape
    precision = input_precision(queries.dtype)
    t = tuned("gated_read_forward", tiles(width, rows, num_slots, precision, queries.dtype, backward=False))
    parts = _parts(x, num_classes, t.BLOCK_N, FORWARD_PROGRAMS)
    launch(
        gated_read_forward_kernel, (parts, num_classes), x.device,
        x, order, offsets, queries, shifts, outputs, alpha, seed, y, statistics,
        *x.stride()[:2], *x.shape, parts, dropout, LN_EPS, D=width,
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
    x, dy = with_rows(x), with_rows(dy)
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
        *x.stride()[:2], *dy.stride()[:2], *x.shape, parts, dropout,
        D=width, DROPOUT=seed is not None, PRECISION=precision, **t._asdict(),
    )  # fmt: skip
    return dx.to(x.dtype), partials.sum(dim=1)


# ------------------------------------------------------------------------------------------------------- feed-forward

CHUNK = 2**12  # tokens whose hidden layers are in memory at a time: small enough for the L2 cache
NETWORK = "Tensor alpha, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, Tensor norm, Tensor norm_bias"


def network(weights: CrossAttentionWeights) -> tuple[Tensor, ...]:
    """The weights of the feed-forward network, in the order of :data:`NETWORK`."""
    w = weights
    norm = w.ln_ff_weight, w.ln_ff_bias
    return w.alpha_ffn, w.ffn_in_weight, w.ffn_in_bias, w.ffn_out_weight, w.ffn_out_bias, *norm


# One opaque call each for torch.compile: the number of chunks follows the batch.
@operator(
    f"feed_forward_forward(Tensor y, Tensor counts, {NETWORK}, ScalarType product_dtype) -> Tensor",
    fake=lambda y, *rest: torch.empty_like(y),
)
def feed_forward_forward(y: Tensor, counts: Tensor, *net_and_dtype: Any) -> Tensor:
    """``y + tanh(α_f) · FFN(LN_f(y))`` of ``y [B, T, D]``, never with more than ``CHUNK`` hidden layers in memory.

    ``counts [B]`` is one for samples that count and zero for others, whose ``y`` is zero and stays so.
    """
    *net, product_dtype = net_and_dtype
    alpha, in_weight, in_bias, out_weight, out_bias, norm_weight, norm_bias = net
    in_weight, in_bias, out_weight, out_bias = (
        weight.to(product_dtype) for weight in (in_weight, in_bias, out_weight, out_bias)
    )
    result, width = torch.empty_like(y), y.shape[-1:]
    gates = (torch.tanh(alpha) * counts)[:, None].expand(y.shape[:2]).reshape(-1, 1)
    parts = (t.flatten(0, 1).split(CHUNK) for t in (y, gates[:, None], result))
    for rows, gate, out in zip(*parts, strict=True):
        hidden = F.layer_norm(rows, width, norm_weight, norm_bias, LN_EPS).to(product_dtype)
        hidden = F.gelu(F.linear(hidden, in_weight, in_bias))
        torch.addcmul(rows, gate, F.linear(hidden, out_weight, out_bias).to(y.dtype), out=out)
    return result


@operator(
    f"feed_forward_backward(Tensor y, Tensor upstream, Tensor counts, {NETWORK}, ScalarType product_dtype, bool frozen)"
    " -> Tensor[]",
    fake=lambda y, upstream, counts, *rest: [torch.empty_like(t) for t in ((y,) if rest[-1] else (y, *rest[:-2]))],
)
def feed_forward_backward(y: Tensor, upstream: Tensor, counts: Tensor, *net_and_options: Any) -> list[Tensor]:
    """Gradients of ``y [B, T, D]`` and, unless ``frozen``, of the network, from the forward's input alone.

    Chunk by chunk the hidden layer is computed again: one more matrix product, and nothing ``4D`` wide is kept from the
    forward. Sums over chunks are in the dtype of ``y``.
    """
    *net, product_dtype, frozen = net_and_options
    alpha, in_weight, in_bias, out_weight, out_bias, norm_weight, norm_bias = net
    gate, dy, width = torch.tanh(alpha), torch.empty_like(y), y.shape[-1:]
    wide_in, wide_out = in_weight.to(product_dtype), out_weight.to(product_dtype)
    sums = [] if frozen else [torch.zeros_like(weight) for weight in net[1:]]
    upstream = torch.where(counts[:, None, None] > 0, upstream, 0)
    parts = (t.flatten(0, 1).split(CHUNK) for t in (y, upstream, dy))
    for rows, above, below in zip(*parts, strict=True):
        normal, mean, rstd = torch.native_layer_norm(rows, width, norm_weight, norm_bias, LN_EPS)
        normal, low = normal.to(product_dtype), above.to(product_dtype)
        before = F.linear(normal, wide_in, in_bias.to(product_dtype))
        d_before = torch.ops.aten.gelu_backward(low @ wide_out, before) * gate.to(product_dtype)
        d_rows, *d_norm = torch.ops.aten.native_layer_norm_backward(
            (d_before @ wide_in).to(y.dtype), rows, width, mean, rstd, norm_weight, norm_bias,
            [True, not frozen, not frozen],
        )  # fmt: skip
        torch.add(above, d_rows, out=below)
        if not frozen:
            d_in, d_in_bias = d_before.t() @ normal, d_before.sum(dim=0, dtype=y.dtype)
            d_out, d_out_bias = low.t() @ F.gelu(before), above.sum(dim=0)  # without the gate
            for total, part in zip(sums, (d_in, d_in_bias, d_out, d_out_bias, *d_norm), strict=True):
                total += part
    if frozen:
        return [dy]
    d_in, d_in_bias, d_out, d_out_bias, *d_norm = sums
    # Σ_n ∂out · FFN(y) over the gate, without another pass over the tokens.
    d_alpha = ((d_out * out_weight).sum() + d_out_bias @ out_bias) * (1 - gate * gate)
    return [dy, d_alpha, d_in, d_in_bias, d_out * gate, d_out_bias * gate, *d_norm]


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
    """Of :func:`_read_inputs`, to ``y`` and the tokens' statistics."""

    @staticmethod
    def forward(*read: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = gated_read_forward(*read)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-2], output[1])
        ctx.options = inputs[-2:]

    @staticmethod
    @backward_once
    def backward(ctx, dy, _):
        *tensors, statistics = ctx.saved_tensors
        return _read_gradients((*tensors, *ctx.options), statistics, dy)


READ_INPUTS = 10  # arguments of gated_read_forward


class _CrossAttention(torch.autograd.Function):
    """Read and feed-forward. Of what is as large as the tokens, only these are kept: the read is done again."""

    @staticmethod
    def forward(counts: Tensor, *inputs: Any) -> Tensor:
        read, net = inputs[:READ_INPUTS], inputs[READ_INPUTS:]
        y, _ = gated_read_forward(*read)
        result: Tensor = feed_forward_forward(y, counts, *net, read[3].dtype)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        counts, *tensors, num_slots, dropout = inputs[: READ_INPUTS + 1]
        ctx.save_for_backward(counts, *tensors, *inputs[READ_INPUTS + 1 :])
        ctx.options = num_slots, dropout

    @staticmethod
    @backward_once
    def backward(ctx, upstream):
        counts, *tensors = ctx.saved_tensors
        tensors, net = tensors[: READ_INPUTS - 2], tensors[READ_INPUTS - 2 :]
        read = (*tensors, *ctx.options)
        y, statistics = gated_read_forward(*read)
        frozen = not any(ctx.needs_input_grad[READ_INPUTS + 1 :])
        dy, *d_net = feed_forward_backward(y, upstream, counts, *net, read[3].dtype, frozen)
        return (None, *_read_gradients(read, statistics, dy), *(d_net or [None] * len(net)))


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
    y, _ = _GatedRead.apply(*_read_inputs(tokens, slots, groups, weights, num_heads, dropout, product_dtype))
    return y


def cross_attention(
    tokens: Tensor, slots: Tensor, groups: ClassGroups, weights: CrossAttentionWeights, num_heads: int, dropout: float,
    product_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``tokens [B, T, D]`` read ``slots [K, S, D]`` of their own class; returns ``[B, T, D]`` in fp32."""
    counts = (groups.labels < groups.num_classes).to(torch.float32)
    result: Tensor = _CrossAttention.apply(
        counts, *_read_inputs(tokens, slots, groups, weights, num_heads, dropout, product_dtype), *network(weights)
    )
    return result
