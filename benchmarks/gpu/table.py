"""The figures as text: for every case a line per variant, then the targets, then whatever went wrong."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.operators import DIRECTIONS

EXPECTED = Path(__file__).with_name("expected.csv")

COLUMNS = f"{'':18}" + "".join(f"{name:>9}" for name in (*DIRECTIONS, "±20-80%", "call"))
COLUMNS += f"{'copy f/b':>10}{'×floor':>7}{'MiB':>7}"

LEGEND = """\
Microseconds, median device time of CUDA-graph replays, inputs past the L2 cache (e: by events, no graph could be
captured; c: not past the cache). call: host time of forward and backward, launches included. copy: the operator's bytes
over the time of forward and of backward, in % of the measured copy. ×floor: forward and backward over the time of their
bytes or of their operations, the larger. MiB: peak above the inputs."""


def number(value: float) -> str:
    """Three digits or more, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(value: float) -> str:
    return f"{value / 1e12:.3g} T"


def figure(record: Mapping[str, Any], direction: str) -> str:
    found = record.get(direction, {})
    if "device" not in found:
        return "error" if "error" in found else "–"
    marks = ("" if found["device"]["how"] == "graph replay" else "e") + ("" if found["past_the_cache"] else "c")
    return number(found["device"]["median"] * 1e6) + marks


def variant_line(name: str, record: Mapping[str, Any]) -> str:
    both = record.get("both", {})
    if "device" not in both:
        found = "".join(f"{figure(record, direction):>9}" for direction in DIRECTIONS if direction in record)
        return f"{name:18}{found}  {record['status']}: {record.get('why', '')}"[:120]
    times = "".join(f"{figure(record, direction):>9}" for direction in DIRECTIONS)
    device = both["device"]
    spread = (device["q80"] - device["q20"]) / 2 / device["median"]
    fractions = "/".join(
        f"{record[direction]['fraction_of_copy']:.0%}" if "device" in record.get(direction, {}) else "–"
        for direction in ("forward", "backward")
    )
    return (
        f"{name:18}{times}{spread:>9.1%}{number(both['wall']['median'] * 1e6):>9}{fractions:>10}"
        f"{number(both['times_floor']):>7}{number(both['peak_bytes'] / 2**20):>7}"
    )


def case_lines(case: Mapping[str, Any]) -> list[str]:
    lines = ["", case["name"]]
    if "error" in case:
        return [*lines, f"  {case['error']}"]
    lines += [variant_line(name, record) for name, record in case["variants"].items()]
    lines += expected_lines(case["name"])
    if case["left_out"]:
        lines.append(f"left out for want of time: {', '.join(case['left_out'])}")
    return lines


def expected_lines(name: str) -> list[str]:
    """What was expected of the kernels before anybody measured, in microseconds."""
    with open(EXPECTED, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(line for line in file if line[0] != "#") if row["case"] == name]
    guesses = (" to ".join(dict.fromkeys((row["least_us"], row["most_us"]))) for row in rows)
    found = ", ".join(f"{row['direction']} {guess}" for row, guess in zip(rows, guesses, strict=True))
    return [f"{'expected':18}{found} µs"] if rows else []


def correctness_lines(checks: Iterable[Mapping[str, Any]], sanitizer: Iterable[Mapping[str, Any]]) -> list[str]:
    found = list(checks)
    counts: dict[str, int] = {}
    for check in found:
        counts[check["status"]] = counts.get(check["status"], 0) + 1
    summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "not run"
    lines = [f"kernels against fp64, and twice the same bits: {summary}"]
    for run in sanitizer:
        lines.append(f"compute-sanitizer {run['tool']}: {run['status']} {run.get('summary', '')}".rstrip())
    return lines


def sweep_lines(points: Iterable[Mapping[str, Any]]) -> list[str]:
    return [
        f"sweep over {point['axis']:8} {point['spec']:46}{number(point['seconds'] * 1e6):>9} µs  {point['variant']}"
        for point in points
    ]


def training_lines(training: Mapping[str, Any]) -> list[str]:
    """Milliseconds of a step, and what is added to the one without a surrogate."""
    lines = [f"{training['name']}, surrogate {training['backend']}:"] if training else []
    for name, seconds in training.get("step_seconds", {}).items():
        added = training["added"].get(name)
        share = f"  +{added['median']:.1%} ({added['q1']:.1%} to {added['q3']:.1%})" if added else ""
        lines.append(f"  {name:20}{number(seconds['median'] * 1e3):>9} ms{share}")
    return lines + [f"  {name}: {why}" for name, why in training.get("absent", {}).items()]


def target_lines(targets: Iterable[Mapping[str, Any]]) -> list[str]:
    verdicts = {True: "reached", False: "MISSED", None: "not measured"}
    lines = []
    for target in targets:
        details = [] if target["measured"] is None else [f"{target['measured']:.2f}"]
        details += [f"against {target['fastest']}"] if "fastest" in target else []
        details += [f"{target['launched']:.2f} without graphs"] if "launched" in target else []
        details += [f"{target['least']:.2f} by its operations alone"] if target.get("least", 1) > 1 else []
        shown = f" ({', '.join(details)})" if details else ""
        lines.append(f"{verdicts[target['reached']]:13}{target['case']}: {target['target']}{shown}")
    return lines


def text(data: Mapping[str, Any], failures: list[str]) -> str:
    """The whole report of a run's data."""
    device = data["environment"]
    ceilings = data["ceilings"]
    lines = [
        ", ".join(f"{key} {value}" for key, value in device.items()),
        "measured ceilings: " + ", ".join(f"{n} {rate(c['rate'])}{c['unit']}" for n, c in ceilings.items()),
        *correctness_lines(data["correctness"], data["sanitizer"]),
        "", COLUMNS, *(line for case in data["cases"] for line in case_lines(case)), "", LEGEND, "",
        *sweep_lines(data["sweep"]), *training_lines(data.get("training", {})), "",
        *target_lines(data["targets"]),
    ]  # fmt: skip
    if data["left_out"]:
        lines += ["", "left out for want of time: " + "; ".join(data["left_out"])]
    if failures:
        lines += ["", f"{len(failures)} failed:", *failures]
    return "\n".join(lines)


def prediction_text(found: Mapping[str, Mapping[str, Any]], ceilings: Mapping[str, float]) -> str:
    """Floors by case: predicted, and said to be."""
    lines = [
        "PREDICTED, not measured, from " + ", ".join(f"{name} {rate(value)}/s" for name, value in ceilings.items()),
        f"{'':62}" + "".join(f"{direction + ' µs':>14}" for direction in DIRECTIONS) + f"{'MB':>10}{'GFLOP':>9}",
    ]
    for name, by_direction in found.items():
        times = "".join(
            f"{number(by_direction[d]['floor_seconds'] * 1e6) + ' ' + by_direction[d]['bound_by'][0]:>14}"
            for d in DIRECTIONS
        )
        both = by_direction["both"]
        lines.append(f"{name:62}{times}{number(both['bytes'] / 1e6):>10}{number(both['operations'] / 1e9):>9}")
    return "\n".join([*lines, "b: bound by bytes, o: by operations"])
