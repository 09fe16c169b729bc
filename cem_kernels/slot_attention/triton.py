"""Slot attention over class groups in Triton: what ``kernels.py`` computes, launched in one of two regimes.

With few tokens a class one program does all of it for its classes, in one launch. With many, that would leave most of
the device idle: then every iteration is a launch, and tokens are split over programs. :func:`tokens_are_split`
chooses, from sizes that the host knows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cem_kernels.groups import ClassGroups
from cem_kernels.slot_attention import kernels_slots as fields
from cem_kernels.slot_attention.kernels import (
    attend_backward_kernel,
    attend_kernel,
    slot_attention_backward_kernel,
    slot_attention_forward_kernel,
    start_backward_kernel,
)
from cem_kernels.slot_attention.weights import SlotAttentionWeights, absorb
from cem_kernels.triton_utils import (
    ALL_REGISTERS,
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

# --------------------------------------------------------------------------------------------------------- launchers

BYTES_OF_A_PROGRAM = 2**18  # of tokens, that one program reads in about the time that another launch takes
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
        # A kernel of every step holds more than one of a few.
        largest = "slot_attention_forward" if precision == "ieee" else "slot_attention_backward"
        depth = 32 if even and few and kernel != largest else 16
        t = Tiles(16, depth, columns, 8, 2 if precision == "ieee" else 3)
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
    """How a call is cut: groups of classes, and parts of a group's tokens (0: one program does it all)."""

    groups: int
    parts: int
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
        sizes = {"D": x.shape[2], "HIDDEN": hidden_width, "PRECISION": precision}
        return cls(groups, parts, rows, {"SLOTS": slots, "CLASSES": classes}, sizes, dtype)

    def partials(self, x: Tensor, rows: int) -> Tensor:
        """Where the parts of the tokens leave their sums; rows stay aligned."""
        return x.new_empty((self.parts, rows, self.sizes["D"] + 4), dtype=torch.float32)

    def arrived(self, x: Tensor, num_iterations: int) -> Tensor:
        """Counters of who has come, one an iteration and group, not set."""
        return x.new_empty((num_iterations, self.groups), dtype=torch.int32)

    def options(self, kernel: str) -> dict[str, Any]:
        """What ``kernel`` is compiled for."""
        t = tuned(kernel, tiles(kernel, self.sizes["D"], self.rows, self.sizes["PRECISION"], self.dtype))._asdict()
        # Tiles are overwritten in place. Of one with fewer elements than threads, warps would hold copies, and a slow
        # one could read what a fast one has stored.
        t["num_warps"] = min(t["num_warps"], min(self.rows, t["BLOCK_N"]) * t["BLOCK_D"] // 32)
        if kernel == "start_backward":  # which sees no token
            del t["BLOCK_N"]
        return {**self.sizes, **self.by_class, **t, **ALL_REGISTERS}


WEIGHTS = "Tensor query_map, Tensor input_map, Tensor hidden_map, Tensor mlp_in, Tensor mlp_out, Tensor vectors"


def _forward_shapes(x, order, offsets, initial, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors, J, *rest):
    (K, S, D), hidden = initial.shape, mlp_in.shape[0]
    wide = {"dtype": torch.float32}
    return (
        x.new_empty((J + 1, K, S, D), **wide),
        x.new_empty((J, K * S, fields.FLOATS.value * D), **wide),
        mlp_in.new_empty((J, K * S, fields.HIDDEN_LAYER.value * D + hidden)),
        x.new_empty((J, K * S, fields.STATS.value), **wide),
        x.new_empty((*x.shape[:2], 2), **wide),
    )


@operator(
    f"slot_attention_forward(Tensor x, Tensor order, Tensor offsets, Tensor initial, {WEIGHTS}, int num_iterations, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_shapes,
)
def slot_attention_forward(
    x: Tensor, order: Tensor, offsets: Tensor, initial: Tensor, query_map: Tensor, input_map: Tensor,
    hidden_map: Tensor, mlp_in: Tensor, mlp_out: Tensor, vectors: Tensor, num_iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``x [B, T, D]`` and ``initial [K, S, D]`` to all slots ``[J + 1, K, S, D]``, and what the backward needs.

    Matrices are in the dtype of products; ``vectors [15D + hidden]``, fp32, are those that :func:`_vectors` makes.
    """
    x, initial = with_rows(x), initial.contiguous()
    (num_classes, num_slots, width), hidden_width = initial.shape, mlp_in.shape[0]
    weights = (query_map, input_map, hidden_map, mlp_in, mlp_out, vectors)
    kept = _forward_shapes(x, order, offsets, initial, *weights, num_iterations)
    sizes = (*x.stride()[:2], *x.shape[:2], width, hidden_width, num_classes, num_slots, num_iterations)
    plan = Plan.of(x, num_classes, num_slots, mlp_in)
    if plan.parts == 0:
        launch(
            slot_attention_forward_kernel, (plan.groups,), x.device,
            x, order, offsets, initial, *weights, *kept, *sizes, eps, LN_EPS,
            **plan.options("slot_attention_forward"),
        )  # fmt: skip
        return kept
    partials, arrived = plan.partials(x, num_classes * num_slots), plan.arrived(x, num_iterations).zero_()
    for iteration in range(num_iterations):
        launch(
            attend_kernel, (plan.parts, plan.groups), x.device,
            x, order, offsets, initial, *weights, *kept, partials, arrived, *sizes, iteration, plan.parts, eps, LN_EPS,
            **plan.options("attend"),
        )  # fmt: skip
    return kept


def _backward_shapes(x, order, offsets, query_map, input_map, hidden_map, mlp_in, mlp_out, vectors, slots, *rest):
    J, (K, S, D) = slots.shape[0] - 1, slots.shape[1:]
    records = mlp_in.new_empty((J, K * S, fields.D_HIDDEN.value * D + mlp_in.shape[0]))
    return x.new_empty(x.shape), slots.new_empty(slots.shape[1:]), records, vectors.new_empty(vectors.shape)


@operator(
    f"slot_attention_backward(Tensor x, Tensor order, Tensor offsets, {WEIGHTS}, Tensor slots, Tensor floats, "
    "Tensor operands, Tensor stats, Tensor statistics, Tensor upstream, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_shapes,
)
def slot_attention_backward(
    x: Tensor, order: Tensor, offsets: Tensor, query_map: Tensor, input_map: Tensor, hidden_map: Tensor, mlp_in: Tensor,
    mlp_out: Tensor, vectors: Tensor, slots: Tensor, floats: Tensor, operands: Tensor, stats: Tensor,
    statistics: Tensor, upstream: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``x``, of the initial slots, of the products' results (``records``) and of ``vectors``."""
    x, upstream = with_rows(x), upstream.contiguous()
    J, (K, S, D) = slots.shape[0] - 1, slots.shape[1:]
    weights, kept = (query_map, input_map, hidden_map, mlp_in, mlp_out, vectors), (slots, floats, operands, stats)
    _, d_slots, records, _ = _backward_shapes(x, order, offsets, *weights, slots)
    plan = Plan.of(x, K, S, mlp_in)
    # Iterations add to dx, which should not be rounded in between.
    dx = x.new_empty(x.shape, dtype=torch.float32)
    work = slots.new_empty((K * S, fields.W_NUMBERS.value * D + fields.NUMBERS.value))
    sums = slots.new_empty((J * plan.groups, *vectors.shape))
    strides, sizes = x.stride()[:2], (*x.shape[:2], D, mlp_in.shape[0], K, S, J)
    if plan.parts == 0:
        launch(
            slot_attention_backward_kernel, (plan.groups,), x.device,
            x, order, offsets, *weights, *kept, statistics, upstream, d_slots, records, work, sums, dx,
            *strides, *sizes, eps,
            **plan.options("slot_attention_backward"),
        )  # fmt: skip
        return dx.to(x.dtype), d_slots, records, sums.sum(dim=0)
    partials, arrived = plan.partials(x, K * S), plan.arrived(x, J)
    launch(
        start_backward_kernel, (plan.groups,), x.device,
        offsets, *weights[1:], *kept, upstream, d_slots, records, work, sums, arrived, *sizes[2:],
        **plan.options("start_backward"),
    )  # fmt: skip
    for iteration in range(J - 1, -1, -1):
        launch(
            attend_backward_kernel, (plan.parts, plan.groups), x.device,
            x, order, offsets, *weights, *kept, statistics, d_slots, records, work, sums, partials, arrived, dx,
            *strides, *sizes, iteration, plan.parts, eps,
            **plan.options("attend_backward"),
        )  # fmt: skip
    return dx.to(x.dtype), d_slots, records, sums.sum(dim=0)


# ------------------------------------------------------------------------------------------------- autograd.Function


class _SlotAttention(torch.autograd.Function):
    """Of :func:`slot_attention_forward`'s arguments, to the final slots and what the backward needs."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        kept = slot_attention_forward(*inputs)
        return kept[0][-1].clone(), *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, order, offsets, _, *weights, _, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, order, offsets, *weights, *output[1:])

    @staticmethod
    @backward_once
    def backward(ctx, upstream, *_):
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


def _vectors(w: SlotAttentionWeights) -> Tensor:
    """The weights that are vectors side by side, in the order that ``kernels_slots.py`` names."""
    inputs = w.norm_inputs_weight, w.norm_inputs_bias
    norms = w.norm_slots_weight, w.norm_slots_bias, w.norm_mlp_weight, w.norm_mlp_bias
    return torch.cat([w.gru_bias_ih, w.gru_bias_hh, w.mlp_out_bias, *inputs, *norms, *inputs, w.mlp_in_bias])


def slot_attention(
    tokens: Tensor, slots: Tensor, groups: ClassGroups, weights: SlotAttentionWeights, num_iterations: int, eps: float,
    product_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``tokens [B, T, D]``, ``slots [K, S, D]`` to the final slots ``[K, S, D]``, in fp32."""
    w = weights
    query_map, input_map = absorb(w)
    maps = query_map, input_map, w.gru_weight_hh, w.mlp_in_weight, w.mlp_out_weight
    result, *_ = _SlotAttention.apply(
        tokens, groups.order, groups.offsets, slots, *(m.to(product_dtype or tokens.dtype).contiguous() for m in maps),
        _vectors(w), num_iterations, eps,
    )  # fmt: skip
    return result
