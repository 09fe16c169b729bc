"""``python -m benchmarks.cpu_sweep``: how the surrogate's time grows with tokens and with classes, without a GPU.

Forward and backward of eager and of the loop over classes, at the points of the GPU's sweep. Rounds go over all points
in turn, so that a slow minute slows all of them; a point's figure is the median of its rounds.

Above 32 MB glibc takes every tensor from the system and gives it back, page by page, which takes longer than the
arithmetic and grows faster. It keeps what it has, as the allocator on a GPU does, under
``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=1000000000``.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.gpu.environment import versions
from benchmarks.gpu.report import write_json
from benchmarks.gpu.sweep import SWEEP
from benchmarks.interleaved import seconds
from benchmarks.operators import CASES, Spec
from benchmarks.steps import steps_of

VARIANTS = ("eager", "loop")
OUT = Path(__file__).parent / "results" / "cpu-sweep.json"


def time_point(spec: Spec, variant: str, at_least: float) -> float:
    """Seconds of a call, from as many as take ``at_least`` so many seconds, after one that is not timed."""
    case = CASES[spec.operator](spec, "cpu")
    (step,) = steps_of(case.build(variant), case, "both", copies=1)
    once = seconds(step, 1)
    return seconds(step, max(1, round(at_least / once)))


def measure(rounds: int, at_least: float = 0.2) -> list[dict[str, object]]:
    """Points as the GPU's sweep has them."""
    points = [(axis, spec, variant) for axis, specs in SWEEP.items() for spec in specs for variant in VARIANTS]
    found: dict[tuple[str, Spec, str], list[float]] = {point: [] for point in points}
    for point in tqdm(points * rounds, unit="timing", disable=None):
        found[point].append(time_point(*point[1:], at_least))
    return [
        {"axis": axis, "spec": spec.name, **{letter: getattr(spec, letter) for letter in "BKTD"}, "variant": variant}
        | {"seconds": statistics.median(times), "rounds": [round(each, 6) for each in times]}
        for (axis, spec, variant), times in found.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu_sweep", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=OUT, help="JSON (benchmarks/results/cpu-sweep.json)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timings of every point (5)")
    options = parser.parse_args(arguments)
    points = measure(options.rounds)
    for point in points:
        print(f"{point['spec']:42}{point['variant']:8}{1e3 * float(str(point['seconds'])):10.2f} ms")
    allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    environment = {"device": "CPU", "threads": torch.get_num_threads(), **versions(), **allocator}
    write_json(options.out, {"environment": environment, "sweep": points})


if __name__ == "__main__":
    main()
