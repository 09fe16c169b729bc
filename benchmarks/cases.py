"""What ``pytest benchmarks/ --benchmark-only`` measures: sizes that a CPU takes in its stride, or those of a device."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.operators import CASES, OWN, Spec

ON_DEVICE = torch.cuda.is_available()
DEVICE_ONLY = ("triton", "flex-compiled")

TOKENS: dict[str, Any] = {"B": 64, "K": 10, "T": 16, "D": 64}  # feature maps, few classes
SAMPLES: dict[str, Any] = {"B": 128, "K": 100, "T": 1, "D": 64}  # flat features, about one sample of a class

ON_CPU = [
    Spec("class_variance", B=128, K=10, T=16, D=64),
    Spec("class_variance", B=256, K=100, T=1, D=128),
    Spec("centroid_variance", B=128, K=10, T=1, D=392),  # what `centroid` has on Fashion-MNIST
    Spec("centroid_variance", B=256, K=100, T=1, D=128),
    Spec("slot_variance", B=128, K=10, T=1, D=392, S=4),
    *(Spec("slot_attention", **sizes) for sizes in (TOKENS, SAMPLES)),
    *(Spec("gated_read", **sizes) for sizes in (TOKENS, SAMPLES)),
    Spec("cross_attention", **TOKENS),
    Spec("surrogate", B=256, K=100, T=1, D=128),
    Spec("surrogate", B=128, K=10, T=1, D=128),
    Spec("surrogate", **TOKENS),
]
ON_GPU = [
    Spec("class_variance", B=4096, K=100, T=64, D=128, dtype="bf16"),
    Spec("centroid_variance", B=4096, K=100, T=64, D=128, dtype="bf16"),
    Spec("slot_variance", B=512, K=100, T=1, D=392, S=4),
    *(
        Spec(operator, B=1024, K=10, T=64, D=128, dtype="bf16")
        for operator in ("slot_attention", "gated_read", "cross_attention", "surrogate")
    ),
    Spec("surrogate", B=512, K=100, T=1, D=128),
]
SPECS = ON_GPU if ON_DEVICE else ON_CPU


def owns_of(spec: Spec) -> list[str]:
    """Which of this library's variants are measured. Compiling takes longest: on a CPU one size of an operator does."""
    compiled = ON_DEVICE or spec is next(each for each in SPECS if each.operator == spec.operator)
    return ["eager", *(["eager-compiled"] if compiled else []), *(["triton"] if ON_DEVICE else [])]


def rivals_of(spec: Spec, own: str) -> list[str]:
    """Who does the same work without this library, and may do what ``own`` may: eager meets what is not compiled."""
    peers = [v for v in CASES[spec.operator].variants if v not in OWN and (ON_DEVICE or v not in DEVICE_ONLY)]
    if own == "triton":
        return peers
    return [peer for peer in peers if peer.endswith("-compiled") == own.endswith("-compiled")]
