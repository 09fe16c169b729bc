"""What kernels of slot attention do with slots: queries, GRU and MLP of a tile of rows, and the way back.

    q = LN_s(s) M      r, z = sigmoid(V (g ∘ Û + b) + W_h s + biases)
    n = tanh(V_n (g ∘ Û + b) + b_in + r ∘ (W_hn s + b_hn))      s' = n + z ∘ (s − n)
    s ← s' + W_out relu(W_in LN_m(s') + b_in) + b_out

A tile is ``ROWS`` slots, ``row`` their indices among all ``K·S`` and ``live`` which of them exist. Between two steps a
tile goes through global memory, because every product wants whole rows of its left operand; what the steps leave there
is also what the backward needs. Per iteration, each a contiguous row of a slot, whose fields are named below:

=========  ========  ================================================================================================
floats     fp32      queries ``q`` (before the inputs' affine), ``Û``, and the GRU's ``r, z, n, W_hn s + b_hn``
operands   products' left operands of products: ``LN_s(s)``, ``g ∘ Û + b``, ``LN_m(s')``, the MLP's hidden layer
stats      fp32      mean and 1/deviation of ``s`` and of ``s'``; ``q·b``; ``Σ_n (p + eps)``
records    products' gradients of the products' results: queries, GRU (``n, r, z, hn``), MLP's output, hidden layer
work       fp32      gradients of a norm's result, of ``Û`` and of the queries; ``∂Û·Û``, ``Σ_d ∂Û``, ``∂(q·b)``
=========  ========  ================================================================================================

``s'`` is what the GRU returns; the MLP adds to it. Vectors of weights stand side by side, and so do a program's sums of
their gradients, a row an iteration and group of classes, written once. Of a slot, an iteration writes ``28 D`` bytes of
floats and slots and ``3 D + HIDDEN`` operands; its backward reads them and writes ``6 D + HIDDEN`` records and some
``16 D`` bytes of work. Matrices, ``(7 D + 2 HIDDEN) D`` numbers, are read by every program in both directions, and
mostly found in the cache.

Every barrier stands between a step that writes rows and one that reads them. None stands between reading a tile and
overwriting it, which would keep the loop from being pipelined: so no tile may be smaller than the threads that hold it.
With several copies of it, a slow warp could read what a fast one has stored (:func:`triton.Plan.options` sees to that).
Imports Triton, so only ``triton.py`` files import this module.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cem_kernels.triton_utils import dot, layer_norm_backward, tanh

# Where a row's fields begin, in widths ``D``. Floats:
QUERY, UPDATE, GATE_R, GATE_Z, CANDIDATE, RECURRENT = (tl.constexpr(i) for i in range(6))
FLOATS = tl.constexpr(6)
# Operands, of which the last is ``HIDDEN`` wide:
NORMAL, GATED_UPDATE, NORMAL_MLP, HIDDEN_LAYER = (tl.constexpr(i) for i in range(4))
# Records, of which the last is ``HIDDEN`` wide; the GRU's begin at ``D_CANDIDATE``:
D_QUERY, D_CANDIDATE, D_R, D_Z, D_RECURRENT, D_OUT, D_HIDDEN = (tl.constexpr(i) for i in range(7))
# Work: three fields, and then three numbers.
W_NORMAL, W_UPDATE, W_QUERY, W_NUMBERS = (tl.constexpr(i) for i in range(4))
# Vectors and their sums, of which the last is ``HIDDEN`` wide. The inputs' affine stands there twice, for the update
# and for the queries, so that each has a place for its gradient.
BIAS_IR, BIAS_IZ, BIAS_IN, BIAS_HR, BIAS_HZ, BIAS_HN, BIAS_OUT = (tl.constexpr(i) for i in range(7))
UPDATE_WEIGHT, UPDATE_BIAS, SLOTS_WEIGHT, SLOTS_BIAS, MLP_WEIGHT, MLP_BIAS = (tl.constexpr(i) for i in range(7, 13))
QUERY_WEIGHT, QUERY_BIAS, BIAS_HIDDEN = (tl.constexpr(i) for i in range(13, 16))
# Numbers of a row of stats, and those of a row of work behind its fields:
MEAN, RSTD, MLP_MEAN, MLP_RSTD, SHIFT, TOTAL = (tl.constexpr(i) for i in range(6))
STATS = tl.constexpr(6)
OF_UPDATE, OF_COLUMNS, D_SHIFT = (tl.constexpr(i) for i in range(3))
NUMBERS = tl.constexpr(4)  # of which the last only keeps rows aligned


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
def _store_sum(place, d, value, W: tl.constexpr):
    """The sum of the rows of ``value [ROWS, BLOCK]`` into columns ``d`` of a vector of ``W``."""
    tl.store(place + d, tl.sum(value, axis=0), mask=d < W)


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
    ROWS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From slots ``s`` to queries ``LN_s(s) M`` and what the inputs' bias adds to their logits."""
    mean, rstd = moments(slots, live, width, ln_eps, ROWS, D, BLOCK_D)
    tl.store(stats + MEAN, mean, mask=live)
    tl.store(stats + RSTD, rstd, mask=live)
    normal = operands + NORMAL * D
    _normalize(slots, normal, live, vectors + SLOTS_WEIGHT * D, vectors + SLOTS_BIAS * D, mean, rstd, width, D, BLOCK_D)
    tl.debug_barrier()
    shift = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        query = tl.zeros([ROWS, BLOCK_D], tl.float32)
        query = times(normal, live, query_map, d, query, width, D, D, False, PRECISION, BLOCK_K)
        store_rows(floats + QUERY * D, d, live, query, D)
        shift += tl.sum(query * load_vector(vectors + QUERY_BIAS * D, d, D), axis=1)
    tl.store(stats + SHIFT, shift, mask=live)
    tl.debug_barrier()


