"""The kernels of slot attention: launches of what ``rows.py`` and ``tokens.py`` do with slots and with tokens.

Imports Triton, so only ``triton.py`` files import this module.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cem_kernels.kernel_math import last_to_arrive
from cem_kernels.slot_attention.rows import (
    collect_updates,
    copy_rows,
    make_queries,
    make_queries_backward,
    step_slots,
    step_slots_backward,
)
from cem_kernels.slot_attention.tokens import attend, attend_backward, rows_of_classes, token_statistics

VARYING = ["T", "num_classes", "num_slots", "num_iterations", "iteration", "num_parts"]


@triton.jit
def _filled(offsets, c, live):
    """Which rows' classes have tokens."""
    return tl.load(offsets + c + 1, mask=live, other=0) > tl.load(offsets + c, mask=live, other=0)


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
    x, order, offsets, initial, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors,
    slots, floats, operands, stats, statistics, partials, arrived,
    stride_b, stride_t, T, width, hidden_width, num_classes, num_slots, num_iterations, iteration, num_parts,
    eps, ln_eps,
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
        make_queries(
            slots + row * D, floats + row * (6 * D), operands + row * (3 * D + HIDDEN), stats + row * 6, live,
            query_map, vectors, width, ln_eps, ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        token_statistics(
            x, order, offsets, statistics, stride_b, stride_t, first_class, num_classes, part, num_parts, T, width,
            ln_eps, D, CLASSES, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    rows = num_classes.to(tl.int64) * num_slots
    sums = partials + row * (D + 4)
    mine = sums + part * rows * (D + 4)
    row += iteration * rows
    s, f, o, t = slots + row * D, floats + row * (6 * D), operands + row * (3 * D + HIDDEN), stats + row * 6
    attend(
        x, order, offsets, statistics, f, o, t, live, vectors + 7 * D + HIDDEN, mine, mine + D,
        stride_b, stride_t, first_class, num_classes, part, num_parts, T, width, eps,
        D, PRECISION, SLOTS, CLASSES, ROWS, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    if last_to_arrive(arrived + iteration * tl.num_programs(1) + group, num_parts):
        collect_updates(
            sums, sums + D, f, o, t, live, vectors, width, num_parts, rows * (D + 4), ROWS, D, HIDDEN, BLOCK_D
        )
        stepped = s + rows * D
        step_slots(
            s, stepped, f, o, t, live, _filled(offsets, c, live), input_map, hidden_map, mlp_in, mlp_out, vectors,
            width, hidden_width, ln_eps, ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        if iteration + 1 < num_iterations:
            make_queries(
                stepped, f + rows * (6 * D), o + rows * (3 * D + HIDDEN), t + rows * 6, live,
                query_map, vectors, width, ln_eps, ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
            )  # fmt: skip


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
    ds, w = d_slots + row * D, work + row * (3 * D + 4)
    copy_rows(upstream + row * D, ds, live, width, D, BLOCK_D)
    row += (num_iterations - 1).to(tl.int64) * num_classes * num_slots
    step_slots_backward(
        slots + row * D, floats + row * (6 * D), operands + row * (3 * D + HIDDEN), stats + row * 6, ds,
        records + row * (6 * D + HIDDEN), w, live, _filled(offsets, c, live), True, input_map, hidden_map, mlp_in,
        mlp_out, vectors, sums + group.to(tl.int64) * (13 * D + HIDDEN), width, hidden_width,
        ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def attend_backward_kernel(
    x, order, offsets, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors,
    slots, floats, operands, stats, statistics, d_slots, records, work, sums, partials, arrived, dx,
    stride_b, stride_t, T, width, hidden_width, num_classes, num_slots, num_iterations, iteration, num_parts, eps,
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
    ds, w = d_slots + row * D, work + row * (3 * D + 4)
    row += iteration * rows
    s, f, o, t = slots + row * D, floats + row * (6 * D), operands + row * (3 * D + HIDDEN), stats + row * 6
    r = records + row * (6 * D + HIDDEN)
    first_time = iteration == num_iterations - 1
    attend_backward(
        x, order, offsets, statistics, f, o, t, w, live, vectors + 7 * D + HIDDEN, mine, mine + D, dx,
        stride_b, stride_t, first_class, num_classes, part, num_parts, T, width, eps, first_time,
        D, PRECISION, SLOTS, CLASSES, ROWS, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    if last_to_arrive(arrived + iteration * tl.num_programs(1) + group, num_parts):
        sums += group.to(tl.int64) * (13 * D + HIDDEN)
        make_queries_backward(
            own_sums, own_sums + D, s, f, t, ds, r, w, live, first_time, query_map, vectors, sums,
            width, num_parts, rows * (D + 4), ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        if iteration > 0:
            step_slots_backward(
                s - rows * D, f - rows * (6 * D), o - rows * (3 * D + HIDDEN), t - rows * 6, ds,
                r - rows * (6 * D + HIDDEN), w, live, _filled(offsets, c, live), False,
                input_map, hidden_map, mlp_in, mlp_out, vectors, sums, width, hidden_width,
                ROWS, D, HIDDEN, PRECISION, BLOCK_K, BLOCK_D,
            )  # fmt: skip
