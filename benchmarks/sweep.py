"""How the surrogate's time grows with tokens and with classes, without a GPU. ``python -m benchmarks.cpu sweep``.

Forward and backward of eager and of the loop over classes, at the points of the GPU's sweep. Rounds go over all points
in turn, so that a slow minute slows all of them; a point's figure is the median of its rounds.

Above 32 MB glibc takes every tensor from the system and gives it back, page by page, which takes longer than the
arithmetic and grows faster. It keeps what it has, as the allocator on a GPU does, under
``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=1000000000``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from benchmarks.gpu.cases import SWEEP
from benchmarks.interleaved import in_turns
from benchmarks.operators import CASES, Spec
from benchmarks.steps import steps_of

VARIANTS = ("eager", "loop")


def time_point(spec: Spec, variant: str, at_least: float) -> float:
    """Seconds of a call, from as many as take ``at_least`` so many seconds."""
    case = CASES[spec.operator](spec, "cpu")
    (step,) = steps_of(case.build(variant), case, "both", copies=1)
    return in_turns({variant: step}, 1, at_least)[variant][0]


def measure(rounds: int = 5, at_least: float = 0.2) -> list[dict[str, Any]]:
    """Points as the GPU's sweep has them."""
    points = [(axis, spec, variant) for axis, specs in SWEEP.items() for spec in specs for variant in VARIANTS]
    found: dict[tuple[str, Spec, str], list[float]] = {point: [] for point in points}
    for point in tqdm(points * rounds, unit="timing", disable=None):
        found[point].append(time_point(*point[1:], at_least))
    return [
        {"axis": axis, **{letter: getattr(spec, letter) for letter in "BKTD"}, "variant": variant}
        | {"seconds": statistics.median(times), "rounds": [round(each, 6) for each in times]}
        for (axis, spec, variant), times in found.items()
    ]


def line_of(row: Mapping[str, Any]) -> str:
    sizes = " ".join(f"{letter}{row[letter]}" for letter in "BKTD")
    return f"{row['axis']:10}{sizes:24}{row['variant']:8}{1e3 * row['seconds']:10.2f} ms"
