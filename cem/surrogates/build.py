"""From a name and the shape of the features to a surrogate."""

from __future__ import annotations

import math
from typing import Literal

from cem.surrogates.attention import SlotCrossAttentionCEM
from cem.surrogates.base import NoSurrogate, Surrogate
from cem.surrogates.mixture import GaussianMixtureCEM
from cem_kernels import BackendUnavailableError

SURROGATES = ("attention", "gmm", "none")

# Attention over flat features of width D holds some 25 D² parameters: 6.6 million at 512, 25 million at 1024.
WIDEST_UNREDUCED = 512
REDUCED_WIDTH = 128


def build_surrogate(
    name: str,
    *,
    feature_shape: tuple[int, ...],
    num_classes: int,
    noise_std: float,
    var_threshold: float,
    reduce_dim: int | None = None,
    gmm_fit: Literal["kmeans", "full"] = "kmeans",
    backend: str = "auto",
    sigmoid: bool = False,
) -> Surrogate:
    """The surrogate that a training run asks for by name.

    Args:
        name: one of :data:`SURROGATES`.
        feature_shape: of one sample's features, ``(C, H, W)`` or ``(D,)``.
        num_classes: ``K``.
        noise_std: ``σ``, standard deviation of the noise at the cut.
        var_threshold: ``τ``; features are penalised where they vary by more than ``τσ²`` inside their class.
        reduce_dim: width that ``attention`` projects features to; None chooses 128 for features wider than 512 and
            no projection below, 0 never projects.
        gmm_fit: how ``gmm`` fits its mixtures, see :class:`~cem.surrogates.mixture.GaussianMixtureCEM`.
        backend: of the attention operators, see :mod:`cem_kernels.backends`.
        sigmoid: whether the encoder ends in a sigmoid; the mixture then has 5 clusters per class, else 15.

    Raises:
        ValueError: unknown name, or options that do not fit together.
        BackendUnavailableError: the surrogate does not have the backend that is asked for by name.
    """
    width = math.prod(feature_shape)
    if name == "none":
        return NoSurrogate()
    if name == "gmm":
        if backend == "triton":
            raise BackendUnavailableError("the gmm surrogate has no 'triton' backend: it is plain PyTorch")
        return GaussianMixtureCEM(
            width,
            num_classes,
            num_clusters=5 if sigmoid else 15,
            var_threshold=var_threshold,
            reg_strength=noise_std,
            fit=gmm_fit,
        )
    if name == "attention":
        if reduce_dim is None:
            reduce_dim = REDUCED_WIDTH if width > WIDEST_UNREDUCED else 0
        return SlotCrossAttentionCEM(
            width,
            # As many heads as the width allows, four at most.
            num_heads=math.gcd(4, reduce_dim or width),
            var_threshold=var_threshold,
            reg_strength=noise_std,
            num_classes=num_classes,
            reduce_dim=reduce_dim or None,
            backend=backend,
        )
    raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}, got {name!r}")
