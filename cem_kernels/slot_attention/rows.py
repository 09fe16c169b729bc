"""What kernels of slot attention do with slots: queries, GRU and MLP of a tile of rows, and the way back.

A tile is ``ROWS`` slots, ``row`` their indices among all ``K·S`` and ``live`` which of them exist. Between two steps a
tile goes through global memory, because every product wants whole rows of its left operand; what the steps leave there
is also what the backward needs. Per iteration, each a contiguous row of a slot:

=========  ========  ================================================================================================
floats     fp32      queries ``q`` (before the inputs' affine), ``Û``, and the GRU's ``r, z, n, W_hn s + b_hn``
operands   products' left operands of products: ``LN_s(s)``, ``g ∘ Û + b``, ``LN_m(s')``, the MLP's hidden layer
stats      fp32      mean and 1/deviation of ``s`` and of ``s'``; ``q·b``; ``Σ_n (p + eps)``
records    products' gradients of the products' results: queries, GRU (``n, r, z, hn``), MLP's output, hidden layer
work       fp32      gradients of a norm's result, of ``Û`` and of the queries; ``∂Û·Û``, ``Σ_d ∂Û``, ``∂(q·b)``
=========  ========  ================================================================================================

``s'`` is what the GRU returns; the MLP adds to it. Every barrier stands between a step that writes rows and one that
reads them. Imports Triton, so only ``triton.py`` files import this module.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cem_kernels.kernel_math import dot, tanh


@triton.jit
def load_rows(rows, d, live, W: tl.constexpr):
    """``[ROWS, BLOCK]``: the pointers ``rows`` plus columns ``d``; zero beyond ``W`` and where a row is not live."""
    if W // d.shape[0] * d.shape[0] == W:  # W % BLOCK, which constexpr has on the left only
        return tl.load(rows[:, None] + d[None, :], mask=live[:, None], other=0.0)
    return tl.load(rows[:, None] + d[None, :], mask=live[:, None] & (d < W)[None, :], other=0.0)


@triton.jit
def store_rows(rows, d, live, value, W: tl.constexpr):
    """The inverse of :func:`load_rows`, in the pointers' dtype."""
    tl.store(rows[:, None] + d[None, :], value.to(rows.dtype.element_ty), mask=live[:, None] & (d < W)[None, :])


@triton.jit
def load_vector(vector, d, W: tl.constexpr):
    """``[1, BLOCK]`` of a vector of ``W``, zero beyond."""
    return tl.load(vector + d, mask=d < W, other=0.0)[None, :]


@triton.jit
def add_to_sum(place, d, value, first, W: tl.constexpr):
    """Add the rows of ``value [ROWS, BLOCK]`` to a program's own vector; the ``first`` to come finds nothing there."""
    before = tl.load(place + d, mask=d < tl.where(first, 0, W), other=0.0)
    tl.store(place + d, before + tl.sum(value, axis=0), mask=d < W)


