"""What variances cost in Triton: one launch forward, which moves running moments where there are any, one backward.

``kernels.py`` says what is computed. Around running centroids the variance comes without another look at a feature:
``mean of (x − μ)² = mean of (x − mean)² + (mean − μ)²``; the backward is the same, with ``μ`` in place of the mean.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cem_kernels.groups import ClassGroups
from cem_kernels.penalty import Nats, Penalty
from cem_kernels.triton_utils import ALL_REGISTERS, backward_once, launch, operator, processors, splits_per_class, tuned
from cem_kernels.variance.kernels import variance_backward_kernel, variance_forward_kernel
from cem_kernels.variance.running import RunningMoments

# --------------------------------------------------------------------------------------------------------- launchers

WARP_BYTES = 512
# Programs of one warp that fill a multiprocessor; fewer rows than this are not worth splitting.
PROGRAMS_PER_PROCESSOR, ROWS_PER_PART = 16, 64


class Blocks(NamedTuple):
    """Sizes that the kernels over rows are compiled for. They follow width and dtype, never the batch."""

    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


def blocks(x: Tensor) -> Blocks:
    """A warp reads 512 bytes of a row, and a thread holds all rows of its columns: no reduction crosses warps."""
    return Blocks(16, min(WARP_BYTES // x.element_size(), max(16, triton.next_power_of_2(x.shape[1]))), 1)


def parts_of(x: Tensor, num_classes: int, column_blocks: int) -> int:
    programs = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(x.device), column_blocks)
    return splits_per_class(triton.cdiv(x.shape[0], ROWS_PER_PART), num_classes, programs)


def _forward_shapes(x, order, offsets, *rest):
    num_classes, columns = offsets.shape[0] - 1, x.shape[1]
    per_class, per_column = (num_classes,), (num_classes, columns)
    shapes = ((), (), per_class, per_class, (), per_column, per_column)
    low = x.new_empty(per_column, dtype=torch.bfloat16)
    return *(x.new_empty(shape, dtype=torch.float32) for shape in shapes), low


@operator(
    "variance_forward(Tensor x, Tensor order, Tensor offsets, Tensor(a!)? centroids, Tensor(b!)? variances, "
    "Tensor(c!)? batches, Tensor(d!)? ignored, Tensor? threshold_at, str penalty, float threshold, float floor, "
    "float gamma, float unit, int min_samples, float momentum) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_shapes,
)
def variance_forward(
    x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor | None, variances: Tensor | None,
    batches: Tensor | None, ignored: Tensor | None, threshold_at: Tensor | None, penalty: str, threshold: float,
    floor: float, gamma: float, unit: float, min_samples: int, momentum: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``x [B, C]`` to both losses, ``penalty, mse [K]``; for the backward ``Σ M_c``, ``center, slope, low [K, C]``.

    ``centroids, variances [K, C]`` and ``batches, ignored [K]`` are moved, or None: then centers are the batch's means.
    The threshold is read from ``threshold_at`` where that is given; of nats ``gamma`` is ``1/σ²``, and there is
    neither threshold nor floor.
    """
    result = _forward_shapes(x, order, offsets)
    rob, intra, penalties, mse, weight, center, slope, low = result
    num_classes, columns = center.shape
    sizes = tuned("variance_forward", blocks(x))
    column_blocks = triton.cdiv(columns, sizes.BLOCK_C)
    parts = parts_of(x, num_classes, column_blocks)
    # Each in memory of its own: Triton compiles another version for a pointer that is not aligned to 16 bytes.
    share = num_classes, column_blocks
    shapes = (share, share) if centroids is None else (share, share, (4, *share), center.shape)
    of_blocks = [x.new_empty(shape, dtype=torch.float32) for shape in shapes] + [None] * (4 - len(shapes))
    part_shape = (num_classes, parts, columns) if parts > 1 else (0,)
    # A distance to a centroid, unlike one to the mean, does not forgive what the mean has lost.
    kinds = torch.float32, torch.bfloat16 if centroids is None else torch.float32, torch.float32
    part_moments = (x.new_empty(part_shape, dtype=kind) for kind in kinds)
    arrived = x.new_zeros(num_classes * (column_blocks + 1) + 1, dtype=torch.int32)
    launch(
        variance_forward_kernel, (column_blocks, parts, num_classes), x.device,
        x, order, offsets, centroids, variances, batches, ignored, threshold_at, arrived, *part_moments, *of_blocks,
        center, low, slope, penalties, mse, rob, intra, weight,
        *x.stride(), columns, parts, min_samples, threshold, floor, gamma, unit, 1 - momentum,
        PENALTY=penalty, BLOCK_P=4, BLOCK_K=64, **sizes._asdict(), **ALL_REGISTERS,
    )  # fmt: skip
    for moved in (centroids, variances, batches, ignored):
        if moved is not None:
            torch.autograd.graph.increment_version(moved)  # autograd does not see what a kernel writes
    return result


