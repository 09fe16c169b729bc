"""From a name and the shape of the features to a surrogate."""

from __future__ import annotations

import math
from typing import Any, Literal

from cem.surrogates.attention import Measure, Objective, Penalty, SlotCrossAttentionCEM
from cem.surrogates.base import NoSurrogate, Surrogate
from cem.surrogates.mixture import GaussianMixtureCEM
from cem.surrogates.threshold import Policy
from cem_kernels import BackendUnavailableError
from cem_kernels.class_variance import Hinge

SURROGATES = ("attention", "gmm", "none")

ORIGINAL: dict[str, Any] = {
    "measure": "enhanced",
    "num_slots": 8,
    "anchor": 0.0,
    "penalty": "hinge",
    "eps_var": 1e-4,
    "gamma": 1e-6,
}
"""Options that make attention what it was before anything was added to it."""

# Attention over flat features of width D holds some 25 D² parameters: 6.6 million at 512, 25 million at 1024.
WIDEST_UNREDUCED = 512
REDUCED_WIDTH = 128


def build_surrogate(
    name: str,
    *,
    feature_shape: tuple[int, ...],
    num_classes: int,
    noise_std: float,
    var_threshold: float = 0.1,
    measure: Measure = "slots",
    penalty: Penalty = "entropy",
    hinge: Hinge = "relu",
    threshold: Policy = "coupled",
    threshold_value: float = 0.05,
    threshold_quantile: float = 0.5,
    eps_var: float = 1e-8,
    gamma: float = 0.01,
    objective: Objective = "penalty",
    anchor: float = 0.99,
    memory_bank: int = 0,
    num_slots: int = 1,
    tokens: Literal["flat", "spatial"] = "flat",
    reduce: Literal["linear", "conv1x1"] = "linear",
    reduce_dim: int | None = None,
    gmm_fit: Literal["kmeans", "full"] = "kmeans",
    backend: str = "auto",
    sigmoid: bool = False,
) -> Surrogate:
    """The surrogate that a training run asks for by name; without options, the one that is recommended.

    Args:
        name: one of :data:`SURROGATES`.
        feature_shape: of one sample's features, ``(C, H, W)`` or ``(D,)``.
        num_classes: ``K``.
        noise_std: ``σ``, standard deviation of the noise at the cut.
        var_threshold: ``τ``, of ``gmm`` and of ``penalty="hinge"``: features are penalized where they vary by more than
            ``τσ²`` inside their class.
        measure, penalty, hinge, threshold, threshold_value, threshold_quantile, eps_var, gamma, objective,
            anchor, memory_bank, num_slots, tokens, reduce: of ``attention``, see
            :class:`~cem.surrogates.attention.SlotCrossAttentionCEM`.
        reduce_dim: width (channels, for ``conv1x1``) that ``attention`` projects features to; None chooses 128 for
            flat tokens wider than 512 that attention works on, and no projection otherwise; 0 never projects.
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
        if tokens == "spatial" and len(feature_shape) != 3:
            raise ValueError(f"spatial tokens need features of shape (C, H, W), got {tuple(feature_shape)}")
        if reduce_dim is None:
            attends = measure == "enhanced" or num_slots != 1
            wide = width > WIDEST_UNREDUCED and tokens == "flat" and reduce == "linear"
            reduce_dim = REDUCED_WIDTH if attends and wide else 0
        maps = (feature_shape[0], feature_shape[1], feature_shape[2]) if len(feature_shape) == 3 else None
        positions = maps[1] * maps[2] if maps is not None and tokens == "spatial" else 1
        channels = maps[1] * maps[2] * reduce_dim if maps is not None and reduce == "conv1x1" else reduce_dim
        return SlotCrossAttentionCEM(
            width,
            num_slots,
            # As many heads as the width of a token allows, four at most.
            num_heads=math.gcd(4, (channels or width) // positions),
            eps_var=eps_var,
            gamma=gamma,
            var_threshold=var_threshold,
            reg_strength=noise_std,
            num_classes=num_classes,
            hinge=hinge,
            measure=measure,
            penalty=penalty,
            threshold=threshold,
            threshold_value=threshold_value,
            threshold_quantile=threshold_quantile,
            objective=objective,
            anchor=anchor,
            memory_bank=memory_bank,
            tokens=tokens,
            reduce=reduce,
            reduce_dim=reduce_dim or None,
            feature_shape=maps,
            backend=backend,
        )
    raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}, got {name!r}")
