"""Class variance and its penalty over a log threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cem_kernels import backends, validation
from cem_kernels.class_variance import eager, reference
from cem_kernels.groups import ClassGroups

__all__ = ["HINGES", "ClassVariance", "Hinge", "class_variance"]


def _triton() -> Callable[..., tuple[Tensor, ...]]:
    from cem_kernels.class_variance import triton  # only here, because importing needs Triton

    return triton.class_variance


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.class_variance,
    "eager": eager.class_variance,
    "triton": _triton,  # loaded when it is picked
}
MOST_CLASSES = 65_535  # a grid's second and third axes have no more programs

Hinge = Literal["relu", "softplus", "identity"]
HINGES: tuple[str, ...] = get_args(Hinge)


class ClassVariance(NamedTuple):
    """Result of :func:`class_variance`, in fp32 (fp64 for fp64 features), attached to the graph of the features."""

    rob_loss: Tensor  # [] mean of class_penalty over classes, weighted by their samples
    intra_mse: Tensor  # [] mean of class_mse, likewise
    class_penalty: Tensor  # [K], exactly 0 where a class has too few samples
    class_mse: Tensor  # [K], likewise


def class_variance(
    features: Tensor,
    groups: ClassGroups,
    *,
    threshold: float | Tensor,
    eps_var: float = 1e-4,
    gamma: float = 1e-6,
    min_samples: int = 2,
    hinge: Hinge = "relu",
    backend: str = "auto",
) -> ClassVariance:
    """How far the log-variance of the features inside each class exceeds a threshold.

    For a class ``c`` with ``M_c ≥ min_samples``, over its samples, per column::

        mean, var (unbiased, two-pass)     v = max(var, eps_var)      h = log(v + γ) − log(threshold + γ)
        penalty_c = mean over columns of hinge(h)                     mse_c = mean of (x − mean)²
        rob_loss = Σ_c w_c penalty_c / Σ_c w_c       intra_mse likewise       w_c = M_c / B

    Args:
        features: ``[B, ...]``, fp16, bf16, fp32 or fp64; any strides. Every axis after the first is a column axis
            (``[B, T, D]`` measures position and channel apart).
        groups: the batch's classes, ``B`` samples.
        threshold: the variance above which a column is penalized, a positive float or a 0-dim tensor (a schedule or
            a captured graph can then change it in place; its value is not checked).
        eps_var: floor of the variance. Below it a column has no gradient.
        gamma: ``γ``, added inside both logarithms.
        min_samples: classes with fewer samples are left out. At least 2, or there is no variance.
        hinge: ``relu`` (subgradient 0 at 0), ``softplus`` or ``identity``.
        backend: see :mod:`cem_kernels.backends`. ``triton`` takes fp32, bf16 and fp16, at most 65,535 classes, and a
            threshold that needs no gradient; it is differentiable once, the others twice.

    Returns:
        :class:`ClassVariance`. Where no class has enough samples the losses are zero and attached to the graph.

    Raises:
        TypeError: features are not floating-point.
        ValueError: shapes or devices do not fit; threshold, eps_var or gamma is not finite and positive;
            ``min_samples < 2``; unknown hinge or backend.
        BackendUnavailableError: the backend asked for by name cannot run this call.
    """
    backends.check_backend(backend)
    validation.check_float("features", features)
    if features.dim() < 2 or features.shape[0] != groups.num_samples or math.prod(features.shape[1:]) == 0:
        raise ValueError(f"features must have shape [B={groups.num_samples}, ...], got {list(features.shape)}")
    validation.check_together(features, [("groups", groups.order)])
    validation.check_positive(eps_var=eps_var, gamma=gamma)
    if min_samples < 2:
        raise ValueError(f"min_samples must be at least 2, got {min_samples}: one sample has no variance")
    if hinge not in HINGES:
        raise ValueError(f"hinge must be one of {', '.join(HINGES)}, got {hinge!r}")

    objection = None
    if isinstance(threshold, Tensor):
        validation.check_shape("threshold", threshold, {})
        threshold = threshold.to(features.device, torch.promote_types(features.dtype, torch.float32))
        if threshold.requires_grad:
            objection = "the threshold takes a gradient"
    else:
        validation.check_positive(threshold=threshold)
    if groups.num_classes > MOST_CLASSES:
        objection = f"kernels take at most {MOST_CLASSES} classes, got {groups.num_classes}"
    implementation = backends.pick(backend, "class_variance", IMPLEMENTATIONS, features, objection)
    with torch.autocast(features.device.type, enabled=False):
        return ClassVariance(
            *implementation(features.flatten(1), groups, threshold, eps_var, gamma, min_samples, hinge)
        )
