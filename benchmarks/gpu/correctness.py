"""This library's kernels on the device against the reference in fp64, and against themselves, bit by bit."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.errors import describe
from benchmarks.operators import CASES, Spec
from cem_kernels import BackendUnavailableError


def spread(base: list[Spec], dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")) -> list[Spec]:
    return [replace(spec, dtype=dtype) for spec in base for dtype in dtypes]


variance = partial(Spec, "class_variance")
centroid = partial(Spec, "centroid_variance")
slot = partial(Spec, "slot_attention")
read = partial(Spec, "gated_read")
whole = partial(Spec, "surrogate")

# First what every dtype must get right, then what one of them shows for all. Slot attention has few tokens a class, and
# then so many that programs share them.
SPECS = [
    *spread([variance(B=300, K=10, T=5, D=72, labels="holes")]),
    *spread([centroid(B=300, K=10, T=5, D=72, labels="holes")]),
    *spread([slot(B=96, K=7, T=3, D=128, labels="holes")]),
    *spread([slot(B=64, K=3, T=48, D=128, labels="holes")]),
    *spread([read(B=96, K=7, T=16, D=128, labels="holes")]),
    *spread([whole(B=96, K=7, T=1, D=128, labels="holes"), whole(B=64, K=3, T=48, D=64)], ("fp32", "bf16")),
    *(variance(B=120, K=6, T=3, D=40, penalty=penalty) for penalty in ("softplus", "nats")),
    *spread([slot(B=31, K=4, T=7, D=40, S=5), read(B=64, K=5, T=3, D=64, H=2, S=5)], ("fp32", "bf16")),
    *(variance(B=64, K=5, T=6, D=24, layout=layout) for layout in ("strided", "expanded")),
    *(slot(B=40, K=5, T=6, D=32, layout=layout) for layout in ("strided", "expanded")),
    *(read(B=40, K=5, T=6, D=32, H=2, layout=layout) for layout in ("strided", "expanded")),
    *spread([Spec("cross_attention", B=48, K=6, T=4, D=64, labels="holes")], ("fp32", "bf16")),
    *(centroid(B=64, K=5, T=6, D=24, layout=layout) for layout in ("strided", "expanded")),
    centroid(B=128, K=10, T=1, D=392, penalty="nats"),
    centroid(B=3000, K=4, T=1, D=96, labels="one"),
    variance(B=3000, K=4, T=1, D=96, labels="one"),
    variance(B=512, K=100, T=1, D=128),
    variance(B=37, K=40, T=1, D=1),
    variance(B=24, K=3, T=1, D=25088),
    slot(B=512, K=100, T=1, D=128),
    slot(B=37, K=40, T=1, D=128),
    slot(B=2000, K=2, T=1, D=48, S=1, labels="one"),
    slot(B=8, K=2, T=80, D=512),
    slot(B=50, K=2, T=33, D=104, S=20),
    read(B=37, K=40, T=1, D=128),
    read(B=500, K=3, T=1, D=48, H=3, S=1, labels="one"),
    read(B=8, K=2, T=50, D=512, H=8),
    read(B=31, K=4, T=7, D=40, H=5, S=3),
    whole(B=512, K=100, T=1, D=128),
    whole(B=37, K=20, T=4, D=40, H=5, S=5),
    whole(B=80, K=2, T=30, D=64, labels="one"),
]


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def check_spec(spec: Spec, device: str, variant: str = "triton") -> dict[str, Any]:
    """The record of a check: ``status`` is ok, absent, wrong, unrepeatable or error."""
    record: dict[str, Any] = {"name": spec.name, "variant": variant}
    try:
        case = CASES[spec.operator](spec, device)
        call = case.build(variant)
        verdict = case.check(variant, call)
        repeatable = same_bits(case.results(call), case.results(call))
    except BackendUnavailableError as error:
        return record | {"status": "absent", "why": describe(error)}
    except Exception as error:
        return record | {"status": "error", "why": describe(error)}
    status = "wrong" if not verdict.passed else "ok" if repeatable else "unrepeatable"
    return record | {"status": status, "why": str(verdict), "repeatable": repeatable, "check": asdict(verdict)}
