"""How the surrogate's time grows with the tokens of a batch, and with the classes that they are spread over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.cases import Plan
from benchmarks.gpu.measure import failures_of, measure_case
from benchmarks.gpu.timing import Timer
from benchmarks.operators import Spec

# Each doubled twice at a time: B·T from 512 to 131,072 at K = 10, and K from 2 to 512 at B·T = 4,096.
SWEEP = {
    "tokens": [Spec("surrogate", B=samples, K=10, T=16, D=128) for samples in (32, 128, 512, 2048, 8192)],
    "classes": [Spec("surrogate", B=4096, K=classes, T=1, D=128) for classes in (2, 8, 32, 128, 512)],
}


def name_of(axis: str, spec: Spec) -> str:
    return f"sweep over {axis}, {spec.name}"


def names() -> list[str]:
    return [name_of(axis, spec) for axis, specs in SWEEP.items() for spec in specs]


def measure_point(
    axis: str, spec: Spec, device: str, timer: Timer, ceilings: Mapping[str, float], cache: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """Seconds of forward and backward at one point, or what went wrong. Eager's where kernels are absent."""
    for variant in ("triton", "eager"):
        case = measure_case(Plan(spec), (variant,), device, timer, ceilings, cache, lambda: 1.0)
        found = case["variants"].get(variant, {}).get("both", {})
        if "device" in found:
            sizes = {letter: getattr(spec, letter) for letter in "BKTD"}
            point = {"axis": axis, "spec": spec.name, **sizes, "variant": variant}
            return point | {"seconds": found["device"]["median"]}, failures_of(case)
        if failures := failures_of(case):
            return None, failures
    return None, []
