"""Slot attention over class groups in Triton: all classes and all iterations in one launch forward and one backward.

With the projections absorbed (``weights.absorb``: ``M = W_qᵀ W_k``, scale included, and ``V = W_ih W_v``) and ``x̂`` the
normalised tokens of a class, ``g, b`` the affine of their norm, an iteration is

    q = LN_s(s) M      l = x̂ (g ∘ q)ᵀ + q·b      p = softmax over slots (l)
    A = Σ_n (p + eps)      Û = Σ_n (p + eps) x̂ / A
    s' = GRU(V (g ∘ Û + b), s)      s ← s' + MLP(LN_m(s'))

and its backward, with ``G = ∂Û`` and ``w = (p + eps) / A``,

    ∂a = (x̂·G − Û·G) / A      ∂l = p (∂a − Σ_s p ∂a)
    ∂(g ∘ q) = Σ_n ∂l x̂      ∂(q·b) = Σ_n ∂l      ∂x̂ = Σ_s w G + ∂l (g ∘ q)

Attention is computed again; rows of slots are kept (``rows.py`` says which). The backward writes the gradients of all
products' results, ``J·K·S`` rows, and one matrix product each makes the weights' gradients of them, outside.

**Two regimes.** With few tokens a class one program does all of it for its classes. With many, that would leave most of
the device idle: then tokens are split over programs, which add to sums of their own, and a second kernel adds these up
in their order and steps the slots. :func:`tokens_are_split` chooses, from sizes that the host knows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from cem_kernels.groups import ClassGroups
from cem_kernels.launching import (
    ALL_REGISTERS,
    input_precision,
    launch,
    operator,
    processors,
    splits_per_class,
    tuned,
)
from cem_kernels.slot_attention.rows import (
    collect_updates,
    copy_rows,
    make_queries,
    make_queries_backward,
    step_slots,
    step_slots_backward,
)
from cem_kernels.slot_attention.tokens import attend, attend_backward, rows_of_classes, token_statistics
from cem_kernels.slot_attention.weights import SlotAttentionWeights, absorb

LN_EPS = 1e-5  # F.layer_norm's

# ---------------------------------------------------------------------------------------------------------- kernels

VARYING = ["T", "num_classes", "num_slots", "num_iterations", "iteration", "num_parts"]


@triton.jit
def _filled(offsets, c, live):
    """Which rows' classes have tokens."""
    return tl.load(offsets + c + 1, mask=live, other=0) > tl.load(offsets + c, mask=live, other=0)