@operator(
    "variance_backward(Tensor x, Tensor order, Tensor offsets, Tensor weight, Tensor center, Tensor slope, "
    "Tensor low, Tensor? grad_rob, Tensor? grad_intra, Tensor? grad_penalty, Tensor? grad_mse, int min_samples) "
    "-> Tensor",
    fake=lambda x, *rest: x.new_empty(x.shape),
)
def variance_backward(
    x: Tensor, order: Tensor, offsets: Tensor, weight: Tensor, center: Tensor, slope: Tensor,
    low: Tensor, grad_rob: Tensor | None, grad_intra: Tensor | None, grad_penalty: Tensor | None,
    grad_mse: Tensor | None, min_samples: int,
) -> Tensor:  # fmt: skip
    """The gradient of ``x [B, C]``, contiguous, in its dtype."""
    dx = x.new_empty(x.shape)
    num_classes, columns = center.shape
    sizes = tuned("variance_backward", blocks(x))
    column_blocks = triton.cdiv(columns, sizes.BLOCK_C)
    parts = parts_of(x, num_classes, column_blocks)
    launch(
        variance_backward_kernel, (column_blocks, parts, num_classes), x.device,
        x, order, offsets, center, low, slope, weight, grad_rob, grad_intra, grad_penalty, grad_mse, dx,
        *x.stride(), *(g.stride(0) if g is not None else 0 for g in (grad_penalty, grad_mse)),
        x.shape[0], columns, parts, min_samples, **sizes._asdict(),
    )  # fmt: skip
    return dx


# ------------------------------------------------------------------------------------------------- autograd.Function


class _Variance(torch.autograd.Function):
    """Of :func:`variance_forward`'s arguments. Monitors of running centroids take no gradient."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = variance_forward(*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, order, offsets, centroids, *_, ctx.min_samples, _ = inputs
        _, intra, _, mse, *kept = output
        ctx.save_for_backward(x, order, offsets, *kept)
        ctx.mark_non_differentiable(*kept, *(() if centroids is None else (intra, mse)))
        ctx.set_materialize_grads(False)

    @staticmethod
    @backward_once
    def backward(ctx, rob, intra, penalty, mse, *kept):
        if rob is intra is penalty is mse is None:
            return (None,) * 15
        return variance_backward(*ctx.saved_tensors, rob, intra, penalty, mse, ctx.min_samples), *(None,) * 14


def variance(
    features: Tensor,
    groups: ClassGroups,
    penalty: Penalty,
    min_samples: int,
    running: RunningMoments | None,
    momentum: float,
) -> tuple[Tensor, ...]:
    """``features [B, C]`` to ``(rob_loss, intra_mse, penalty [K], mse [K])``, differentiable once in the features.

    ``running`` is moved where it is given.
    """
    at: Tensor | None = None
    if isinstance(penalty, Nats):
        kind, threshold, floor, gamma = "nats", 0.0, 0.0, penalty.noise_std**-2
    else:
        kind, floor, gamma = penalty.hinge, penalty.floor, penalty.gamma
        at, threshold = (penalty.threshold, 0.0) if isinstance(penalty.threshold, Tensor) else (None, penalty.threshold)
    result: tuple[Tensor, ...] = _Variance.apply(
        features, groups.order, groups.offsets, *(running or (None,) * 4), at, kind, threshold, floor, gamma,
        penalty.unit, min_samples, momentum,
    )  # fmt: skip
    return result[:4]
