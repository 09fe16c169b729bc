"""Class variance around running centroids, and its penalty over a log threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cem_kernels import backends, validation
from cem_kernels.centroid_variance import eager, reference
from cem_kernels.centroid_variance.common import RunningMoments
from cem_kernels.class_variance import HINGES, MOST_CLASSES, ClassVariance, Hinge
from cem_kernels.groups import ClassGroups

__all__ = ["RunningMoments", "centroid_variance"]


def _triton() -> Callable[..., tuple[Tensor, ...]]:
    from cem_kernels.centroid_variance import triton  # only here, because importing needs Triton

    return triton.centroid_variance


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.centroid_variance,
    "eager": eager.centroid_variance,
    "triton": _triton,  # loaded when it is picked
}


def centroid_variance(
    features: Tensor,
    groups: ClassGroups,
    running: RunningMoments,
    *,
    threshold: float | Tensor,
    momentum: float = 0.99,
    eps_var: float = 1e-4,
    gamma: float = 1e-6,
    hinge: Hinge = "relu",
    backend: str = "auto",
) -> ClassVariance:
    """How far the log-variance of the features around their class's running centroid exceeds a threshold.

    The variance inside a batch's classes falls as well where an encoder shrinks all of its features: classes come as
    close to each other as samples of a class do. Around centroids that stay where they were this is no way out. For a
    class ``c`` of ``M_c ≥ 1`` samples and ``b_c`` batches before this one, per column::

        mean over its samples              μ = centroids_c, or mean where b_c = 0         around = mean of (x − μ)²
        centroids_c ← centroids_c + s (mean − centroids_c)         s  = max(1 / (b_c + 1), 1 − momentum)
        variances_c ← variances_c + s' (around − variances_c)      s' = max(1 / (b_c + 1), min(10 (1 − momentum), 1))
        v = max(variances_c, eps_var)      h = log(v + γ) − log(threshold + γ)
        penalty_c = mean over columns of hinge(h)                  mse_c = mean of (x − mean)²
        rob_loss = Σ_c w_c penalty_c / Σ_c w_c       intra_mse likewise       w_c = M_c / B

    The penalty has the value of the running variance, which is less noisy than a batch's, and the gradient of
    ``around``: ``∂v/∂x = 2 (x − μ) / M_c``. ``intra_mse`` and ``class_mse`` are monitors and have none. A single sample
    counts, as it has a distance to its centroid.

    Args:
        features: ``[B, ...]``, fp16, bf16, fp32 or fp64; any strides. Every axis after the first is a column axis.
        groups: the batch's classes, ``B`` samples.
        running: moved in place, once a call. Columns that would come to be NaN or infinite do not move, and a class
            with such a column does not count the batch. What a call measures depends on it, gradients included: it must
            not be called twice for one step, as activation checkpointing would.
        threshold: see :func:`cem_kernels.class_variance`; it takes no gradient.
        momentum: in (0, 1). ``1 / (1 − momentum)`` batches is how far centroids look back; variances, a tenth of that.
        eps_var: floor of the variance. Below it a column has no gradient.
        gamma: ``γ``, added inside both logarithms.
        hinge: ``relu`` (subgradient 0 at 0), ``softplus`` or ``identity``.
        backend: see :mod:`cem_kernels.backends`. ``triton`` takes fp32, bf16 and fp16, with ``running`` in fp32 and
            contiguous, and at most 65,535 classes; it is differentiable once. ``eager`` waits for no device.

    Returns:
        :class:`ClassVariance`. Where there is no sample the losses are zero and attached to the graph.

    Raises:
        TypeError: features, centroids or variances are not floating-point, or batches are not int64.
        ValueError: shapes or devices do not fit; threshold, eps_var or gamma is not finite and positive; momentum out
            of range; a threshold or running moments that take a gradient; unknown hinge or backend.
        BackendUnavailableError: the backend asked for by name cannot run this call.

    Source: the centers of Wen et al. 2016, "A Discriminative Feature Learning Approach for Deep Face Recognition".
    """
    backends.check_backend(backend)
    validation.check_float("features", features)
    columns = math.prod(features.shape[1:])
    if features.dim() < 2 or features.shape[0] != groups.num_samples or columns == 0:
        raise ValueError(f"features must have shape [B={groups.num_samples}, ...], got {list(features.shape)}")
    sizes: dict[str, int | None] = {"K": groups.num_classes, "C": columns}
    for name in ("centroids", "variances"):
        moments = getattr(running, name)
        validation.check_float(f"running.{name}", moments)
        validation.check_shape(f"running.{name}", moments, sizes)
        if moments.requires_grad:
            raise ValueError(f"running.{name} takes no gradient: it is moved in place")
    if running.batches.dtype != torch.int64:
        raise TypeError(f"running.batches must be torch.int64, got {running.batches.dtype}")
    validation.check_shape("running.batches", running.batches, {"K": groups.num_classes})
    placed = {"groups": groups.order, **{f"running.{name}": each for name, each in running._asdict().items()}}
    for name, tensor in placed.items():
        if tensor.device != features.device:
            raise ValueError(f"{name} must be on the features' device {features.device}, got {tensor.device}")
    validation.check_positive(eps_var=eps_var, gamma=gamma)
    if not 0 < momentum < 1:
        raise ValueError(f"momentum must lie between 0 and 1, got {momentum}")
    if hinge not in HINGES:
        raise ValueError(f"hinge must be one of {', '.join(HINGES)}, got {hinge!r}")
    if isinstance(threshold, Tensor):
        validation.check_shape("threshold", threshold, {})
        if threshold.requires_grad:
            raise ValueError("threshold takes no gradient here")
        threshold = threshold.to(features.device, torch.promote_types(features.dtype, torch.float32))
    else:
        validation.check_positive(threshold=threshold)

    objection = None
    fp32 = running.centroids.dtype == running.variances.dtype == torch.float32
    if not fp32 or not all(each.is_contiguous() for each in running):
        objection = "kernels take running moments that are fp32 and contiguous"
    if groups.num_classes > MOST_CLASSES:
        objection = f"kernels take at most {MOST_CLASSES} classes, got {groups.num_classes}"
    implementation = backends.pick(backend, "centroid_variance", IMPLEMENTATIONS, features, objection)
    with torch.autocast(features.device.type, enabled=False):
        return ClassVariance(
            *implementation(features.flatten(1), groups, running, threshold, momentum, eps_var, gamma, hinge)
        )
