"""What the variance of features around running slots of their class costs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cem_kernels import backends, validation
from cem_kernels.groups import ClassGroups
from cem_kernels.penalty import Nats
from cem_kernels.slot_variance import eager, reference
from cem_kernels.slot_variance.running import RunningSlots
from cem_kernels.variance.running import ClassVariance

MOST_SLOTS = 16


def size_outside_kernels(num_classes: int, num_slots: int) -> str | None:
    """Which of the two kernels do not take; None where they take both."""
    if num_slots > MOST_SLOTS:
        return f"kernels take at most {MOST_SLOTS} slots, got {num_slots}"
    if num_classes > backends.MOST_CLASSES:
        return f"kernels take at most {backends.MOST_CLASSES} classes, got {num_classes}"
    return None


def slot_variance(
    features: Tensor,
    groups: ClassGroups,
    running: RunningSlots,
    penalty: Nats,
    *,
    backend: str = "auto",
) -> ClassVariance:
    """What the variance of the features around their class's running slots costs.

    A class has ``S`` slots, each with a centroid ``c``, a variance ``v`` per column and a share ``π``. A sample ``x``
    attends to those of its class by how well each explains it; ``σ²`` is the noise's variance, ``C`` counts columns::

        l_s = log π_s − ½ Σ_d [ (x_d − c_sd)² / (v_sd + σ²) + log(v_sd + σ²) ]          p = softmax over slots (l / √C)

    Without ``√C`` attention is all or nothing where there are many columns. With ``W_s = Σ p_s`` over the class's ``M``
    samples, ``w_s = W_s / M``, and ``p`` and ``c`` without a gradient::

        u_sd = Σ p_s (x_d − c_sd)² / W_s                            v ← v + min(.1 S w_s, .5) (u − v)
        c_s ← c_s + .03 S w_s (Σ p_s x / W_s − c_s)                 π ← π + .03 (w − π)
        penalty_c = Σ_s w_s · mean over columns of penalty(v_s)     mse_c = Σ_s w_s · mean over columns of u_s
        rob_loss = Σ_c M_c penalty_c / Σ_c M_c                      intra_mse likewise

    The penalty has the value of the running variance and the gradient of ``u``: ``∂v/∂x = 2 p_s (x − c_s) / W_s``.
    ``intra_mse`` and ``class_mse`` are monitors and have none. The first batch of a class gives it its slots, far apart
    (:func:`cem_kernels.slot_variance.reference.first_slots`), no more than it has samples; a slot whose share is below
    ``.05 / S`` later is put on the sample that the slots explain worst, as wide as the heaviest, with half of its
    share. A batch that is far off is measured and not remembered, as in
    :func:`cem_kernels.variance.centroid_variance`, of which this is the several-slot form: with one slot it differs in
    ``mse`` alone, which is around the slot.

    Args:
        features: ``[B, ...]``, fp16, bf16, fp32 or fp64; any strides. Every axis after the first is a column axis.
        groups: the batch's classes, ``B`` samples.
        running: moved in place, once a call. A class with a number that would come to be NaN or infinite does not move
            and does not count the batch. What a call measures depends on it, gradients included: it must not be called
            twice for one step, as activation checkpointing would.
        penalty: :class:`cem_kernels.Nats`, whose ``σ`` is the noise's.
        backend: see :mod:`cem_kernels.backends`. ``triton`` takes fp32, bf16 and fp16, with ``running`` in fp32 and
            contiguous, at most 16 slots and 65,535 classes; it is differentiable once. ``eager`` waits for no device.

    Returns:
        :class:`~cem_kernels.ClassVariance`. Where there is no sample the losses are zero and attached to the graph.

    Raises:
        TypeError: features, centroids, variances or shares are not floating-point, batches or ignored are not int64,
            or the penalty is not of nats.
        ValueError: shapes or devices do not fit; running slots that take a gradient; unknown backend.
        BackendUnavailableError: the backend asked for by name cannot run this call.

    Source: attention over slots as in Locatello et al. 2020, arXiv:2006.15055, with a mixture's variances; centers that
    run over batches as in Wen et al. 2016.
    """
    backends.check_backend(backend)
    validation.check_float("features", features)
    columns = math.prod(features.shape[1:])
    if features.dim() < 2 or features.shape[0] != groups.num_samples or columns == 0:
        raise ValueError(f"features must have shape [B={groups.num_samples}, ...], got {list(features.shape)}")
    validation.check_together(features, [("groups", groups.order)])
    if not isinstance(penalty, Nats):
        raise TypeError(f"penalty must be Nats, got {type(penalty).__name__}")
    num_slots = running.shares.shape[-1] if running.shares.dim() else None
    counter: dict[str, int | None] = {"K": groups.num_classes}
    shares = counter | {"S": num_slots or None}
    moments = shares | {"C": columns}
    shapes = {"centroids": moments, "variances": moments, "shares": shares, "batches": counter, "ignored": counter}
    objection = validation.check_running(running, shapes, features) or size_outside_kernels(
        groups.num_classes, num_slots or 0
    )
    chosen = backends.pick(backend, "slot_variance", features, objection)
    implementation: Any = reference if chosen == "reference" else eager
    if chosen == "triton":
        from cem_kernels.slot_variance import triton  # only here, because importing needs Triton

        implementation = triton
    with torch.autocast(features.device.type, enabled=False):
        return ClassVariance(*implementation.slot_variance(features.flatten(1), groups, running, penalty))
