"""``python -m benchmarks.performance_page``: the tables and the picture of ``docs/performance.md``.

The page is written by hand but for what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``: that is replaced by
what the committed files say, and only what was measured has a row.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gpu import model
from benchmarks.picture import draw_sweep, size_of
from benchmarks.table import quartiles_of
from cem.files import write_text
from cem.report.numbers import figure

ROOT = Path(__file__).parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
RESOURCES = ROOT / "tests" / "cem_kernels" / "kernel_resources.csv"
TARGETS = {"sm80": "sm_80", "sm90": "sm_90", "sm100": "sm_100"}
NOTHING_YET = "**No kernel has run on a GPU yet.** There is no time of a kernel, measured or predicted, on this page."
VERDICTS = {True: "reached", False: "missed", None: "not measured"}

Part = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Markdown; the first columns hold words, the others figures."""
    rules = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rules, *rows))


def origin(part: Part) -> str:
    """What was run, when, and under what."""
    versions = ", ".join(f"{name} {part[name]}" for name in ("torch", "triton") if name in part)
    threads = f", {part['threads']} thread{'s' * (part['threads'] > 1)}" if "threads" in part else ""
    allocator = "".join(f", {name}={value}" for name, value in part.items() if name.startswith("MALLOC_"))
    return f"Measured by `{part['command']}` on {part['date']}: {versions}{threads}{allocator}.{part.get('note', '')}"


def needs(rows: Sequence[Mapping[str, str]]) -> str:
    """The most that any compiled version of a kernel needs, on each target."""

    def most(kernel: str, target: str) -> str:
        mine = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target)]
        columns = ("registers", "shared_bytes", "spilled_bytes")
        registers, shared, spilled = (max(int(row[column]) for row in mine) for column in columns)
        return f"{registers}, {shared / 1024:.3g} KB" + (f", {spilled} B spilled" if spilled else "")

    kernels = dict.fromkeys(row["kernel"] for row in rows if row["target"] in TARGETS)
    versions = {kernel: len({row["case"] for row in rows if row["kernel"] == kernel}) for kernel in kernels}
    cells = [[f"`{k}`", str(versions[k]), *(most(k, target) for target in TARGETS)] for k in kernels]
    compilers = " and ".join(sorted({row["triton"] for row in rows}))
    return f"{table(['kernel', 'versions', *TARGETS.values()], cells)}\n\nCompiled by Triton {compilers}."


def speed(part: Part) -> str:
    rows = []
    for row in part["rows"]:
        if row["direction"] == "both":
            ms = [figure(1e3 * row["seconds"][row[whose]]) for whose in ("own", "strongest")]
            loop = f"{row['times_loop']['median']:.1f}" if "times_loop" in row else ""
            rows.append([row["case"], row["own"], row["strongest"], *ms, quartiles_of(row["times"]), loop])
    head = ["case", "this library", "strongest without it", "ms", "its ms", "times", "loop, times"]
    return f"{table(head, rows, words=3)}\n\n{origin(part)}"


def training(part: Part) -> str:
    rows = []
    for row in part["rows"]:
        if row["direction"] == "step":
            ms = [figure(1e3 * row["seconds"][name]) for name in (row["own"], "none")]
            low, mid, high = (100 * (1 / row["times"][name] - 1) for name in ("q3", "median", "q1"))
            rows.append([row["own"], *ms, f"{mid:.0f} % ({low:.0f} to {high:.0f})"])
    return table(["surrogate", "ms of a step", "ms without", "added"], rows)


def memory(part: Part) -> str:
    cases: dict[str, dict[str, str]] = {}
    for row in part["rows"]:
        peak, kept = (figure(row[key] / 1e6) for key in ("peak_bytes", "saved_bytes"))
        cases.setdefault(row["case"], {})[row["variant"]] = f"{peak} ({kept})"
    variants = list(dict.fromkeys(variant for found in cases.values() for variant in found))
    rows = [[case, *(found.get(variant, "") for variant in variants)] for case, found in cases.items()]
    return f"{table(['case', *variants], rows)}\n\n{origin(part)}"


def sizes(part: Part) -> str:
    rows = []
    for row in part["rows"]:
        shapes = ["×".join(map(str, row[key])) for key in ("features", "tokens")]
        figures = (figure(row["milliseconds"]), figure(row["peak_mib"]))
        rows.append([row["way"], shapes[0], shapes[1], f"{row['parameters']:,}", *figures])
    head = ["way", "features", "tokens T×D", "parameters", "ms", "peak, MiB"]
    return f"{table(head, rows, words=3)}\n\n{origin(part)}"


def sweep(part: Part) -> str:
    rows = []
    for axis, variant in dict.fromkeys((row["axis"], row["variant"]) for row in part["rows"]):
        line = [row for row in part["rows"] if (row["axis"], row["variant"]) == (axis, variant)]
        first, last = min(line, key=size_of), max(line, key=size_of)
        ms = (figure(1e3 * row["seconds"]) for row in (first, last))
        growth = (f"{size_of(last) / size_of(first):.0f}", figure(last["seconds"] / first["seconds"]))
        rows.append([axis, variant, f"{size_of(first):,} to {size_of(last):,}", *growth, *ms])
    head = ["what grows", "variant", "from, to", "size ×", "time ×", "ms at first", "ms at last"]
    return f"{table(head, rows, words=3)}\n\n{origin(part)}"


def device(run: Part) -> str:
    """What a device took, beside what was predicted, and the targets."""
    records = [record for record in run["records"] if record["kind"] == "time"]
    rows = [
        [
            row["case"],
            row["direction"],
            figure(row["microseconds"]),
            figure(row["measured"]),
            figure(row["ratio"]),
            row["why"],
        ]
        for row in model.measured(model.read(), records)
        if row["measured"] is not None
    ]
    head = ["case", "direction", "µs, predicted", "µs, measured", "ratio", "why, where it is off by half or more"]
    found = run["environment"]
    versions = ", ".join(f"{name} {found[name]}" for name in ("driver", "torch", "triton") if name in found)
    times = table(head, rows, words=2)
    judged = [[each["target"], figure(each["measured"]), VERDICTS[each["reached"]]] for each in run.get("targets", ())]
    targets = table(["target", "measured", "verdict"], judged)
    return f"Measured on {found['device']}, {versions}:\n\n{times}\n\n{targets}"


def write(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Bring the page and its picture in ``docs`` up to what is in ``results``."""
    parts = record.read(results / "cpu.json")
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("gpu/*.json"))]
    with open(RESOURCES, newline="", encoding="utf-8") as file:
        found = {"needs": needs(list(csv.DictReader(file)))}
    found["gpu"] = "\n\n".join(map(device, runs)) or NOTHING_YET
    found |= {"speed": speed(parts["speed"]), "training": training(parts["speed"]), "memory": memory(parts["memory"])}
    found |= {"sizes": sizes(parts["sizes"]), "sweep": sweep(parts["sweep"])}
    page = (docs / "performance.md").read_text(encoding="utf-8")
    for name, text in found.items():
        place = rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)"
        page, count = re.subn(place, f"\n{text}\n\n".replace("\\", r"\\"), page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"performance.md has {count} places for {name}, not one")
    write_text(docs / "performance.md", page)
    draw_sweep(parts["sweep"]["rows"], docs / "sweep-cpu.png")


if __name__ == "__main__":
    write()
