"""The kernels of slot attention: all classes and all iterations in one launch forward and one backward.

With the projections absorbed (``weights.absorb``: ``M = W_qᵀ W_k``, scale included, and ``V = W_ih W_v``) and ``x̂`` the
normalized tokens of a class, ``g, b`` the affine of their norm, an iteration is

    q = LN_s(s) M      l = x̂ (g ∘ q)ᵀ + q·b      p = softmax over slots (l)
    A = Σ_n (p + eps)      Û = Σ_n (p + eps) x̂ / A
    s' = GRU(V (g ∘ Û + b), s)      s ← s' + MLP(LN_m(s'))

and its backward, with ``G = ∂Û`` and ``w = (p + eps) / A``,

    ∂a = (x̂·G − Û·G) / A      ∂l = p (∂a − Σ_s p ∂a)
    ∂(g ∘ q) = Σ_n ∂l x̂      ∂(q·b) = Σ_n ∂l      ∂x̂ = Σ_s w G + ∂l (g ∘ q)

Attention is computed again; rows of slots are kept. The backward writes the gradients of all products' results,
``J·K·S`` rows, and one matrix product each makes the weights' gradients of them, outside.

A program owns ``CLASSES`` neighboring classes, with all of their tokens, or with every ``num_parts``-th tile of them:
then every iteration is a launch, and the last program to arrive adds up the parts in their order and steps the slots.
``kernels_slots.py`` and ``kernels_tokens.py`` say what it does with slots and with tokens, and what that reads and
writes. Imports Triton, so only ``triton.py`` files import this module.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cem_kernels.slot_attention.kernels_slots import (
    BIAS_HIDDEN,
    D_HIDDEN,
    D_SHIFT,
    FLOATS,
    HIDDEN_LAYER,
    NUMBERS,
    STATS,
    TOTAL,
    UPDATE,
    W_NUMBERS,
    W_QUERY,
    collect_updates,
    copy_rows,
    make_queries,
    make_queries_backward,
    step_slots,
    step_slots_backward,
)
from cem_kernels.slot_attention.kernels_tokens import attend, attend_backward, rows_of_classes, token_statistics
from cem_kernels.triton_utils import last_to_arrive, zero_ignored

VARYING = ["num_samples", "T", "num_classes", "num_slots", "num_iterations", "iteration", "num_parts"]


@triton.jit
def _kept_rows(row, slots, floats, operands, stats, D: tl.constexpr, HIDDEN: tl.constexpr):
    """Where the rows of slots ``row``, counted over iterations, begin in what an iteration keeps."""
    return (
        slots + row * D, floats + row * (FLOATS * D), operands + row * (HIDDEN_LAYER * D + HIDDEN), stats + row * STATS
    )  # fmt: skip


@triton.jit
def _filled(offsets, c, live):
    """Which rows' classes have tokens."""
    return tl.load(offsets + c + 1, mask=live, other=0) > tl.load(offsets + c, mask=live, other=0)