@triton.jit
def _right_operand(weight, k, n, W: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """``[BLOCK_K, BLOCK_D]`` of ``weight [N, W]`` transposed, or of ``weight [W, N]`` as it is."""
    place = weight + n[None, :] * W + k[:, None] if TRANSPOSED else weight + k[:, None] * N + n[None, :]
    if W // k.shape[0] * k.shape[0] == W and N // n.shape[0] * n.shape[0] == N:
        return tl.load(place)
    return tl.load(place, mask=(k < W)[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def times(
    rows, live, weight, n, sum, width, W: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``sum [ROWS, BLOCK_D]`` plus rows of width ``W`` times columns ``n`` of the weight; ``width`` is ``W``."""
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = load_rows(rows, k, live, W).to(weight.dtype.element_ty)
        sum = dot(left, _right_operand(weight, k, n, W, N, TRANSPOSED), sum, PRECISION)
    return sum


@triton.jit
def _times_gates(
    rows, live, weight, n, first_sum, second_sum, third_sum, width, D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """:func:`times` the three ``[D, D]`` blocks of a GRU's weight ``[3D, D]``, transposed."""
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = load_rows(rows, k, live, D).to(weight.dtype.element_ty)
        first_sum = dot(left, _right_operand(weight, k, n, D, D, True), first_sum, PRECISION)
        second_sum = dot(left, _right_operand(weight + D * D, k, n, D, D, True), second_sum, PRECISION)
        third_sum = dot(left, _right_operand(weight + 2 * D * D, k, n, D, D, True), third_sum, PRECISION)
    return first_sum, second_sum, third_sum


@triton.jit
def moments(rows, live, width, eps, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean and 1/deviation of whole rows, in two passes."""
    mean = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, BLOCK_D):
        mean += tl.sum(load_rows(rows, first + tl.arange(0, BLOCK_D), live, D).to(tl.float32), axis=1)
    mean /= D
    squares = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        away = load_rows(rows, d, live, D).to(tl.float32) - mean[:, None]
        squares += tl.sum(tl.where((d < D)[None, :], away * away, 0.0), axis=1)
    return mean, 1.0 / tl.sqrt(squares / D + eps)


@triton.jit
def _normalize(
    rows, result, live, weight, bias, mean, rstd, width, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``result = (rows − mean) · rstd ∘ weight + bias``."""
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        normal = (load_rows(rows, d, live, D) - mean[:, None]) * rstd[:, None]
        store_rows(result, d, live, normal * load_vector(weight, d, D) + load_vector(bias, d, D), D)


@triton.jit
def copy_rows(source, target, live, width, D: tl.constexpr, BLOCK_D: tl.constexpr):
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        store_rows(target, d, live, load_rows(source, d, live, D), D)
    tl.debug_barrier()


# ---------------------------------------------------------------------------------------------------------- forward


@triton.jit
def make_queries(
    slots, floats, operands, stats, live, query_map, vectors, width, ln_eps,
    ROWS: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From slots ``s`` to queries ``LN_s(s) M`` and what the inputs' bias adds to their logits."""
    own = vectors + 7 * D + HIDDEN
    mean, rstd = moments(slots, live, width, ln_eps, ROWS, D, BLOCK_D)
    tl.store(stats, mean, mask=live)
    tl.store(stats + 1, rstd, mask=live)
    _normalize(slots, operands, live, own + 2 * D, own + 3 * D, mean, rstd, width, D, BLOCK_D)
    tl.debug_barrier()
    shift = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        query = tl.zeros([ROWS, BLOCK_D], tl.float32)
        query = times(operands, live, query_map, d, query, width, D, D, False, PRECISION, BLOCK_K)
        store_rows(floats, d, live, query, D)
        shift += tl.sum(query * load_vector(own + D, d, D), axis=1)
    tl.store(stats + 4, shift, mask=live)
    tl.debug_barrier()


@triton.jit
def collect_updates(
    sums, totals, floats, operands, stats, live, vectors, width, num_parts, part_stride,
    ROWS: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``Û``, a mean over tokens, from sums over their parts, in their order; and what of it goes into the GRU."""
    own = vectors + 7 * D + HIDDEN
    total = tl.zeros([ROWS], tl.float32)
    for part in range(0, num_parts):
        total += tl.load(totals + part * part_stride, mask=live, other=0.0)
    share = 1.0 / tl.where(total > 0.0, total, 1.0)
    tl.store(stats + 5, total, mask=live)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        update = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for part in range(0, num_parts):
            update += load_rows(sums + part * part_stride, d, live, D)
        update *= share[:, None]
        store_rows(floats + D, d, live, update, D)
        store_rows(operands + D, d, live, update * load_vector(own, d, D) + load_vector(own + D, d, D), D)
    tl.debug_barrier()


@triton.jit
def step_slots(
    slots, result, floats, operands, stats, live, filled, input_map, hidden_map, mlp_in, mlp_out, vectors,
    width, hidden_width, ln_eps,
    ROWS: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """GRU and MLP: ``result = s' + MLP(LN_m(s'))`` with ``s' = GRU(Û, s)``; slots of empty classes stay as they are."""
    own = vectors + 7 * D + HIDDEN
    of_hidden = vectors + 3 * D
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        nothing = tl.zeros([ROWS, BLOCK_D], tl.float32)
        r, z, inner = _times_gates(
            operands + D, live, input_map, d, nothing, nothing, nothing, width, D, PRECISION, BLOCK_K
        )
        r, z, recurrent = _times_gates(slots, live, hidden_map, d, r, z, nothing, width, D, PRECISION, BLOCK_K)
        r = tl.sigmoid(r + load_vector(vectors, d, D) + load_vector(of_hidden, d, D))
        z = tl.sigmoid(z + load_vector(vectors + D, d, D) + load_vector(of_hidden + D, d, D))
        recurrent += load_vector(of_hidden + 2 * D, d, D)
        candidate = tanh(inner + load_vector(vectors + 2 * D, d, D) + r * recurrent)
        store_rows(floats + 2 * D, d, live, r, D)
        store_rows(floats + 3 * D, d, live, z, D)
        store_rows(floats + 4 * D, d, live, candidate, D)
        store_rows(floats + 5 * D, d, live, recurrent, D)
        store_rows(result, d, live, candidate + z * (load_rows(slots, d, live, D) - candidate), D)
    tl.debug_barrier()
    mean, rstd = moments(result, live, width, ln_eps, ROWS, D, BLOCK_D)
    tl.store(stats + 2, mean, mask=live)
    tl.store(stats + 3, rstd, mask=live)
    _normalize(result, operands + 2 * D, live, own + 4 * D, own + 5 * D, mean, rstd, width, D, BLOCK_D)
    tl.debug_barrier()
    for first in range(0, hidden_width, BLOCK_D):
        n = first + tl.arange(0, BLOCK_D)
        hidden = tl.zeros([ROWS, BLOCK_D], tl.float32)
        hidden = times(operands + 2 * D, live, mlp_in, n, hidden, width, D, HIDDEN, True, PRECISION, BLOCK_K)
        hidden += load_vector(vectors + 6 * D, n, HIDDEN)
        # Not max(hidden, 0), which would hide a NaN.
        store_rows(operands + 3 * D, n, live, tl.where(hidden <= 0.0, 0.0, hidden), HIDDEN)
    tl.debug_barrier()
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        out = tl.zeros([ROWS, BLOCK_D], tl.float32)
        out = times(operands + 3 * D, live, mlp_out, d, out, hidden_width, HIDDEN, D, True, PRECISION, BLOCK_K)
        out += load_rows(result, d, live, D) + load_vector(vectors + 6 * D + HIDDEN, d, D)
        store_rows(result, d, live, tl.where(filled[:, None], out, load_rows(slots, d, live, D)), D)
    tl.debug_barrier()


# --------------------------------------------------------------------------------------------------------- backward


@triton.jit
def step_slots_backward(
    slots, floats, operands, stats, d_slots, records, work, live, filled, first_time,
    input_map, hidden_map, mlp_in, mlp_out, vectors, sums, width, hidden_width,
    ROWS: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward of :func:`step_slots` and :func:`collect_updates`.

    In ``d_slots`` the gradient of the result becomes that of ``s`` but for its queries; that of ``Û`` goes to ``work``.
    Rows of an empty class hand their gradient on and record zeros.
    """
    own = vectors + 7 * D + HIDDEN
    own_sums = sums + 7 * D + HIDDEN
    d_gru, d_out, d_hidden = records + D, records + 5 * D, records + 6 * D
    d_normal, d_update = work, work + D
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        gradient = tl.where(filled[:, None], load_rows(d_slots, d, live, D), 0.0)
        store_rows(d_out, d, live, gradient, D)
        add_to_sum(sums + 6 * D + HIDDEN, d, gradient, first_time, D)
    tl.debug_barrier()
    for first in range(0, hidden_width, BLOCK_D):
        n = first + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        gradient = times(d_out, live, mlp_out, n, gradient, width, D, HIDDEN, False, PRECISION, BLOCK_K)
        gradient = tl.where(load_rows(operands + 3 * D, n, live, HIDDEN) > 0.0, gradient, 0.0)
        store_rows(d_hidden, n, live, gradient, HIDDEN)
        add_to_sum(sums + 6 * D, n, gradient, first_time, HIDDEN)
    tl.debug_barrier()

    mean = tl.load(stats + 2, mask=live, other=0.0)
    rstd = tl.load(stats + 3, mask=live, other=0.0)
    mean_1 = tl.zeros([ROWS], tl.float32)
    mean_x = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        gradient = times(d_hidden, live, mlp_in, d, gradient, hidden_width, HIDDEN, D, False, PRECISION, BLOCK_K)
        z = load_rows(floats + 3 * D, d, live, D)
        candidate = load_rows(floats + 4 * D, d, live, D)
        stepped = candidate + z * (load_rows(slots, d, live, D) - candidate)
        normal = tl.where((d < D)[None, :], (stepped - mean[:, None]) * rstd[:, None], 0.0)
        add_to_sum(own_sums + 4 * D, d, gradient * normal, first_time, D)
        add_to_sum(own_sums + 5 * D, d, gradient, first_time, D)
        gradient *= load_vector(own + 4 * D, d, D)
        store_rows(d_normal, d, live, gradient, D)
        mean_1 += tl.sum(gradient, axis=1) / D
        mean_x += tl.sum(gradient * normal, axis=1) / D
    tl.debug_barrier()

    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        s = load_rows(slots, d, live, D)
        r = load_rows(floats + 2 * D, d, live, D)
        z = load_rows(floats + 3 * D, d, live, D)
        candidate = load_rows(floats + 4 * D, d, live, D)
        before = load_rows(d_slots, d, live, D)
        normal = (candidate + z * (s - candidate) - mean[:, None]) * rstd[:, None]
        gradient = load_rows(d_normal, d, live, D) - mean_1[:, None] - normal * mean_x[:, None]
        gradient = tl.where(filled[:, None], before + rstd[:, None] * gradient, 0.0)
        d_candidate = gradient * (1.0 - z) * (1.0 - candidate * candidate)
        d_r = d_candidate * load_rows(floats + 5 * D, d, live, D) * r * (1.0 - r)
        d_z = gradient * (s - candidate) * z * (1.0 - z)
        d_recurrent = d_candidate * r
        store_rows(d_gru, d, live, d_candidate, D)
        store_rows(d_gru + D, d, live, d_r, D)
        store_rows(d_gru + 2 * D, d, live, d_z, D)
        store_rows(d_gru + 3 * D, d, live, d_recurrent, D)
        store_rows(d_slots, d, live, tl.where(filled[:, None], gradient * z, before), D)
        add_to_sum(sums, d, d_r, first_time, D)
        add_to_sum(sums + D, d, d_z, first_time, D)
        add_to_sum(sums + 2 * D, d, d_candidate, first_time, D)
        add_to_sum(sums + 3 * D, d, d_r, first_time, D)
        add_to_sum(sums + 4 * D, d, d_z, first_time, D)
        add_to_sum(sums + 5 * D, d, d_recurrent, first_time, D)
    tl.debug_barrier()

    of_update = tl.zeros([ROWS], tl.float32)
    of_columns = tl.zeros([ROWS], tl.float32)
    kind = records.dtype.element_ty
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        gradient = times(d_gru, live, input_map + 2 * D * D, d, gradient, width, D, D, False, PRECISION, BLOCK_K)
        gradient = times(d_gru + D, live, input_map, d, gradient, 2 * width, 2 * D, D, False, PRECISION, BLOCK_K)
        update = load_rows(floats + D, d, live, D)
        add_to_sum(own_sums, d, gradient * update, first_time, D)
        add_to_sum(own_sums + D, d, gradient, first_time, D)
        # As products will see it.
        gradient = (gradient * load_vector(own, d, D)).to(kind).to(tl.float32)
        store_rows(d_update, d, live, gradient, D)
        of_update += tl.sum(gradient * update, axis=1)
        of_columns += tl.sum(gradient, axis=1)
        onward = load_rows(d_slots, d, live, D)
        onward = times(d_gru + D, live, hidden_map, d, onward, 3 * width, 3 * D, D, False, PRECISION, BLOCK_K)
        store_rows(d_slots, d, live, onward, D)
    tl.store(work + 3 * D, of_update, mask=live)
    tl.store(work + 3 * D + 1, of_columns, mask=live)
    tl.debug_barrier()


@triton.jit
def make_queries_backward(
    d_queries, d_shifts, slots, floats, stats, d_slots, records, work, live, first_time, query_map, vectors, sums,
    width, num_parts, part_stride,
    ROWS: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward of :func:`make_queries`, from sums over parts of the tokens, in their order, to the slots' gradient."""
    own = vectors + 7 * D + HIDDEN
    own_sums = sums + 7 * D + HIDDEN
    d_shift = tl.zeros([ROWS], tl.float32)
    for part in range(0, num_parts):
        d_shift += tl.load(d_shifts + part * part_stride, mask=live, other=0.0)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for part in range(0, num_parts):
            gradient += load_rows(d_queries + part * part_stride, d, live, D)
        query = load_rows(floats, d, live, D)
        add_to_sum(own_sums, d, gradient * query, False, D)
        add_to_sum(own_sums + D, d, d_shift[:, None] * query, False, D)
        gradient = gradient * load_vector(own, d, D) + d_shift[:, None] * load_vector(own + D, d, D)
        store_rows(records, d, live, gradient, D)
    tl.debug_barrier()
    mean = tl.load(stats, mask=live, other=0.0)
    rstd = tl.load(stats + 1, mask=live, other=0.0)
    mean_1 = tl.zeros([ROWS], tl.float32)
    mean_x = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        gradient = times(records, live, query_map, d, gradient, width, D, D, True, PRECISION, BLOCK_K)
        normal = (load_rows(slots, d, live, D) - mean[:, None]) * rstd[:, None]
        normal = tl.where((d < D)[None, :], normal, 0.0)
        add_to_sum(own_sums + 2 * D, d, gradient * normal, first_time, D)
        add_to_sum(own_sums + 3 * D, d, gradient, first_time, D)
        gradient *= load_vector(own + 2 * D, d, D)
        store_rows(work, d, live, gradient, D)
        mean_1 += tl.sum(gradient, axis=1) / D
        mean_x += tl.sum(gradient * normal, axis=1) / D
    tl.debug_barrier()
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        normal = (load_rows(slots, d, live, D) - mean[:, None]) * rstd[:, None]
        step = rstd[:, None] * (load_rows(work, d, live, D) - mean_1[:, None] - normal * mean_x[:, None])
        store_rows(d_slots, d, live, load_rows(d_slots, d, live, D) + step, D)
    tl.debug_barrier()
