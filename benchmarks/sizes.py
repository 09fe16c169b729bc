"""How large and how slow the surrogate is, by the way it is kept small. ``python -m benchmarks.cpu sizes``.

At VGG11's cut on 28×28 images behind the standard bottleneck, 8×7×7, and at 512×7×7, which its last stage sends of
224×224 images where there is no bottleneck. Time and memory are those of eager's forward and backward to the features,
parameters frozen. Rounds go over all ways in turn, so that a slow minute slows all of them; a way's figure is the
median of its rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import in_turns
from benchmarks.memory import peak_bytes
from cem import Context, SlotCrossAttentionCEM

BATCH, CLASSES = 128, 10
MOST_PARAMETERS = 10**9  # 4 GB; what has more is counted and not built

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


def measure(rounds: int = 9, at_least: float = 0.2) -> list[dict[str, Any]]:
    """A row for every way; one that is too large to build has neither time nor memory."""
    rows: list[dict[str, Any]] = []
    steps: dict[str, Callable[[], Tensor]] = {}
    for way in WAYS:
        parameters, tokens = size_of(way)
        row: dict[str, Any] = {"features": list(way[0]), "way": way[1], "parameters": parameters, "tokens": tokens}
        rows.append(row | {"milliseconds": None, "peak_mib": None})
        if parameters <= MOST_PARAMETERS:
            steps[str(len(rows) - 1)] = step_of(way)
    for index, times in in_turns(steps, rounds, at_least).items():
        peak = peak_bytes(steps[index]) / 2**20
        rows[int(index)] |= {"milliseconds": round(1e3 * statistics.median(times), 3), "peak_mib": round(peak, 2)}
    return rows


def line_of(row: Mapping[str, Any]) -> str:
    shapes = ["×".join(map(str, row[key])) for key in ("features", "tokens")]
    sizes = f"{shapes[0]:12}{row['way']:22}{shapes[1]:>10}{row['parameters']:17,} parameters"
    if row["milliseconds"] is None:
        return f"{sizes}{'too large to build':>24}"
    return f"{sizes}{row['milliseconds']:9.2f} ms{row['peak_mib']:9.2f} MiB"