@triton.jit
def collect_updates(
    sums, totals, floats, operands, stats, live, vectors, width, num_parts, part_stride,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``Û``, a mean over tokens, from sums over their parts, in their order; and what of it goes into the GRU."""
    total = tl.zeros([ROWS], tl.float32)
    for part in range(0, num_parts):
        total += tl.load(totals + part * part_stride, mask=live, other=0.0)
    share = 1.0 / tl.where(total > 0.0, total, 1.0)
    tl.store(stats + TOTAL, total, mask=live)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        update = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for part in range(0, num_parts):
            update += load_rows(sums + part * part_stride, d, live, D)
        update *= share[:, None]
        store_rows(floats + UPDATE * D, d, live, update, D)
        weight, bias = load_vector(vectors + UPDATE_WEIGHT * D, d, D), load_vector(vectors + UPDATE_BIAS * D, d, D)
        store_rows(operands + GATED_UPDATE * D, d, live, update * weight + bias, D)
    tl.debug_barrier()


@triton.jit
def step_slots(
    slots, result, floats, operands, stats, live, filled, input_map, hidden_map, mlp_in, mlp_out, vectors,
    width, hidden_width, ln_eps,
    ROWS: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """GRU and MLP: ``result = s' + MLP(LN_m(s'))`` with ``s' = GRU(Û, s)``; slots of empty classes stay as they are."""
    normal, hidden_layer = operands + NORMAL_MLP * D, operands + HIDDEN_LAYER * D
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        nothing = tl.zeros([ROWS, BLOCK_D], tl.float32)
        r, z, inner = _times_gates(
            operands + GATED_UPDATE * D, live, input_map, d, nothing, nothing, nothing, width, D, PRECISION, BLOCK_K
        )
        r, z, recurrent = _times_gates(slots, live, hidden_map, d, r, z, nothing, width, D, PRECISION, BLOCK_K)
        r = tl.sigmoid(r + load_vector(vectors + BIAS_IR * D, d, D) + load_vector(vectors + BIAS_HR * D, d, D))
        z = tl.sigmoid(z + load_vector(vectors + BIAS_IZ * D, d, D) + load_vector(vectors + BIAS_HZ * D, d, D))
        recurrent += load_vector(vectors + BIAS_HN * D, d, D)
        candidate = tanh(inner + load_vector(vectors + BIAS_IN * D, d, D) + r * recurrent)
        store_rows(floats + GATE_R * D, d, live, r, D)
        store_rows(floats + GATE_Z * D, d, live, z, D)
        store_rows(floats + CANDIDATE * D, d, live, candidate, D)
        store_rows(floats + RECURRENT * D, d, live, recurrent, D)
        store_rows(result, d, live, candidate + z * (load_rows(slots, d, live, D) - candidate), D)
    tl.debug_barrier()
    mean, rstd = moments(result, live, width, ln_eps, ROWS, D, BLOCK_D)
    tl.store(stats + MLP_MEAN, mean, mask=live)
    tl.store(stats + MLP_RSTD, rstd, mask=live)
    _normalize(result, normal, live, vectors + MLP_WEIGHT * D, vectors + MLP_BIAS * D, mean, rstd, width, D, BLOCK_D)
    tl.debug_barrier()
    for first in range(0, hidden_width, BLOCK_D):
        n = first + tl.arange(0, BLOCK_D)
        hidden = tl.zeros([ROWS, BLOCK_D], tl.float32)
        hidden = times(normal, live, mlp_in, n, hidden, width, D, HIDDEN, True, PRECISION, BLOCK_K)
        hidden += load_vector(vectors + BIAS_HIDDEN * D, n, HIDDEN)
        # Not max(hidden, 0), which would hide a NaN.
        store_rows(hidden_layer, n, live, tl.where(hidden <= 0.0, 0.0, hidden), HIDDEN)
    tl.debug_barrier()
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        out = tl.zeros([ROWS, BLOCK_D], tl.float32)
        out = times(hidden_layer, live, mlp_out, d, out, hidden_width, HIDDEN, D, True, PRECISION, BLOCK_K)
        out += load_rows(result, d, live, D) + load_vector(vectors + BIAS_OUT * D, d, D)
        store_rows(result, d, live, tl.where(filled[:, None], out, load_rows(slots, d, live, D)), D)
    tl.debug_barrier()