@triton.jit
def _tile_of_rows(offsets, num_classes, num_slots, ROWS: tl.constexpr):
    """This program's rows, whether they exist, and whether their classes have tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_classes * num_slots
    return row.to(tl.int64), live, _filled(offsets, row // num_slots, live)


@triton.jit(do_not_specialize=VARYING)
def slot_attention_forward_kernel(
    x, order, offsets, initial, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors,
    slots, floats, operands, stats, statistics,
    stride_b, stride_t, T, width, hidden_width, num_classes, num_slots, num_iterations, eps, ln_eps,
    D: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All iterations. Grid: groups of ``CLASSES`` classes."""
    ROWS: tl.constexpr = CLASSES * SLOTS
    first_class = tl.program_id(0) * CLASSES
    row, c, live = rows_of_classes(first_class, num_classes, num_slots, SLOTS, ROWS)
    filled = _filled(offsets, c, live)
    input_norm = vectors + 7 * D + HIDDEN
    copy_rows(initial + row * D, slots + row * D, live, width, D, BLOCK_D)
    token_statistics(
        x, order, offsets, statistics, stride_b, stride_t, first_class, num_classes, 0, 1, T, width, ln_eps,
        D, CLASSES, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    for _ in range(num_iterations):
        s, f, o, t = slots + row * D, floats + row * (6 * D), operands + row * (3 * D + HIDDEN), stats + row * 6
        make_queries(s, f, o, t, live, query_map, vectors, width, ln_eps, ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D)
        attend(
            x, order, offsets, statistics, f, o, t, live, input_norm, f + D, t + 5,
            stride_b, stride_t, first_class, num_classes, 0, 1, T, width, eps,
            D, PRECISION, SLOTS, CLASSES, ROWS, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        collect_updates(f + D, t + 5, f, o, t, live, vectors, width, 1, 0, ROWS, D, HIDDEN, BLOCK_D)
        row += num_classes * num_slots
        step_slots(
            s, slots + row * D, f, o, t, live, filled, input_map, hidden_map, mlp_in, mlp_out, vectors,
            width, hidden_width, ln_eps, ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def slot_attention_backward_kernel(
    x, order, offsets, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors,
    slots, floats, operands, stats, statistics, upstream, d_slots, records, work, sums, dx,
    stride_b, stride_t, T, width, hidden_width, num_classes, num_slots, num_iterations, eps,
    D: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All iterations, the last one first; ``dx [B, T, D]`` is contiguous fp32. Grid: as forward."""
    ROWS: tl.constexpr = CLASSES * SLOTS
    first_class = tl.program_id(0) * CLASSES
    row, c, live = rows_of_classes(first_class, num_classes, num_slots, SLOTS, ROWS)
    filled = _filled(offsets, c, live)
    ds, w = d_slots + row * D, work + row * (3 * D + 4)
    sums += tl.program_id(0).to(tl.int64) * (13 * D + HIDDEN)
    copy_rows(upstream + row * D, ds, live, width, D, BLOCK_D)
    row += (num_iterations - 1).to(tl.int64) * num_classes * num_slots
    for step in range(num_iterations):
        s, f, o, t = slots + row * D, floats + row * (6 * D), operands + row * (3 * D + HIDDEN), stats + row * 6
        r = records + row * (6 * D + HIDDEN)
        step_slots_backward(
            s, f, o, t, ds, r, w, live, filled, step == 0, input_map, hidden_map, mlp_in, mlp_out, vectors, sums,
            width, hidden_width, ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        attend_backward(
            x, order, offsets, statistics, f, o, t, w, live, vectors + 7 * D + HIDDEN, w + 2 * D, w + 3 * D + 2, dx,
            stride_b, stride_t, first_class, num_classes, 0, 1, T, width, eps, step == 0,
            D, PRECISION, SLOTS, CLASSES, ROWS, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        make_queries_backward(
            w + 2 * D, w + 3 * D + 2, s, f, t, ds, r, w, live, step == 0, query_map, vectors, sums,
            width, 1, 0, ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        row -= num_classes * num_slots


@triton.jit(do_not_specialize=VARYING)
def attend_kernel(
    x, order, offsets, vectors, floats, operands, stats, statistics, partials,
    stride_b, stride_t, T, width, num_classes, num_slots, iteration, num_parts, eps, ln_eps,
    D: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A part of the tokens into ``partials [parts, K·S, D + 4]``, an iteration. Grid: parts × groups of classes."""
    ROWS: tl.constexpr = CLASSES * SLOTS
    part = tl.program_id(0)
    first_class = tl.program_id(1) * CLASSES
    row, _, live = rows_of_classes(first_class, num_classes, num_slots, SLOTS, ROWS)
    if iteration == 0:
        token_statistics(
            x, order, offsets, statistics, stride_b, stride_t, first_class, num_classes, part, num_parts, T, width,
            ln_eps, D, CLASSES, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    mine = partials + (part.to(tl.int64) * num_classes * num_slots + row) * (D + 4)
    row += iteration.to(tl.int64) * num_classes * num_slots
    attend(
        x, order, offsets, statistics, floats + row * (6 * D), operands, stats + row * 6, live,
        vectors + 7 * D + HIDDEN, mine, mine + D,
        stride_b, stride_t, first_class, num_classes, part, num_parts, T, width, eps,
        D, PRECISION, SLOTS, CLASSES, ROWS, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def step_kernel(
    offsets, initial, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors,
    slots, floats, operands, stats, partials,
    width, hidden_width, num_classes, num_slots, num_iterations, iteration, num_parts, ln_eps,
    D: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The end of the iteration before, if there was one, and the queries of ``iteration``, if there is one to come.

    Grid: tiles of ``ROWS`` of all ``K·S`` slots.
    """
    row, live, filled = _tile_of_rows(offsets, num_classes, num_slots, ROWS)
    rows = num_classes.to(tl.int64) * num_slots
    here = row + iteration * rows
    if iteration == 0:
        copy_rows(initial + row * D, slots + row * D, live, width, D, BLOCK_D)
    else:
        before = here - rows
        f, o, t = floats + before * (6 * D), operands + before * (3 * D + HIDDEN), stats + before * 6
        collect_updates(
            partials + row * (D + 4), partials + row * (D + 4) + D, f, o, t, live, vectors, width,
            num_parts, rows * (D + 4), ROWS, D, HIDDEN, BLOCK_D,
        )  # fmt: skip
        step_slots(
            slots + before * D, slots + here * D, f, o, t, live, filled,
            input_map, hidden_map, mlp_in, mlp_out, vectors, width, hidden_width, ln_eps,
            ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    if iteration < num_iterations:
        make_queries(
            slots + here * D, floats + here * (6 * D), operands + here * (3 * D + HIDDEN), stats + here * 6, live,
            query_map, vectors, width, ln_eps, ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def attend_backward_kernel(
    x, order, offsets, vectors, floats, operands, stats, statistics, work, partials, dx,
    stride_b, stride_t, T, width, num_classes, num_slots, num_iterations, iteration, num_parts, eps,
    D: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward of :func:`attend_kernel`, with sums of its own for the queries' gradients. Grid: as forward."""
    ROWS: tl.constexpr = CLASSES * SLOTS
    part = tl.program_id(0)
    first_class = tl.program_id(1) * CLASSES
    row, _, live = rows_of_classes(first_class, num_classes, num_slots, SLOTS, ROWS)
    mine = partials + (part.to(tl.int64) * num_classes * num_slots + row) * (D + 4)
    w = work + row * (3 * D + 4)
    row += iteration.to(tl.int64) * num_classes * num_slots
    attend_backward(
        x, order, offsets, statistics, floats + row * (6 * D), operands, stats + row * 6, w, live,
        vectors + 7 * D + HIDDEN, mine, mine + D, dx,
        stride_b, stride_t, first_class, num_classes, part, num_parts, T, width, eps,
        iteration == num_iterations - 1,
        D, PRECISION, SLOTS, CLASSES, ROWS, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def step_backward_kernel(
    offsets, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors,
    slots, floats, operands, stats, partials, upstream, d_slots, records, work, sums,
    width, hidden_width, num_classes, num_slots, num_iterations, iteration, num_parts,
    D: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward of :func:`step_kernel`: the queries of ``iteration``, then the end of the iteration before."""
    row, live, filled = _tile_of_rows(offsets, num_classes, num_slots, ROWS)
    rows = num_classes.to(tl.int64) * num_slots
    here = row + iteration * rows
    ds, w = d_slots + row * D, work + row * (3 * D + 4)
    sums += tl.program_id(0).to(tl.int64) * (13 * D + HIDDEN)
    if iteration == num_iterations:
        copy_rows(upstream + row * D, ds, live, width, D, BLOCK_D)
    else:
        make_queries_backward(
            partials + row * (D + 4), partials + row * (D + 4) + D,
            slots + here * D, floats + here * (6 * D), stats + here * 6, ds, records + here * (6 * D + HIDDEN), w, live,
            iteration == num_iterations - 1, query_map, vectors, sums, width, num_parts, rows * (D + 4),
            ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    if iteration > 0:
        before = here - rows
        step_slots_backward(
            slots + before * D, floats + before * (6 * D), operands + before * (3 * D + HIDDEN), stats + before * 6, ds,
            records + before * (6 * D + HIDDEN), w, live, filled, iteration == num_iterations,
            input_map, hidden_map, mlp_in, mlp_out, vectors, sums, width, hidden_width,
            ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- launchers

BYTES_OF_A_PROGRAM = 2**18  # of tokens, that one program reads in about the time that two more launches take
# Rows of a product without matrix units; older versions of Triton ask for 16 all the same.
FEWEST_ROWS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3) else 16
PROGRAMS_PER_PROCESSOR, TOKENS_OF_A_PART = 2, 64


class Tiles(NamedTuple):
    """Sizes that a kernel is compiled for. They follow widths, slots, dtype and precision, never the batch."""

    BLOCK_N: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def padded_slots(num_slots: int, precision: str, dtype: torch.dtype) -> tuple[int, int]:
    """``SLOTS`` and ``CLASSES`` of a program: a power of two, and as many as make up the fewest rows of a product."""
    slots = triton.next_power_of_2(num_slots)
    fewest = FEWEST_ROWS if dtype == torch.float32 and precision == "ieee" else 16  # a matrix unit's
    return slots, max(1, fewest // slots)


def tiles(kernel: str, width: int, rows: int, precision: str, dtype: torch.dtype) -> Tiles:
    """How the work is cut: the largest sizes tried that spill no register on any architecture the tests compile for.

    Wide blocks matter most: a program waits for memory in every loop over ``BLOCK_K``, and blocks of columns decide how
    many such loops there are.

    Args:
        kernel: its name, without ``_kernel``.
        width: ``D``.
        rows: ``CLASSES · SLOTS``, 8 to 32.
        precision, dtype: of the products.
    """
    few = rows <= 16
    even = width % 64 == 0  # else the last block's mask costs registers
    wide = width % 128 == 0 and not kernel.endswith("_backward")
    if dtype == torch.float32:
        # Without matrix units both operands of a block are in registers; with them, twice the bytes are in flight.
        columns = 128 if wide and rows == 8 else 64 if even and few else 32
        t = Tiles(16, 32 if even and few else 16, columns, 8, 2 if precision == "ieee" else 3)
    else:
        t = Tiles(32, 32 if few else 16, 128 if wide and few else 64, 8, 3)
        if kernel == "attend":
            t = t._replace(BLOCK_N=64)
        elif kernel.endswith("_backward"):
            t = Tiles(16, 16, 64, 8, 3) if few else Tiles(16, 32, 32, 8, 3)
    most = triton.next_power_of_2(width)
    return t._replace(BLOCK_K=min(t.BLOCK_K, most), BLOCK_D=min(t.BLOCK_D, most))


def tokens_are_split(x: Tensor, groups: int) -> bool:
    """Whether programs share the tokens of a class, given the ``groups`` of classes that otherwise have one each.

    They do where a class has so many tokens, on average, that one program takes longer over them than the additional
    launches do, and where one program a group would leave processors idle. Sizes of single classes are on the device:
    one large class among many small ones goes unnoticed.
    """
    return x.numel() * x.element_size() > groups * BYTES_OF_A_PROGRAM and groups < processors(x.device)


class Plan(NamedTuple):
    """How a call is cut: groups of classes, parts of a group's tokens (0: one program does it all), tiles of slots."""

    groups: int
    parts: int
    tiles: int
    rows: int
    by_class: dict[str, int]
    sizes: dict[str, Any]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, num_classes: int, num_slots: int, mlp_in: Tensor) -> Plan:
        dtype, hidden_width = mlp_in.dtype, mlp_in.shape[0]
        precision = input_precision(dtype)
        slots, classes = padded_slots(num_slots, precision, dtype)
        rows, groups, parts = slots * classes, triton.cdiv(num_classes, classes), 0
        if tokens_are_split(x, groups):
            units = triton.cdiv(x.shape[0] * x.shape[1], TOKENS_OF_A_PART)
            parts = splits_per_class(units, groups, PROGRAMS_PER_PROCESSOR * processors(x.device))
        tiles_of_slots = triton.cdiv(num_classes * num_slots, rows) if parts else groups
        sizes = {"D": x.shape[2], "HIDDEN": hidden_width, "PRECISION": precision}
        return cls(groups, parts, tiles_of_slots, rows, {"SLOTS": slots, "CLASSES": classes}, sizes, dtype)

    def options(self, kernel: str) -> dict[str, Any]:
        """What ``kernel`` is compiled for."""
        t = tuned(kernel, tiles(kernel, self.sizes["D"], self.rows, self.sizes["PRECISION"], self.dtype))._asdict()
        if kernel.startswith("step"):
            del t["BLOCK_N"]
            return {**self.sizes, "ROWS": self.rows, **t, **ALL_REGISTERS}
        return {**self.sizes, **self.by_class, **t, **ALL_REGISTERS}


def _with_rows(tokens: Tensor) -> Tensor:
    """``tokens [B, T, D]`` with any strides of samples and tokens, but a token's elements side by side."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def _kept_shapes(x, initial, mlp_in, num_iterations):
    (num_classes, num_slots, width), hidden = initial.shape, mlp_in.shape[0]
    wide = {"dtype": torch.float32}
    return (
        x.new_empty((num_iterations + 1, num_classes, num_slots, width), **wide),
        x.new_empty((num_iterations, num_classes * num_slots, 6 * width), **wide),
        mlp_in.new_empty((num_iterations, num_classes * num_slots, 3 * width + hidden)),
        x.new_empty((num_iterations, num_classes * num_slots, 6), **wide),
        x.new_empty((*x.shape[:2], 2), **wide),
    )


def _forward_shapes(x, order, offsets, initial, query_map, input_map, hidden_map, mlp_in, mlp_out, *rest):
    return _kept_shapes(x, initial, mlp_in, rest[1])


@operator(
    "slot_attention_forward(Tensor x, Tensor order, Tensor offsets, Tensor initial, Tensor query_map, "
    "Tensor input_map, Tensor hidden_map, Tensor mlp_in, Tensor mlp_out, Tensor vectors, int num_iterations, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_shapes,
)
def slot_attention_forward(
    x: Tensor, order: Tensor, offsets: Tensor, initial: Tensor, query_map: Tensor, input_map: Tensor,
    hidden_map: Tensor, mlp_in: Tensor, mlp_out: Tensor, vectors: Tensor, num_iterations: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``x [B, T, D]`` and ``initial [K, S, D]`` to all slots ``[J + 1, K, S, D]``, and what the backward needs.

    Matrices are in the dtype of products; ``vectors [13D + hidden]`` are the others of :class:`SlotAttentionWeights`,
    in their order, in fp32, as ``initial`` is.
    """
    x, initial = _with_rows(x), initial.contiguous()
    num_classes, num_slots, width = initial.shape
    hidden_width = mlp_in.shape[0]
    slots, floats, operands, stats, statistics = kept = _kept_shapes(x, initial, mlp_in, num_iterations)
    weights = (query_map, input_map, hidden_map, mlp_in, mlp_out, vectors)
    plan = Plan.of(x, num_classes, num_slots, mlp_in)
    if plan.parts == 0:
        launch(
            slot_attention_forward_kernel, (plan.groups,), x.device,
            x, order, offsets, initial, *weights, *kept,
            *x.stride()[:2], x.shape[1], width, hidden_width, num_classes, num_slots, num_iterations, eps, LN_EPS,
            **plan.options("slot_attention_forward"),
        )  # fmt: skip
        return kept
    partials = x.new_empty((plan.parts, num_classes * num_slots, width + 4), dtype=torch.float32)
    for iteration in range(num_iterations + 1):
        launch(
            step_kernel, (plan.tiles,), x.device,
            offsets, initial, *weights, slots, floats, operands, stats, partials,
            width, hidden_width, num_classes, num_slots, num_iterations, iteration, plan.parts, LN_EPS,
            **plan.options("step"),
        )  # fmt: skip
        if iteration < num_iterations:
            launch(
                attend_kernel, (plan.parts, plan.groups), x.device,
                x, order, offsets, vectors, floats, operands, stats, statistics, partials,
                *x.stride()[:2], x.shape[1], width, num_classes, num_slots, iteration, plan.parts, eps, LN_EPS,
                **plan.options("attend"),
            )  # fmt: skip
    return kept


def _backward_shapes(x, order, offsets, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors, slots, *rest):
    num_iterations, (num_classes, num_slots, width) = slots.shape[0] - 1, slots.shape[1:]
    return (
        x.new_empty(x.shape),
        slots.new_empty(slots.shape[1:]),
        mlp_in.new_empty((num_iterations, num_classes * num_slots, 6 * width + mlp_in.shape[0])),
        vectors.new_empty(vectors.shape),
    )


@operator(
    "slot_attention_backward(Tensor x, Tensor order, Tensor offsets, Tensor query_map, Tensor input_map, "
    "Tensor hidden_map, Tensor mlp_in, Tensor mlp_out, Tensor vectors, Tensor slots, Tensor floats, Tensor operands, "
    "Tensor stats, Tensor statistics, Tensor upstream, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_shapes,
)
def slot_attention_backward(
    x: Tensor, order: Tensor, offsets: Tensor, query_map: Tensor, input_map: Tensor, hidden_map: Tensor, mlp_in: Tensor,
    mlp_out: Tensor, vectors: Tensor, slots: Tensor, floats: Tensor, operands: Tensor, stats: Tensor,
    statistics: Tensor, upstream: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``x``, of the initial slots, of the products' results (``records``) and of ``vectors``."""
    x, upstream = _with_rows(x), upstream.contiguous()
    num_iterations, (num_classes, num_slots, width) = slots.shape[0] - 1, slots.shape[1:]
    hidden_width = mlp_in.shape[0]
    _, d_slots, records, _ = _backward_shapes(
        x, order, offsets, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors, slots
    )
    plan = Plan.of(x, num_classes, num_slots, mlp_in)
    # Iterations add to dx, which should not be rounded in between.
    dx = x.new_empty(x.shape, dtype=torch.float32)
    work = slots.new_empty((num_classes * num_slots, 3 * width + 4))
    sums = slots.new_empty((plan.tiles, vectors.shape[0]))
    weights = (query_map, input_map, hidden_map, mlp_in, mlp_out, vectors)
    if plan.parts == 0:
        launch(
            slot_attention_backward_kernel, (plan.groups,), x.device,
            x, order, offsets, *weights, slots, floats, operands, stats, statistics,
            upstream, d_slots, records, work, sums, dx,
            *x.stride()[:2], x.shape[1], width, hidden_width, num_classes, num_slots, num_iterations, eps,
            **plan.options("slot_attention_backward"),
        )  # fmt: skip
        return dx.to(x.dtype), d_slots, records, sums.sum(dim=0)
    partials = x.new_empty((plan.parts, num_classes * num_slots, width + 4), dtype=torch.float32)
    for iteration in range(num_iterations, -1, -1):
        launch(
            step_backward_kernel, (plan.tiles,), x.device,
            offsets, *weights, slots, floats, operands, stats, partials, upstream, d_slots, records, work, sums,
            width, hidden_width, num_classes, num_slots, num_iterations, iteration, plan.parts,
            **plan.options("step_backward"),
        )  # fmt: skip
        if iteration > 0:
            launch(
                attend_backward_kernel, (plan.parts, plan.groups), x.device,
                x, order, offsets, vectors, floats, operands, stats, statistics, work, partials, dx,
                *x.stride()[:2], x.shape[1], width, num_classes, num_slots, num_iterations, iteration - 1, plan.parts,
                eps,                 **plan.options("attend_backward"),
            )  # fmt: skip
    return dx.to(x.dtype), d_slots, records, sums.sum(dim=0)


# ------------------------------------------------------------------------------------------------- autograd.Function


class _SlotAttention(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx, x, order, offsets, initial, *weights_and_options):
        kept = slot_attention_forward(x, order, offsets, initial, *weights_and_options)
        *weights, _, eps = weights_and_options
        ctx.save_for_backward(x, order, offsets, *weights, *kept)
        ctx.eps = eps
        return kept[0][-1].clone()

    @staticmethod
    @custom_bwd(device_type="cuda")
    @once_differentiable
    def backward(ctx, upstream):
        *_, slots, _, operands, _, _ = ctx.saved_tensors
        dx, d_slots, records, d_vectors = slot_attention_backward(*ctx.saved_tensors, upstream, ctx.eps)
        width = slots.shape[-1]
        normal, update, normal_mlp, hidden = operands.flatten(0, 1).tensor_split((width, 2 * width, 3 * width), dim=1)
        records = records.flatten(0, 1)
        d_queries, d_gru, d_out, d_hidden = records.tensor_split((width, 5 * width, 6 * width), dim=1)
        # Recorded as n, r, z, hn: both triples lie side by side, but the first begins with the last of its weight.
        products = (
            lambda: normal.t() @ d_queries,
            lambda: (d_gru[:, : 3 * width].t() @ update).roll(-width, 0),
            lambda: d_gru[:, width:].t() @ slots[:-1].reshape(-1, width).to(d_gru.dtype),
            lambda: d_hidden.t() @ normal_mlp,
            lambda: d_out.t() @ hidden,
        )
        wanted = ctx.needs_input_grad[4:9]  # a frozen surrogate wants none of them
        d_matrices = (product() if want else None for product, want in zip(products, wanted, strict=True))
        return dx, None, None, d_slots, *d_matrices, d_vectors, None, None


def slot_attention(
    tokens: Tensor, slots: Tensor, groups: ClassGroups, weights: SlotAttentionWeights, num_iterations: int, eps: float,
    product_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``tokens [B, T, D]``, ``slots [K, S, D]`` to the final slots ``[K, S, D]``, in fp32."""
    w = weights
    query_map, input_map = absorb(w)
    vectors = torch.cat([weight for weight in w if weight.dim() == 1])
    dtype = product_dtype or tokens.dtype
    matrices = [query_map, input_map, w.gru_weight_hh, w.mlp_in_weight, w.mlp_out_weight]
    result: Tensor = _SlotAttention.apply(
        tokens, groups.order, groups.offsets, slots, *(m.to(dtype).contiguous() for m in matrices), vectors,
        num_iterations, eps,
    )  # fmt: skip
    return result
