"""``python -m benchmarks.cpu STUDY``: what the surrogate takes, measured without a GPU, into ``results/cpu.json``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

if __name__ == "__main__":
    # Before the first import of Triton and PyTorch: kernels that take CPU tensors, and no log of the profiler's.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")

from benchmarks import memory, sizes, sweep
from benchmarks.record import FILE, record

STUDIES = {  # what it measures, and minutes on two idle cores
    "memory": (memory, "peak memory, and what is kept for the backward, by variant", 3),
    "sizes": (sizes, "parameters, time and memory, by the way the surrogate is kept small", 1),
    "sweep": (sweep, "time over tokens and over classes", 4),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu", description=__doc__)
    listed = "; ".join(f"{name}: {what}" for name, (_, what, _) in STUDIES.items())
    parser.add_argument("study", choices=STUDIES, help=listed)
    parser.add_argument("--out", metavar="FILE", type=Path, default=FILE, help="benchmarks/results/cpu.json")
    options = parser.parse_args(arguments)
    study, what, minutes = STUDIES[options.study]
    print(f"Measures {what}: about {minutes} min on two idle cores.", flush=True)
    rows = study.measure()
    print("\n".join(map(study.line_of, rows)))
    allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    out = record(options.study, rows, f"python -m benchmarks.cpu {options.study}", options.out, **allocator)
    print(f"Recorded in {out}; python -m benchmarks.performance_page brings docs/performance.md up to date.")


if __name__ == "__main__":
    main()
