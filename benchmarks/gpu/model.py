"""What a case should take before anybody has measured it, and how far off that was.

    seconds = launches · gap + the largest of  bytes / copy rate,  operations / their rate,  round trips · latency

Bytes and operations are an operator's ``cost``, round trips its ``trips``: loads that wait for each other in a kernel's
longest program. Launches are counted, on the CPU, with kernels that are called and not run. All kernels of a call
are held against one roof: where they hit different ones, it takes longer than predicted.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.timing import ASSUMED
from benchmarks.memory import no_kernels
from benchmarks.operators import CASES, DIRECTIONS, Spec
from benchmarks.operators.base import as_upstream, rate_of
from cem.report.numbers import figure as number

EXPECTED = Path(__file__).with_name("expected.csv")
FIELDS = ("case", "direction", "bytes", "operations", "round_trips", "launches", "microseconds", "why")
OFF = 1.5  # times, either way, from which on a prediction is owed a reason
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh", "_unsafe_view", "item")


class Launches(TorchDispatchMode):
    """Counts what would be launched on a device: operators that are no views, those inside of this library's too."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cem_kernels":  # a launcher
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        self.count += not func.is_view and func._schema.name.rpartition("::")[2] not in NO_KERNEL
        return func(*args, **(kwargs or {}))


def launches_of(spec: Spec) -> dict[str, int]:
    """Kernels that a call of this library launches, by direction."""
    with no_kernels() as launched:
        case = CASES[spec.operator](spec, "cpu")
        call, leaves = case.build("triton"), list(case.leaves.values())
        launched.clear()
        with Launches() as forward:
            outputs = call(*leaves)
        own, upstream = len(launched), as_upstream(case.upstream, outputs)
        with Launches() as backward:
            torch.autograd.grad(outputs, leaves, upstream)
    counts = {"forward": forward.count + own, "backward": backward.count + len(launched) - own}
    return {**counts, "both": sum(counts.values())}


def predict(spec: Spec, direction: str, launches: int, rates: Mapping[str, float] = ASSUMED) -> dict[str, Any]:
    """A row of :data:`FIELDS`, without a reason."""
    cost, trips = CASES[spec.operator].cost(spec, direction), CASES[spec.operator].trips(spec, direction)
    roofs = cost.bytes / rates["copy"], cost.operations / rates[rate_of(spec.dtype)], trips * rates["latency"]
    microseconds = 1e6 * (launches * rates["gap"] + max(roofs))
    values = (spec.name, direction, int(cost.bytes), int(cost.operations), trips, launches, round(microseconds, 1), "")
    return dict(zip(FIELDS, values, strict=True))


def predictions(specs: Iterable[Spec]) -> list[dict[str, Any]]:
    """A row for every case and direction; a reason that the file has already stays."""
    reasons = {(row["case"], row["direction"]): row["why"] for row in read()}
    counted = ((spec, direction, count) for spec in specs for direction, count in launches_of(spec).items())
    rows = [predict(*each) for each in counted]
    return [row | {"why": reasons.get((row["case"], row["direction"]), "")} for row in rows]


def read(path: Path = EXPECTED) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    numbers = {name: float if name == "microseconds" else int for name in FIELDS[2:7]}
    return [row | {name: kind(row[name]) for name, kind in numbers.items()} for row in rows]


def write(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    assumed = ", ".join(f"{name} {value:g}" for name, value in ASSUMED.items())
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(f"# What kernels should take on an H200, by benchmarks/gpu/model.py, assuming {assumed}\n")
        csv.writer(file, lineterminator="\n").writerows([FIELDS, *(row.values() for row in rows)])


def measured(rows: Iterable[Mapping[str, Any]], records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with ``measured`` microseconds and their ``ratio`` to the prediction, None where there are none."""
    found = {(record["name"], direction): record.get(direction) for record in records for direction in DIRECTIONS}
    compared = []
    for row in rows:
        figure = found.get((row["case"], row["direction"]))
        taken = 1e6 * figure["device"]["median"] if figure else None
        ratio = taken / row["microseconds"] if taken else None
        owed = ratio is not None and not 1 / OFF <= ratio <= OFF and not row["why"]
        compared.append({**row, "measured": taken, "ratio": ratio, "why": "REASON?" if owed else row["why"]})
    return compared


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table as text: what was predicted and, where a run is compared, what it measured."""
    known = any(row.get("measured") is not None for row in rows)
    heads = ["MB", "GFLOP", "trips", "launches", "predicted", *(["measured", "ratio"] if known else [])]
    found = [f"{'PREDICTED, µs':69}" + "".join(f"{head:>10}" for head in heads)]
    for row in rows:
        cells = [number(row["bytes"] / 1e6), number(row["operations"] / 1e9), row["round_trips"], row["launches"]]
        cells += [number(row[key]) for key in ("microseconds", "measured", "ratio")[: 3 if known else 1]]
        columns = "".join(f"{cell:>10}" for cell in cells)
        found.append(f"{row['case']:60}{row['direction']:9}{columns}  {row['why']}".rstrip())
    return found
