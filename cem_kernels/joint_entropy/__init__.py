"""What features tell through the noise beyond the slots of their class, all columns taken together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cem_kernels import backends, validation
from cem_kernels.groups import ClassGroups
from cem_kernels.joint_entropy import eager, reference

__all__ = ["JointEntropy", "joint_entropy"]

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "reference": reference.joint_entropy,
    "eager": eager.joint_entropy,
}


class JointEntropy(NamedTuple):
    """Result of :func:`joint_entropy`, in fp32 (fp64 for fp64 features), attached to the graph of the features."""

    rob_loss: Tensor  # [] nats a column
    intra_mse: Tensor  # [] mean squared distance to what the slots say, a column


def joint_entropy(
    features: Tensor,
    attention: Tensor,
    groups: ClassGroups,
    *,
    noise_std: float,
    min_samples: int = 2,
    num_classes: int | None = None,
    backend: str = "auto",
) -> JointEntropy:
    """Entropy that features add to the noise around the slots of their classes, as a Gaussian's.

    :func:`cem_kernels.slot_variance` looks at each column alone, and counts what two columns both say twice. Here they
    are taken together, and so are the samples of all classes with ``M_c ≥ min_samples``, ``B'`` in number: a class
    alone seldom has enough of them for a covariance::

        W_s = Σ_n p_ns      μ_s = Σ_n p_ns x_n / W_s      r_n = x_n − Σ_s p_ns μ_s          over a class's samples
        h_c = Σ_n Σ_s p_ns² / W_s        Σ_c: unbiased covariance of the class              a token at a time
        Σ = [Σ_n r_n r_nᵀ + Σ_c h_c Σ_c] / B'
        rob_loss = ½ log det(I + Σ / σ²) / (T·D)          intra_mse = Σ_n |r_n|² / B' / (T·D)

    ``h_c`` is how many of its class's samples the slots have used up (the degrees of freedom of that fit: one where
    attention is the same for all slots, as many as there are slots where it is sharp): what the residuals lack is
    taken from the class, as in :func:`cem_kernels.slot_variance`. With attention the same for all slots ``Σ`` is the
    mean of the classes' covariances, weighted by their samples, and ``rob_loss · T·D`` is at least
    ``I(x; z | class)`` where these are the true ones: a Gaussian has the most entropy of all with its covariance, and
    ``log det`` is concave. It is at most the sum over columns of ``½ log(1 + v/σ²)`` (Hadamard).

    Neither attention nor centroids pass a gradient on. One sample that is not finite makes the result not finite, for
    all samples share the matrix.

    Args:
        features: ``[B, T, D]``, fp16, bf16, fp32 or fp64; any strides.
        attention: ``[B, T, S]``, a token's weights over the slots of its class; not negative, of sum 1 (not checked).
        groups: the batch's classes, ``B`` samples.
        noise_std: ``σ``, standard deviation of the noise, in the features' unit.
        min_samples: classes with fewer samples are left out. At least 2.
        num_classes: only the first so many classes count; None for all.
        backend: see :mod:`cem_kernels.backends`. ``reference`` and ``eager``: products and a Cholesky factor of
            ``min(2B, T·D)`` rows, for which libraries have kernels. ``eager`` asks the device for the largest class,
            unless ``groups`` has a bound on it.

    Returns:
        :class:`JointEntropy`. Where no class has enough samples both are zero and attached to the graph.

    Raises:
        TypeError: features or attention are not floating-point.
        ValueError: shapes or devices do not fit; ``noise_std`` is not finite and positive; ``min_samples < 2``;
            ``num_classes`` is not in ``1..K``; unknown backend.
        BackendUnavailableError: the backend asked for by name cannot run this call.

    Source: Eq. 7 of arXiv:2503.00383v2, with one covariance for all cells as in linear discriminant analysis; as a
    loss on features, the coding rate of Yu et al. 2020 (arXiv:2006.08558).
    """
    backends.check_backend(backend)
    validation.check_assigned(features, attention, groups.order)
    validation.check_positive(noise_std=noise_std)
    if min_samples < 2:
        raise ValueError(f"min_samples must be at least 2, got {min_samples}: one sample has no variance")
    if num_classes is not None and not 1 <= num_classes <= groups.num_classes:
        raise ValueError(f"num_classes must be from 1 to K={groups.num_classes}, got {num_classes}")
    implementation = backends.pick(backend, "joint_entropy", IMPLEMENTATIONS, features, None)
    counted = groups.counts >= min_samples
    if num_classes is not None:
        counted = counted & (torch.arange(groups.num_classes, device=counted.device) < num_classes)
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        weights = attention.detach().to(dtype)
        return JointEntropy(*implementation(features.to(dtype), weights, groups, counted, noise_std))