# --------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _through_affine(gradient, normal, d, live, weight, d_weight, work, mean_1, mean_x, D: tl.constexpr):
    """A block of the backward of a norm's affine: sums for weight and bias, which stand side by side, the gradient of
    the normalized rows into ``work``, and both means that their own backward wants."""
    _store_sum(d_weight, d, gradient * normal, D)
    _store_sum(d_weight + D, d, gradient, D)
    gradient *= load_vector(weight, d, D)
    store_rows(work + W_NORMAL * D, d, live, gradient, D)
    return mean_1 + tl.sum(gradient, axis=1) / D, mean_x + tl.sum(gradient * normal, axis=1) / D


@triton.jit
def step_slots_backward(
    slots, floats, operands, stats, d_slots, records, work, live, filled,
    input_map, hidden_map, mlp_in, mlp_out, vectors, sums, width, hidden_width,
    ROWS: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward of :func:`step_slots` and :func:`collect_updates`.

    In ``d_slots`` the gradient of the result becomes that of ``s`` but for its queries; that of ``Û`` goes to ``work``.
    Rows of an empty class hand their gradient on and record zeros.
    """
    d_out, d_hidden = records + D_OUT * D, records + D_HIDDEN * D
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        gradient = tl.where(filled[:, None], load_rows(d_slots, d, live, D), 0.0)
        store_rows(d_out, d, live, gradient, D)
        _store_sum(sums + BIAS_OUT * D, d, gradient, D)
    tl.debug_barrier()
    for first in range(0, hidden_width, BLOCK_D):
        n = first + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        gradient = times(d_out, live, mlp_out, n, gradient, width, D, HIDDEN, False, PRECISION, BLOCK_K)
        gradient = tl.where(load_rows(operands + HIDDEN_LAYER * D, n, live, HIDDEN) > 0.0, gradient, 0.0)
        store_rows(d_hidden, n, live, gradient, HIDDEN)
        _store_sum(sums + BIAS_HIDDEN * D, n, gradient, HIDDEN)
    tl.debug_barrier()

    mean = tl.load(stats + MLP_MEAN, mask=live, other=0.0)
    rstd = tl.load(stats + MLP_RSTD, mask=live, other=0.0)
    mean_1 = tl.zeros([ROWS], tl.float32)
    mean_x = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        gradient = times(d_hidden, live, mlp_in, d, gradient, hidden_width, HIDDEN, D, False, PRECISION, BLOCK_K)
        z = load_rows(floats + GATE_Z * D, d, live, D)
        candidate = load_rows(floats + CANDIDATE * D, d, live, D)
        stepped = candidate + z * (load_rows(slots, d, live, D) - candidate)
        normal = tl.where((d < D)[None, :], (stepped - mean[:, None]) * rstd[:, None], 0.0)
        mean_1, mean_x = _through_affine(
            gradient, normal, d, live, vectors + MLP_WEIGHT * D, sums + MLP_WEIGHT * D, work, mean_1, mean_x, D
        )
    tl.debug_barrier()

    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        s = load_rows(slots, d, live, D)
        r = load_rows(floats + GATE_R * D, d, live, D)
        z = load_rows(floats + GATE_Z * D, d, live, D)
        candidate = load_rows(floats + CANDIDATE * D, d, live, D)
        before = load_rows(d_slots, d, live, D)
        normal = (candidate + z * (s - candidate) - mean[:, None]) * rstd[:, None]
        step = layer_norm_backward(load_rows(work + W_NORMAL * D, d, live, D), normal, mean_1, mean_x, rstd)
        gradient = tl.where(filled[:, None], before + step, 0.0)
        d_candidate = gradient * (1.0 - z) * (1.0 - candidate * candidate)
        d_r = d_candidate * load_rows(floats + RECURRENT * D, d, live, D) * r * (1.0 - r)
        d_z = gradient * (s - candidate) * z * (1.0 - z)
        d_recurrent = d_candidate * r
        store_rows(records + D_CANDIDATE * D, d, live, d_candidate, D)
        store_rows(records + D_R * D, d, live, d_r, D)
        store_rows(records + D_Z * D, d, live, d_z, D)
        store_rows(records + D_RECURRENT * D, d, live, d_recurrent, D)
        store_rows(d_slots, d, live, tl.where(filled[:, None], gradient * z, before), D)
        _store_sum(sums + BIAS_IR * D, d, d_r, D)
        _store_sum(sums + BIAS_IZ * D, d, d_z, D)
        _store_sum(sums + BIAS_IN * D, d, d_candidate, D)
        _store_sum(sums + BIAS_HR * D, d, d_r, D)
        _store_sum(sums + BIAS_HZ * D, d, d_z, D)
        _store_sum(sums + BIAS_HN * D, d, d_recurrent, D)
    tl.debug_barrier()

    of_update = tl.zeros([ROWS], tl.float32)
    of_columns = tl.zeros([ROWS], tl.float32)
    kind = records.dtype.element_ty
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        # The candidate is last in the weight, and recorded first.
        d_candidate, d_gates = records + D_CANDIDATE * D, records + D_R * D
        gradient = times(d_candidate, live, input_map + 2 * D * D, d, gradient, width, D, D, False, PRECISION, BLOCK_K)
        gradient = times(d_gates, live, input_map, d, gradient, 2 * width, 2 * D, D, False, PRECISION, BLOCK_K)
        update = load_rows(floats + UPDATE * D, d, live, D)
        _store_sum(sums + UPDATE_WEIGHT * D, d, gradient * update, D)
        _store_sum(sums + UPDATE_BIAS * D, d, gradient, D)
        # As products will see it.
        gradient = (gradient * load_vector(vectors + UPDATE_WEIGHT * D, d, D)).to(kind).to(tl.float32)
        store_rows(work + W_UPDATE * D, d, live, gradient, D)
        of_update += tl.sum(gradient * update, axis=1)
        of_columns += tl.sum(gradient, axis=1)
        onward = load_rows(d_slots, d, live, D)
        onward = times(d_gates, live, hidden_map, d, onward, 3 * width, 3 * D, D, False, PRECISION, BLOCK_K)
        store_rows(d_slots, d, live, onward, D)
    tl.store(work + W_NUMBERS * D + OF_UPDATE, of_update, mask=live)
    tl.store(work + W_NUMBERS * D + OF_COLUMNS, of_columns, mask=live)
    tl.debug_barrier()


@triton.jit
def make_queries_backward(
    d_queries, d_shifts, slots, floats, stats, d_slots, records, work, live, query_map, vectors, sums,
    width, num_parts, part_stride,
    ROWS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Backward of :func:`make_queries`, from sums over parts of the tokens, in their order, to the slots' gradient."""
    d_shift = tl.zeros([ROWS], tl.float32)
    for part in range(0, num_parts):
        d_shift += tl.load(d_shifts + part * part_stride, mask=live, other=0.0)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for part in range(0, num_parts):
            gradient += load_rows(d_queries + part * part_stride, d, live, D)
        query = load_rows(floats + QUERY * D, d, live, D)
        _store_sum(sums + QUERY_WEIGHT * D, d, gradient * query, D)
        _store_sum(sums + QUERY_BIAS * D, d, d_shift[:, None] * query, D)
        gradient *= load_vector(vectors + QUERY_WEIGHT * D, d, D)
        gradient += d_shift[:, None] * load_vector(vectors + QUERY_BIAS * D, d, D)
        store_rows(records + D_QUERY * D, d, live, gradient, D)
    tl.debug_barrier()
    mean = tl.load(stats + MEAN, mask=live, other=0.0)
    rstd = tl.load(stats + RSTD, mask=live, other=0.0)
    mean_1 = tl.zeros([ROWS], tl.float32)
    mean_x = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        gradient = times(records + D_QUERY * D, live, query_map, d, gradient, width, D, D, True, PRECISION, BLOCK_K)
        normal = (load_rows(slots, d, live, D) - mean[:, None]) * rstd[:, None]
        normal = tl.where((d < D)[None, :], normal, 0.0)
        mean_1, mean_x = _through_affine(
            gradient, normal, d, live, vectors + SLOTS_WEIGHT * D, sums + SLOTS_WEIGHT * D, work, mean_1, mean_x, D
        )
    tl.debug_barrier()
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        normal = (load_rows(slots, d, live, D) - mean[:, None]) * rstd[:, None]
        step = layer_norm_backward(load_rows(work + W_NORMAL * D, d, live, D), normal, mean_1, mean_x, rstd)
        step += load_rows(d_slots, d, live, D)
        store_rows(d_slots, d, live, step, D)
    tl.debug_barrier()