@triton.jit(do_not_specialize=VARYING)
def slot_attention_forward_kernel(
    x, order, offsets, initial, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors,
    slots, floats, operands, stats, statistics,
    stride_b, stride_t, num_samples, T, width, hidden_width, num_classes, num_slots, num_iterations, eps, ln_eps,
    D: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All iterations. Grid: groups of ``CLASSES`` classes."""
    ROWS: tl.constexpr = CLASSES * SLOTS
    first_class = tl.program_id(0) * CLASSES
    row, c, live = rows_of_classes(first_class, num_classes, num_slots, SLOTS, ROWS)
    filled = _filled(offsets, c, live)
    copy_rows(initial + row * D, slots + row * D, live, width, D, BLOCK_D)
    token_statistics(
        x, order, offsets, statistics, stride_b, stride_t, first_class, num_classes, 0, 1, T, width, ln_eps,
        D, CLASSES, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    for _ in range(num_iterations):
        s, f, o, t = _kept_rows(row, slots, floats, operands, stats, D, HIDDEN)
        make_queries(s, f, o, t, live, query_map, vectors, width, ln_eps, ROWS, D, PRECISION, BLOCK_K, BLOCK_D)
        attend(
            x, order, offsets, statistics, f, o, t, live, vectors, f + UPDATE * D, t + TOTAL,
            stride_b, stride_t, first_class, num_classes, 0, 1, T, width, eps,
            D, PRECISION, SLOTS, CLASSES, ROWS, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        collect_updates(f + UPDATE * D, t + TOTAL, f, o, t, live, vectors, width, 1, 0, ROWS, D, BLOCK_D)
        row += num_classes * num_slots
        step_slots(
            s, slots + row * D, f, o, t, live, filled, input_map, hidden_map, mlp_in, mlp_out, vectors,
            width, hidden_width, ln_eps, ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def slot_attention_backward_kernel(
    x, order, offsets, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors,
    slots, floats, operands, stats, statistics, upstream, d_slots, records, work, sums, dx,
    stride_b, stride_t, num_samples, T, width, hidden_width, num_classes, num_slots, num_iterations, eps,
    D: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All iterations, the last one first; ``dx [B, T, D]`` is contiguous fp32. Grid: as forward."""
    ROWS: tl.constexpr = CLASSES * SLOTS
    first_class = tl.program_id(0) * CLASSES
    row, c, live = rows_of_classes(first_class, num_classes, num_slots, SLOTS, ROWS)
    filled = _filled(offsets, c, live)
    ds, w = d_slots + row * D, work + row * (W_NUMBERS * D + NUMBERS)
    groups = tl.num_programs(0)
    zero_ignored(dx, order, offsets, tl.program_id(0), groups, num_classes, num_samples, T, width, BLOCK_D)
    sums += ((num_iterations - 1) * groups + tl.program_id(0)).to(tl.int64) * (BIAS_HIDDEN * D + HIDDEN)
    copy_rows(upstream + row * D, ds, live, width, D, BLOCK_D)
    row += (num_iterations - 1).to(tl.int64) * num_classes * num_slots
    for step in range(num_iterations):
        s, f, o, t = _kept_rows(row, slots, floats, operands, stats, D, HIDDEN)
        r = records + row * (D_HIDDEN * D + HIDDEN)
        step_slots_backward(
            s, f, o, t, ds, r, w, live, filled, input_map, hidden_map, mlp_in, mlp_out, vectors, sums,
            width, hidden_width, ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        attend_backward(
            x, order, offsets, statistics, f, o, t, w, live, vectors, w + W_QUERY * D, w + W_NUMBERS * D + D_SHIFT, dx,
            stride_b, stride_t, first_class, num_classes, 0, 1, T, width, eps, step == 0,
            D, PRECISION, SLOTS, CLASSES, ROWS, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        make_queries_backward(
            w + W_QUERY * D, w + W_NUMBERS * D + D_SHIFT, s, f, t, ds, r, w, live, query_map, vectors, sums,
            width, 1, 0, ROWS, D, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        row -= num_classes * num_slots
        sums -= groups.to(tl.int64) * (BIAS_HIDDEN * D + HIDDEN)


@triton.jit(do_not_specialize=VARYING)
def attend_kernel(
    x, order, offsets, initial, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors,
    slots, floats, operands, stats, statistics, partials, arrived,
    stride_b, stride_t, num_samples, T, width, hidden_width, num_classes, num_slots, num_iterations, iteration,
    num_parts, eps, ln_eps,
    D: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """An iteration: parts of the tokens into ``partials [parts, K·S, D + 4]``; the last to arrive steps the slots.

    ``arrived [J, groups]`` begins with zeros. Grid: parts × groups of classes.
    """
    ROWS: tl.constexpr = CLASSES * SLOTS
    part, group = tl.program_id(0), tl.program_id(1)
    first_class = group * CLASSES
    row, c, live = rows_of_classes(first_class, num_classes, num_slots, SLOTS, ROWS)
    if iteration == 0:
        # Every part makes the first queries, all write the same: that takes no longer than a launch which makes them.
        copy_rows(initial + row * D, slots + row * D, live, width, D, BLOCK_D)
        s, f, o, t = _kept_rows(row, slots, floats, operands, stats, D, HIDDEN)
        make_queries(s, f, o, t, live, query_map, vectors, width, ln_eps, ROWS, D, PRECISION, BLOCK_K, BLOCK_D)
        token_statistics(
            x, order, offsets, statistics, stride_b, stride_t, first_class, num_classes, part, num_parts, T, width,
            ln_eps, D, CLASSES, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    rows = num_classes.to(tl.int64) * num_slots
    sums = partials + row * (D + 4)
    mine = sums + part * rows * (D + 4)
    row += iteration * rows
    s, f, o, t = _kept_rows(row, slots, floats, operands, stats, D, HIDDEN)
    attend(
        x, order, offsets, statistics, f, o, t, live, vectors, mine, mine + D,
        stride_b, stride_t, first_class, num_classes, part, num_parts, T, width, eps,
        D, PRECISION, SLOTS, CLASSES, ROWS, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    if last_to_arrive(arrived + iteration * tl.num_programs(1) + group, num_parts):
        collect_updates(sums, sums + D, f, o, t, live, vectors, width, num_parts, rows * (D + 4), ROWS, D, BLOCK_D)
        stepped = s + rows * D
        step_slots(
            s, stepped, f, o, t, live, _filled(offsets, c, live), input_map, hidden_map, mlp_in, mlp_out, vectors,
            width, hidden_width, ln_eps, ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        if iteration + 1 < num_iterations:
            _, f, o, t = _kept_rows(row + rows, slots, floats, operands, stats, D, HIDDEN)
            make_queries(
                stepped, f, o, t, live, query_map, vectors, width, ln_eps, ROWS, D, PRECISION, BLOCK_K, BLOCK_D
            )


@triton.jit(do_not_specialize=VARYING)
def start_backward_kernel(
    offsets, input_map, hidden_map, mlp_in, mlp_out, vectors,
    slots, floats, operands, stats, upstream, d_slots, records, work, sums, arrived,
    width, hidden_width, num_classes, num_slots, num_iterations,
    D: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward of the last step of the slots; nobody has arrived yet at any iteration. Grid: groups of classes."""
    ROWS: tl.constexpr = CLASSES * SLOTS
    group = tl.program_id(0)
    row, c, live = rows_of_classes(group * CLASSES, num_classes, num_slots, SLOTS, ROWS)
    for iteration in range(num_iterations):
        tl.store(arrived + iteration * tl.num_programs(0) + group, 0)
    ds, w = d_slots + row * D, work + row * (W_NUMBERS * D + NUMBERS)
    copy_rows(upstream + row * D, ds, live, width, D, BLOCK_D)
    row += (num_iterations - 1).to(tl.int64) * num_classes * num_slots
    s, f, o, t = _kept_rows(row, slots, floats, operands, stats, D, HIDDEN)
    sums += ((num_iterations - 1) * tl.num_programs(0) + group).to(tl.int64) * (BIAS_HIDDEN * D + HIDDEN)
    step_slots_backward(
        s, f, o, t, ds, records + row * (D_HIDDEN * D + HIDDEN), w, live, _filled(offsets, c, live),
        input_map, hidden_map, mlp_in, mlp_out, vectors, sums, width, hidden_width,
        ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def attend_backward_kernel(
    x, order, offsets, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors,
    slots, floats, operands, stats, statistics, d_slots, records, work, sums, partials, arrived, dx,
    stride_b, stride_t, num_samples, T, width, hidden_width, num_classes, num_slots, num_iterations, iteration,
    num_parts, eps,
    D: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward of :func:`attend_kernel`, but for its step: the last to arrive does that of the iteration before.

    Grid: as forward.
    """
    ROWS: tl.constexpr = CLASSES * SLOTS
    part, group = tl.program_id(0), tl.program_id(1)
    first_class = group * CLASSES
    row, c, live = rows_of_classes(first_class, num_classes, num_slots, SLOTS, ROWS)
    rows = num_classes.to(tl.int64) * num_slots
    own_sums = partials + row * (D + 4)
    mine = own_sums + part * rows * (D + 4)
    ds, w = d_slots + row * D, work + row * (W_NUMBERS * D + NUMBERS)
    row += iteration * rows
    s, f, o, t = _kept_rows(row, slots, floats, operands, stats, D, HIDDEN)
    r = records + row * (D_HIDDEN * D + HIDDEN)
    first_time = iteration == num_iterations - 1
    groups = tl.num_programs(1)
    if first_time:
        program, programs = part * groups + group, num_parts * groups
        zero_ignored(dx, order, offsets, program, programs, num_classes, num_samples, T, width, BLOCK_D)
    attend_backward(
        x, order, offsets, statistics, f, o, t, w, live, vectors, mine, mine + D, dx,
        stride_b, stride_t, first_class, num_classes, part, num_parts, T, width, eps, first_time,
        D, PRECISION, SLOTS, CLASSES, ROWS, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    if last_to_arrive(arrived + iteration * groups + group, num_parts):
        sums += (iteration * groups + group).to(tl.int64) * (BIAS_HIDDEN * D + HIDDEN)
        make_queries_backward(
            own_sums, own_sums + D, s, f, t, ds, r, w, live, query_map, vectors, sums,
            width, num_parts, rows * (D + 4), ROWS, D, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        if iteration > 0:
            s, f, o, t = _kept_rows(row - rows, slots, floats, operands, stats, D, HIDDEN)
            sums -= groups.to(tl.int64) * (BIAS_HIDDEN * D + HIDDEN)
            step_slots_backward(
                s, f, o, t, ds, r - rows * (D_HIDDEN * D + HIDDEN), w, live, _filled(offsets, c, live),
                input_map, hidden_map, mlp_in, mlp_out, vectors, sums, width, hidden_width,
                ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
            )  # fmt: skip
