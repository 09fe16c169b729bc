"""What the variance of features inside their classes costs: two operators over one kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cem_kernels import backends, validation
from cem_kernels.groups import ClassGroups
from cem_kernels.penalty import LogHinge, Penalty, placed
from cem_kernels.variance import eager, reference
from cem_kernels.variance.running import MOMENTUM, ClassVariance, RunningMoments


def class_variance(
    features: Tensor,
    groups: ClassGroups,
    penalty: Penalty,
    *,
    min_samples: int = 2,
    backend: str = "auto",
) -> ClassVariance:
    """What the variance of the features inside each class of the batch costs.

    For a class ``c`` with ``M_c ≥ min_samples``, over its samples, per column::

        mean, v (unbiased, two-pass)       penalty_c = mean over columns of penalty(v)      mse_c = mean of (x − mean)²
        rob_loss = Σ_c w_c penalty_c / Σ_c w_c       intra_mse likewise       w_c = M_c / B

    Args:
        features: ``[B, ...]``, fp16, bf16, fp32 or fp64; any strides. Every axis after the first is a column axis
            (``[B, T, D]`` measures position and channel apart).
        groups: the batch's classes, ``B`` samples.
        penalty: :class:`cem_kernels.Nats` or :class:`cem_kernels.LogHinge`.
        min_samples: classes with fewer samples are left out. At least 2, or there is no variance.
        backend: see :mod:`cem_kernels.backends`. ``triton`` takes fp32, bf16 and fp16, at most 65,535 classes, and a
            threshold that needs no gradient; it is differentiable once, the others twice.

    Returns:
        :class:`ClassVariance`. Where no class has enough samples the losses are zero and attached to the graph.

    Raises:
        TypeError: features are not floating-point, or the penalty is none.
        ValueError: shapes or devices do not fit; ``min_samples < 2``; unknown backend.
        BackendUnavailableError: the backend asked for by name cannot run this call.
    """
    if min_samples < 2:
        raise ValueError(f"min_samples must be at least 2, got {min_samples}: one sample has no variance")
    return _variance("class_variance", features, groups, penalty, min_samples, None, 0.0, backend)


def centroid_variance(
    features: Tensor,
    groups: ClassGroups,
    running: RunningMoments,
    penalty: Penalty,
    *,
    momentum: float = MOMENTUM,
    backend: str = "auto",
) -> ClassVariance:
    """What the variance of the features around their class's running centroid costs.

    The variance inside a batch's classes falls as well where an encoder shrinks all of its features: classes come as
    close to each other as samples of a class do. Around centroids that stay where they were this is no way out. For a
    class ``c`` of ``M_c ≥ 1`` samples and ``b_c`` batches before this one, per column::

        mean over its samples              μ = centroids_c, or mean where b_c = 0         around = mean of (x − μ)²
        centroids_c ← μ + (1 − momentum) (mean − μ)
        variances_c ← variances_c + .1 (around − variances_c)      around where b_c = 0
        penalty_c = mean over columns of penalty(variances_c)      mse_c = mean of (x − mean)²
        rob_loss = Σ_c w_c penalty_c / Σ_c w_c       intra_mse likewise       w_c = M_c / B

    The penalty has the value of the running variance, which is less noisy than a batch's, and the gradient of
    ``around``: ``∂v/∂x = 2 (x − μ) / M_c``. ``intra_mse`` and ``class_mse`` are monitors and have none. A single sample
    counts, as it has a distance to its centroid.

    A batch whose variance is far above a class's running one is measured and not remembered, so that an outlier does
    not silence the penalty of later ones; a row of them is a lasting change, and the class begins anew, as it does
    where its first batches were outliers: see :func:`cem_kernels.variance.running.judged`.

    Args:
        features: ``[B, ...]``, fp16, bf16, fp32 or fp64; any strides. Every axis after the first is a column axis.
        groups: the batch's classes, ``B`` samples.
        running: moved in place, once a call. A class with a column that would come to be NaN or infinite does not move
            and does not count the batch. What a call measures depends on it, gradients included: it must not be called
            twice for one step, as activation checkpointing would.
        penalty: :class:`cem_kernels.Nats` or :class:`cem_kernels.LogHinge`; a threshold takes no gradient.
        momentum: in (0, 1). ``1 / (1 − momentum)`` batches is how far centroids look back; variances, ten.
        backend: see :mod:`cem_kernels.backends`. ``triton`` takes fp32, bf16 and fp16, with ``running`` in fp32 and
            contiguous, and at most 65,535 classes; it is differentiable once. ``eager`` waits for no device.

    Returns:
        :class:`ClassVariance`. Where there is no sample the losses are zero and attached to the graph.

    Raises:
        TypeError: features, centroids or variances are not floating-point, batches or ignored are not int64, or the
            penalty is none.
        ValueError: shapes or devices do not fit; momentum out of range; a threshold or running moments that take a
            gradient; unknown backend.
        BackendUnavailableError: the backend asked for by name cannot run this call.

    Source: the centers of Wen et al. 2016, "A Discriminative Feature Learning Approach for Deep Face Recognition".
    """
    if not 0 < momentum < 1:
        raise ValueError(f"momentum must lie between 0 and 1, got {momentum}")
    return _variance("centroid_variance", features, groups, penalty, 1, running, momentum, backend)


def _variance(
    operator: str,
    features: Tensor,
    groups: ClassGroups,
    penalty: Penalty,
    min_samples: int,
    running: RunningMoments | None,
    momentum: float,
    backend: str,
) -> ClassVariance:
    backends.check_backend(backend)
    validation.check_float("features", features)
    columns = math.prod(features.shape[1:])
    if features.dim() < 2 or features.shape[0] != groups.num_samples or columns == 0:
        raise ValueError(f"features must have shape [B={groups.num_samples}, ...], got {list(features.shape)}")
    validation.check_together(features, [("groups", groups.order)])
    penalty = placed(penalty, features)

    objection = None
    if isinstance(penalty, LogHinge) and isinstance(penalty.threshold, Tensor) and penalty.threshold.requires_grad:
        if running is not None:
            raise ValueError("threshold takes no gradient here")
        objection = "the threshold takes a gradient"
    if running is not None:
        moments, counter = {"K": groups.num_classes, "C": columns}, {"K": groups.num_classes}
        shapes = {"centroids": moments, "variances": moments, "batches": counter, "ignored": counter}
        objection = validation.check_running(running, shapes, features)
    if groups.num_classes > backends.MOST_CLASSES:
        objection = f"kernels take at most {backends.MOST_CLASSES} classes, got {groups.num_classes}"
    chosen = backends.pick(backend, operator, features, objection)
    implementation: Any = reference if chosen == "reference" else eager
    if chosen == "triton":
        from cem_kernels.variance import triton  # only here, because importing needs Triton

        implementation = triton
    with torch.autocast(features.device.type, enabled=False):
        return ClassVariance(
            *implementation.variance(features.flatten(1), groups, penalty, min_samples, running, momentum)
        )
