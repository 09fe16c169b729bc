"""``python -m benchmarks.sizes``: how large and how slow the surrogate is, by the way it is kept small, without a GPU.

At VGG11's cut on 28×28 images behind the standard bottleneck, 8×7×7, and at 512×7×7, which its last stage sends of
224×224 images where there is no bottleneck. Time and memory are those of eager's forward and backward to the features,
parameters frozen. Rounds go over all ways in turn, so that a slow minute slows all of them; a way's figure is the
median of its rounds.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before the first import of PyTorch: no log of the profiler's

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.gpu.environment import versions
from benchmarks.gpu.report import write_json
from benchmarks.interleaved import seconds
from benchmarks.memory import peak_bytes
from cem import Context, SlotCrossAttentionCEM

BATCH, CLASSES = 128, 10
MOST_PARAMETERS = 10**9  # 4 GB; what has more is counted and not built
OUT = Path(__file__).parent / "results" / "sizes.json"

Way = tuple[tuple[int, int, int], str, dict[str, Any]]  # features (C, H, W), name, options of the surrogate

CUT, MAP = (8, 7, 7), (512, 7, 7)
WAYS: list[Way] = [
    (CUT, "flat", {"reduction": "none"}),
    (CUT, "linear 128", {"reduction": "linear128"}),
    (CUT, "conv1x1 4", {"reduction": "conv4"}),
    (CUT, "spatial", {"spatial": True}),
    (MAP, "flat", {"reduction": "none"}),
    (MAP, "linear 128", {"reduction": "linear128"}),
    (MAP, "conv1x1 8", {"reduction": "conv8"}),
    (MAP, "spatial", {"spatial": True}),
    (MAP, "spatial, conv1x1 64", {"spatial": True, "reduction": "conv64"}),
]


def surrogate_of(way: Way) -> SlotCrossAttentionCEM:
    shape, _, options = way
    context = Context(shape, image_shape=(1, 28, 28), num_classes=CLASSES, noise_std=0.1, backend="eager")
    return SlotCrossAttentionCEM.build(SlotCrossAttentionCEM.Options(**options), context)


def size_of(way: Way) -> tuple[int, list[int]]:
    """Parameters and the shape ``[T, D]`` of a sample's tokens, from a surrogate that holds no numbers."""
    with torch.device("meta"):
        surrogate = surrogate_of(way)
    parameters = sum(parameter.numel() for parameter in surrogate.parameters())
    return parameters, [math.prod(way[0][1:]) if surrogate.spatial else 1, surrogate.feature_dim]


def step_of(way: Way) -> Callable[[], Tensor]:
    """Forward and backward of one batch, to its features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, *way[0], generator=generator).requires_grad_()
    labels = torch.randperm(BATCH, generator=generator) % CLASSES
    surrogate = surrogate_of(way)
    surrogate.max_class_size = int(labels.bincount().max())

    def step() -> Tensor:
        rob_loss, _ = surrogate(features, labels)
        return torch.autograd.grad(rob_loss, features)[0]

    return step


def time_step(step: Callable[[], Tensor], at_least: float) -> float:
    """Milliseconds of a call, from as many as take ``at_least`` so many seconds, after one that only tells how many."""
    once = seconds(step, 1)
    return 1e3 * seconds(step, max(1, round(at_least / once)))


def measure(rounds: int, at_least: float = 0.2) -> list[dict[str, Any]]:
    """A row for every way; one that is too large to build has neither time nor memory."""
    rows: list[dict[str, Any]] = []
    steps: list[tuple[dict[str, Any], Callable[[], Tensor]]] = []
    for way in WAYS:
        parameters, tokens = size_of(way)
        row: dict[str, Any] = {"features": list(way[0]), "way": way[1], "parameters": parameters, "tokens": tokens}
        row |= {"milliseconds": None, "rounds": [], "peak_mib": None}
        rows.append(row)
        if parameters <= MOST_PARAMETERS:
            steps.append((row, step_of(way)))
    for _, step in steps:
        step()  # what only a first call does
    for row, step in tqdm(steps * rounds, unit="timing", disable=None):
        row["rounds"].append(round(time_step(step, at_least), 3))
    for row, step in steps:
        row["milliseconds"] = statistics.median(row["rounds"])
        row["peak_mib"] = round(peak_bytes(step) / 2**20, 2)
    return rows


def line_of(row: dict[str, Any]) -> str:
    shapes = ["×".join(map(str, row[key])) for key in ("features", "tokens")]
    sizes = f"{shapes[0]:12}{row['way']:22}{shapes[1]:>10}{row['parameters']:17,}"
    if row["milliseconds"] is None:
        return f"{sizes}{'too large to build':>24}"
    return f"{sizes}{row['milliseconds']:12.2f}{row['peak_mib']:12.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.sizes", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", metavar="FILE", type=Path, default=OUT, help="JSON (benchmarks/results/sizes.json)")
    parser.add_argument("--rounds", type=int, default=9, help="timings of every way (9)")
    options = parser.parse_args(arguments)
    rows = measure(options.rounds)
    print(f"{'features':12}{'way':22}{'tokens T×D':>10}{'parameters':>17}{'ms':>12}{'peak MiB':>12}")
    print("\n".join(map(line_of, rows)))
    environment = {"device": "CPU", "threads": torch.get_num_threads(), **versions()}
    write_json(options.out, {"environment": environment, "batch": BATCH, "classes": CLASSES, "rows": rows})


if __name__ == "__main__":
    main()
