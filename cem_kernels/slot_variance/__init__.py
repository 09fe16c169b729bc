"""Variance inside the slots of every class, and its penalty over a log threshold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cem_kernels import backends, validation
from cem_kernels.class_variance import HINGES, ClassVariance, Hinge
from cem_kernels.groups import ClassGroups
from cem_kernels.slot_variance import eager, reference

__all__ = ["slot_variance"]

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "reference": reference.slot_variance,
    "eager": eager.slot_variance,
}


def slot_variance(
    features: Tensor,
    attention: Tensor,
    groups: ClassGroups,
    *,
    threshold: float | Tensor,
    eps_var: float = 1e-4,
    gamma: float = 1e-6,
    min_samples: int = 2,
    hinge: Hinge = "relu",
    backend: str = "auto",
) -> ClassVariance:
    """How far the log-variance of the features around the centroid of each slot exceeds a threshold.

    Attention makes a mixture of each class: a sample belongs to slot ``s`` of its class by ``p_ns``. For a class ``c``
    with ``M_c ≥ min_samples``, over its samples, per token and column::

        W = Σ_n p_ns     n = W² / Σ_n p_ns²     μ = Σ_n p_ns x_n / W     mse_s = Σ_n p_ns (x_n − μ)² / W
        var_s = mse_s n / (n − 1) for n ≥ 2, else mse_s n + (2 − n) var_c      var_c: the class's, unbiased
        v = max(var_s, eps_var)                h = log(v + γ) − log(threshold + γ)              π_s = W / M_c
        penalty_c = Σ_s π_s hinge(h)           mse_c = Σ_s π_s mse_s           means over tokens and columns
        rob_loss = Σ_c w_c penalty_c / Σ_c w_c      intra_mse likewise         w_c = M_c / B

    A slot of a single sample says what its class does, not that there is no variance: sharp attention would be worth
    having for its own sake otherwise. Where attention is the same for all slots, this is
    :func:`cem_kernels.class_variance`. Neither attention nor centroids pass a gradient on: what remains to be made
    smaller is the distance of a feature to its centroid.

    Args:
        features: ``[B, T, D]``, fp16, bf16, fp32 or fp64; any strides.
        attention: ``[B, T, S]``, a token's weights over the slots of its class; not negative, of sum 1 (not checked).
        groups: the batch's classes, ``B`` samples.
        threshold, eps_var, gamma, min_samples, hinge: see :func:`cem_kernels.class_variance`.
        backend: see :mod:`cem_kernels.backends`. There are no kernels yet: ``reference`` and ``eager``, which asks the
            device for the largest class, unless ``groups`` has a bound on it.

    Returns:
        :class:`ClassVariance`. Where no class has enough samples the losses are zero and attached to the graph.

    Raises:
        TypeError: features or attention are not floating-point.
        ValueError: shapes or devices do not fit; threshold, eps_var or gamma is not finite and positive;
            ``min_samples < 2``; unknown hinge or backend.
        BackendUnavailableError: the backend asked for by name cannot run this call.
    """
    backends.check_backend(backend)
    validation.check_assigned(features, attention, groups.order)
    validation.check_positive(eps_var=eps_var, gamma=gamma)
    if min_samples < 2:
        raise ValueError(f"min_samples must be at least 2, got {min_samples}: one sample has no variance")
    if hinge not in HINGES:
        raise ValueError(f"hinge must be one of {', '.join(HINGES)}, got {hinge!r}")
    dtype = torch.promote_types(features.dtype, torch.float32)
    if isinstance(threshold, Tensor):
        validation.check_shape("threshold", threshold, {})
        threshold = threshold.to(features.device, dtype)
    else:
        validation.check_positive(threshold=threshold)
    implementation = backends.pick(backend, "slot_variance", IMPLEMENTATIONS, features, None)
    with torch.autocast(features.device.type, enabled=False):
        weights = attention.detach().to(dtype)
        return ClassVariance(
            *implementation(features.to(dtype), weights, groups, threshold, eps_var, gamma, min_samples, hinge)
        )
