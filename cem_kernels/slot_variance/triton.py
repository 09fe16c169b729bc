"""What slot variances cost in Triton: one launch forward, which moves the slots, and one backward.

``kernels.py`` says what is computed. The backward attends as the forward did, from the attention that it has kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cem_kernels.groups import ClassGroups
from cem_kernels.penalty import Nats
from cem_kernels.slot_variance.kernels import slot_variance_backward_kernel, slot_variance_forward_kernel
from cem_kernels.slot_variance.running import RunningSlots
from cem_kernels.triton_utils import ALL_REGISTERS, backward_once, launch, operator, processors, splits_per_class, tuned

# --------------------------------------------------------------------------------------------------------- launchers

ROWS, TILE = 16, 512  # of a tile: rows, and columns of all slots
# Programs of four warps that fill a multiprocessor; fewer rows than this are not worth splitting.
PROGRAMS_PER_PROCESSOR, ROWS_PER_PART = 4, 64


class Blocks(NamedTuple):
    """Sizes that the kernels are compiled for. They follow width and slots, never the batch."""

    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


def blocks(num_slots: int, columns: int, tile: int, num_warps: int) -> Blocks:
    """A tile of rows × slots × columns has as many numbers whatever the slots, so that a thread can hold its share."""
    widest = max(16, triton.next_power_of_2(columns))
    return Blocks(ROWS, min(tile // triton.next_power_of_2(num_slots), widest), num_warps)


def _forward_shapes(x, order, offsets, centroids, *rest):
    num_classes, num_slots, _ = centroids.shape
    shapes = ((), (), (num_classes,), (num_classes,), (), centroids.shape, centroids.shape, (x.shape[0], num_slots))
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


@operator(
    "slot_variance_forward(Tensor x, Tensor order, Tensor offsets, Tensor(a!) centroids, Tensor(b!) variances, "
    "Tensor(c!) shares, Tensor(d!) batches, Tensor(e!) ignored, float noise_std) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_shapes,
)
def slot_variance_forward(
    x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor, variances: Tensor, shares: Tensor, batches: Tensor,
    ignored: Tensor, noise_std: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``x [B, C]`` to both losses, ``penalty, mse [K]``; for the backward ``Σ M_c``, ``center, coefficient [K, S, C]``
    and, in the order of classes, ``attention [B, S]``. The slots are moved."""
    result = _forward_shapes(x, order, offsets, centroids)
    num_classes, num_slots, columns = centroids.shape
    sizes = tuned("slot_variance_forward", blocks(num_slots, columns, TILE, 8))
    aside = [x.new_empty(centroids.shape, dtype=torch.float32) for _ in range(3)]
    arrived = x.new_zeros(1, dtype=torch.int32)
    launch(
        slot_variance_forward_kernel, (num_classes,), x.device,
        x, order, offsets, centroids, variances, shares, batches, ignored, arrived, *aside, *result,
        *x.stride(), num_slots, columns, noise_std**2, noise_std**-2, columns**-0.5,
        SLOTS=triton.next_power_of_2(num_slots), BLOCK_K=64, **sizes._asdict(), **ALL_REGISTERS,
    )  # fmt: skip
    for moved in (centroids, variances, shares, batches, ignored):
        torch.autograd.graph.increment_version(moved)  # autograd does not see what a kernel writes
    return result


@operator(
    "slot_variance_backward(Tensor x, Tensor order, Tensor offsets, Tensor weight, Tensor center, Tensor coefficient, "
    "Tensor attention, Tensor? grad_rob, Tensor? grad_penalty) -> Tensor",
    fake=lambda x, *rest: x.new_empty(x.shape),
)
def slot_variance_backward(
    x: Tensor, order: Tensor, offsets: Tensor, weight: Tensor, center: Tensor, coefficient: Tensor, attention: Tensor,
    grad_rob: Tensor | None, grad_penalty: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of ``x [B, C]``, contiguous, in its dtype."""
    dx = x.new_empty(x.shape)
    num_classes, num_slots, columns = center.shape
    sizes = tuned("slot_variance_backward", blocks(num_slots, columns, TILE // 2, 4))
    column_blocks = triton.cdiv(columns, sizes.BLOCK_C)
    programs = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(x.device), column_blocks)
    parts = splits_per_class(triton.cdiv(x.shape[0], ROWS_PER_PART), num_classes, programs)
    launch(
        slot_variance_backward_kernel, (column_blocks, parts, num_classes), x.device,
        x, order, offsets, weight, center, coefficient, attention, grad_rob, grad_penalty, dx,
        *x.stride(), grad_penalty.stride(0) if grad_penalty is not None else 0, x.shape[0], parts, num_slots, columns,
        SLOTS=triton.next_power_of_2(num_slots), **sizes._asdict(),
    )  # fmt: skip
    return dx


# ------------------------------------------------------------------------------------------------- autograd.Function


class _SlotVariance(torch.autograd.Function):
    """Of :func:`slot_variance_forward`'s arguments. Monitors take no gradient."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = slot_variance_forward(*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, intra, _, mse, *kept = output
        ctx.save_for_backward(*inputs[:3], *kept)
        ctx.mark_non_differentiable(intra, mse, *kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    @backward_once
    def backward(ctx, rob, intra, penalty, *rest):
        if rob is penalty is None:
            return (None,) * 9
        return slot_variance_backward(*ctx.saved_tensors, rob, penalty), *(None,) * 8


def slot_variance(features: Tensor, groups: ClassGroups, running: RunningSlots, penalty: Nats) -> tuple[Tensor, ...]:
    """``features [B, C]`` to ``(rob_loss, intra_mse, penalty [K], mse [K])``; moves ``running``.

    Differentiable once in the features.
    """
    result: tuple[Tensor, ...] = _SlotVariance.apply(
        features, groups.order, groups.offsets, *running, penalty.noise_std
    )
    return result[:4]
