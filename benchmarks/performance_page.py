"""``python -m benchmarks.performance_page``: ``docs/performance.md`` and its pictures, from committed files alone.

Floors are worked out from the sizes of :data:`benchmarks.gpu.cases.PLANS`. Times come from ``results/gpu/*.json``, as
``python -m benchmarks.gpu`` wrote them; where there are none the page says so.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import table
from benchmarks.gpu.cases import PLANS, judge, seconds
from benchmarks.gpu.ceilings import ASSUMED
from benchmarks.gpu.measure import predictions
from benchmarks.gpu.picture import draw_sweep, size_of
from benchmarks.operators import DIRECTIONS, OWN
from benchmarks.operators.base import rate_of
from benchmarks.roofline import Point, draw_roofline
from cem.report.document import NOTHING, Column, Link, Picture, Report, Section, Table
from cem.report.markdown import write_markdown
from cem.report.numbers import figure

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
RESOURCES = ROOT / "tests" / "cem_kernels" / "kernel_resources.csv"

NOT_MEASURED = "not measured"
CPU_SWEEP, SWEEP_ALT = "sweep-cpu.png", "Time of every variant as tokens or classes grow"
ASSUMED_DEVICE = "H200"
OPERATORS = list(dict.fromkeys(plan.spec.operator for plan in PLANS))

# ------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Field:
    """What a field of a file kept by hand takes."""

    takes: str
    accepts: Callable[[Any], bool]


def one_of(*values: str, called: str = "") -> Field:
    return Field(called or " or ".join(values), lambda value: value in values)


def is_time(value: Any) -> bool:
    """A number above zero, or two of them in order."""
    ends = value if isinstance(value, list) else [value, value]
    numbers = [end for end in ends if isinstance(end, int | float) and not isinstance(end, bool)]
    return len(numbers) == len(ends) == 2 and 0 < ends[0] <= ends[1]


TEXT = Field("text", lambda value: isinstance(value, str) and value.strip() != "")
VERSION = {
    **dict.fromkeys(("kernel", "version", "change", "predicted", "outcome"), TEXT),
    "verdict": one_of("kept", "dropped"),
}
EXPECTATION = {
    "case": one_of(*(plan.spec.name for plan in PLANS), called="the name of a case in benchmarks.gpu.cases.PLANS"),
    "direction": one_of(*DIRECTIONS),
    "expected_us": Field("microseconds, or [least, most]", is_time),
    "why": TEXT,
}


def entries(path: Path, fields: Mapping[str, Field]) -> list[dict[str, Any]]:
    """The objects of a JSON list, each with exactly these fields.

    Raises:
        ValueError: names the file, the entry, the field, what it takes and what it got.
    """
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    for number, entry in enumerate(found, start=1):
        where = f"{path.name}, entry {number}"
        if set(entry) != set(fields):
            raise ValueError(f"{where}: takes the fields {', '.join(fields)}, got {', '.join(entry)}")
        for name, field in fields.items():
            if not field.accepts(entry[name]):
                raise ValueError(f"{where}: {name!r} takes {field.takes}, got {entry[name]!r}")
    return found


@dataclass(frozen=True)
class Source:
    """What floors are worked out from: a device that was measured, or rates assumed for one that was not.

    Attributes:
        device: its name.
        rates: ``copy`` in bytes a second, matrix rates by precision in operations a second.
        run: everything that ``python -m benchmarks.gpu`` found on it, or ``None``.
    """

    device: str
    rates: Mapping[str, float]
    run: Mapping[str, Any] | None = None

    @property
    def cases(self) -> list[dict[str, Any]]:
        """The records of what was measured."""
        return self.run["cases"] if self.run else []

    def case(self, name: str) -> dict[str, Any]:
        """A case's record; one without variants if it was not measured."""
        return next((case for case in self.cases if case["name"] == name), {"error": "not run", "variants": {}})

    def targets(self) -> list[dict[str, Any]]:
        return judge(self.cases, self.rates)


def sources(folder: Path) -> list[Source]:
    """The runs in a folder, or the assumption where there are none. Files without ceilings are predictions, no runs."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = [
        Source(run["environment"]["device"], {name: c["rate"] for name, c in run["ceilings"].items()}, run)
        for run in runs
        if "ceilings" in run
    ]
    return found or [Source(ASSUMED_DEVICE, ASSUMED)]


# -------------------------------------------------------------------------------------------------------------- cells


def amount(value: float, unit: str = "") -> str:
    """Three digits and a prefix: ``"67.1 MB"``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{figure(value / factor)} {prefix}{unit}"
    return f"{figure(value)} {unit}".strip()


def measured_time(case: dict[str, Any], direction: str) -> str:
    """Microseconds of this library's kernel, or why there are none."""
    record = case["variants"].get("triton", {"status": NOT_MEASURED})
    return table.figure(record, direction) if seconds(case, "triton", direction) else record["status"]


def times_floor(case: dict[str, Any], direction: str) -> str:
    return figure(case["variants"].get("triton", {}).get(direction, {}).get("times_floor"))


def against_peers(case: dict[str, Any], direction: str) -> str:
    """How many times as fast as the fastest peer with a time, and which one that is."""
    taken = seconds(case, "triton", direction)
    times = {name: peer for name in case["variants"] if name not in OWN and (peer := seconds(case, name, direction))}
    if taken is None or not times:
        return NOTHING
    strongest = min(times, key=lambda name: times[name])
    return f"{figure(times[strongest] / taken)} {strongest}"


# ----------------------------------------------------------------------------------------------------------- sections

HOW_TO_READ = [
    ("bytes, operations", "what a case must move through device memory and what it must compute. Both follow from its "
     "sizes: every input is read once, every output is written once, every product is done once, in the cheapest order "
     "known."),
    ("rates", "what turns them into times. Bytes are held against a large copy, read and write counted. Operations are "
     "held against a large matrix product: bf16 for the 16-bit types, fp32 without TF32 for fp32."),
    ("floor", "the larger of the two times. At these rates no version of a kernel is faster. What it takes beyond the "
     "floor is its own loss."),
    ("bound", "which of the two takes the time of the floor."),
    ("both", "forward and backward in one go. The floor is that of the sums, which can be less than the sum of the "
     "floors."),
    ("measured", "the median device time of replays of a CUDA graph, with inputs that are not in the L2 cache. An e "
     "behind it: timed by events, as no graph could be captured. A c: inputs were in the cache."),
    ("peer", "a way to do the same work without this library. Against it, 2 means twice as fast."),
    ("B1024 K10 T64 D128 S8 H4 bf16", "a case: B samples of T tokens of width D, in K classes; S slots for each class, "
     "H heads; the type of the tokens."),
]  # fmt: skip

REPRODUCE = """\
python -m benchmarks.gpu                             # needs a CUDA device: benchmarks/results/gpu/DEVICE.json
python -m benchmarks.gpu --predict                   # floors alone, also for the rates of another device
python -m benchmarks.memory                          # benchmarks/results/memory.json
python -m benchmarks.cpu_sweep                       # benchmarks/results/cpu-sweep.json
python tests/cem_kernels/compile_kernels.py --write  # what each kernel needs, no device needed
python -m benchmarks.performance_page                # this page and its pictures
"""


def words(*titles: str) -> list[Column]:
    return [Column(title, words=True) for title in titles]


def headlines(found: Sequence[Source], triton: str) -> list[str]:
    compiled = f"Registers, shared memory and spills are what Triton {triton} reports when it compiles for a device."
    written = "This page is written by python -m benchmarks.performance_page. Edit what that reads, not the page."
    if found[0].run is None:
        nothing = "No kernel has run on a GPU yet. Floors and expected times are not measurements."
        return [f"{nothing} Where a measurement belongs, this page says {NOT_MEASURED}.", compiled, written]
    return [*map(headline, found), compiled, written]


def headline(source: Source) -> str:
    verdicts = [target["reached"] for target in source.targets()]
    return f"Measured on {source.device}: {verdicts.count(True)} of {len(verdicts)} targets reached."


def of_source(source: Source, picture: str) -> list[Section]:
    """One device: the roofline, a table for every operator, and the targets."""
    alt = f"Rooflines of {', '.join(OPERATORS)}: operations a second over operations for every byte"
    title = f"Measured on {source.device}" if source.run else f"Predicted for an {source.device}"
    section = Section(title, picture=Picture(Path(picture), alt))
    section.facts = [
        (f"{name} rate", amount(value, "B/s" if name == "copy" else " operations/s"))
        for name, value in source.rates.items()
    ]
    parts = [Section(f"{title}: {operator}", table=operator_table(operator, source)) for operator in OPERATORS]
    parts.append(targets(f"{title}: targets", source))
    if source.run:
        section.paragraphs = [
            "The rates were measured in the same run. A hollow marker shows the rate of a case, forward and backward "
            "together, at its floor; a full one the rate that was reached, with its share of the other.",
            *table.correctness_lines(source.run["correctness"], source.run["sanitizer"]),
        ]
        section.facts += [(name, str(value)) for name, value in source.run["environment"].items()]
        if untimed := list(missing(source)):
            parts.append(Section(f"{title}: without a time", definitions=untimed))
    else:
        section.paragraphs = [
            "The rates are assumed, not measured. Every marker is on a roof: it shows the rate of a case, forward and "
            "backward together, that takes no longer than its floor."
        ]
    return [section, *parts]


def operator_table(operator: str, source: Source) -> Table:
    plans = [plan for plan in PLANS if plan.spec.operator == operator]
    found = predictions(plans, source.rates)
    rows = []
    for plan in plans:
        name = plan.spec.name
        case = source.case(name)
        for direction in DIRECTIONS:
            of = found[name][direction]
            rows.append([
                short(name) if direction == DIRECTIONS[0] else "", direction,
                amount(of["operations"]), amount(of["bytes"], "B"), figure(1e6 * of["floor_seconds"]), of["bound_by"],
                measured_time(case, direction),
                *([times_floor(case, direction), against_peers(case, direction)] if source.run else []),
            ])  # fmt: skip
    columns = [
        *words("case", "direction"), Column("operations"), Column("bytes"), Column("floor, µs"), *words("bound"),
        Column("measured, µs"), *([Column("× floor"), Column("× strongest peer")] if source.run else []),
    ]  # fmt: skip
    return Table(columns, rows)


def short(name: str) -> str:
    """A case's name without its operator."""
    return name.partition(" ")[2]


def targets(title: str, source: Source) -> Section:
    rows = []
    for target in source.targets():
        least = target.get("least", 0)
        rows.append([
            target["case"], target["target"], figure(least if least > 1 else None, decimals=2),
            figure(target["measured"], decimals=2), verdict(target),
        ])  # fmt: skip
    text = (
        "At best: where operations take longer than bytes, how many times as long they do. A target below that is out "
        "of reach for any kernel."
    )
    columns = [*words("case", "target"), Column("at best"), Column("measured"), *words("verdict")]
    return Section(title, [text], Table(columns, rows))


def verdict(target: Mapping[str, Any]) -> str:
    if target["measured"] is None:
        return NOT_MEASURED
    if target["reached"] is None:
        return f"open without {', '.join(target['missing'])}"
    return "reached" if target["reached"] else "missed"


def missing(source: Source) -> Iterator[tuple[str, str]]:
    """What has no time in a run, and why; cases of the plan that were not run at all, too."""
    for plan in PLANS:
        name = plan.spec.name
        case = source.case(name)
        if "error" in case:
            yield name, case["error"]
            continue
        for variant in plan.names(quick=False):
            record = case["variants"].get(variant, {"status": "not run"})
            if record["status"] != "ok":
                yield f"{name}, {variant}", ": ".join(record[key] for key in ("status", "why") if key in record)


def points(source: Source) -> list[Point]:
    """Every case on its roof, and where it was measured."""
    found = predictions(PLANS, source.rates)
    marks = []
    for plan in PLANS:
        both = found[plan.spec.name]["both"]
        taken = seconds(source.case(plan.spec.name), "triton", "both")
        marks.append(
            Point(
                plan.spec.operator,
                short(plan.spec.name),
                rate_of(plan.spec.dtype),
                intensity=both["operations"] / both["bytes"],
                attainable=both["operations"] / both["floor_seconds"],
                reached=None if taken is None else both["operations"] / taken,
            )
        )
    return marks


def expected(path: Path, found: Sequence[Source]) -> Section:
    floors = predictions(PLANS, ASSUMED)
    rows = []
    for entry in entries(path, EXPECTATION):
        name, direction, guess = entry["case"], entry["direction"], entry["expected_us"]
        ends = guess if isinstance(guess, list) else [guess]
        floor = 1e6 * floors[name][direction]["floor_seconds"]
        rows.append([
            name, direction, figure(floor), " to ".join(f"{end:g}" for end in ends),
            " to ".join(figure(end / floor) for end in ends),
            *(measured_time(source.case(name), direction) for source in found), entry["why"],
        ])  # fmt: skip
    measured = [f"measured on {source.device}, µs" if source.run else "measured, µs" for source in found]
    columns = [
        *words("case", "direction"), Column("floor, µs"), Column("expected, µs"), Column("expected × floor"),
        *map(Column, measured), *words("why"),
    ]  # fmt: skip
    text = (
        "Written down before the first run on a device, for the kernels as they stood then. The floor is that of the "
        f"rates assumed for an {ASSUMED_DEVICE}."
    )
    return Section("Expected before measuring", [text], Table(columns, rows))


def resources(rows: Sequence[Mapping[str, str]]) -> Section:
    """The most that any compiled version of a kernel needs on each target."""
    devices = list(dict.fromkeys(row["target"] for row in rows))
    cells = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        mine = [row for row in rows if row["kernel"] == kernel]
        by_device = [needs([row for row in mine if row["target"] == device]) for device in devices]
        cells.append([kernel, str(len({row["case"] for row in mine})), *by_device])
    text = [
        "Registers of a thread, shared memory of a program, and bytes that spill from registers to memory. Each is the "
        "most that any configuration needs, so the three need not belong together.",
        f"Compiled with Triton {compilers(rows)}, which needs no device. On CUDA a thread can have 255 registers. The "
        "tests allow 99 KB of shared memory and no spill.",
    ]
    link = Link("every configuration", Path("../tests/cem_kernels/kernel_resources.csv"))
    columns = [*words("kernel"), Column("configurations"), *map(Column, devices)]
    return Section("What each kernel needs", text, Table(columns, cells), links=[link])


def needs(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return "not compiled"
    registers, shared, spilled = (
        max(int(row[column]) for row in rows) for column in ("registers", "shared_bytes", "spilled_bytes")
    )
    return f"{registers}, {shared / 1024:.3g} KB, {spilled} B"


def compilers(rows: Iterable[Mapping[str, str]]) -> str:
    return " and ".join(sorted({row["triton"] for row in rows}))


def versions(path: Path) -> list[Section]:
    found = entries(path, VERSION)
    text = [
        "Kernels as they were, and what each change was to bring. Where an outcome begins with compiled only, the "
        "kernel was compiled and checked in Triton's interpreter, and its speed is unknown.",
    ]
    names = ("version", "change", "predicted", "outcome", "verdict")
    title = "Versions that mattered"
    parts = [Section(title, text)]
    for kernel in dict.fromkeys(version["kernel"] for version in found):
        rows = [[version[name] for name in names] for version in found if version["kernel"] == kernel]
        parts.append(Section(f"{title}: {kernel}", table=Table(words(*names), rows)))
    return parts


def memory(path: Path) -> Section:
    if not path.exists():
        return Section("Peak memory", ["Not measured."])
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [case["name"], variant, amount(sizes["peak_bytes"], "B"), amount(sizes["saved_bytes"], "B")]
        for case in found["cases"]
        for variant, sizes in case["variants"].items()
    ]
    return Section(
        "Peak memory",
        [
            "The most that is held at any time, and what the forward leaves for the backward.",
            "With one token a sample, slots of all iterations outnumber tokens: 2,400 rows at 512 samples of 100 "
            "classes. What one launch backward and one matrix product a weight need of such a row is 21 times its "
            "width, 26 MB in all. It would take a second computation of the GRU and the MLP to hold much less, in "
            "a chain of small products that already decides the time.",
        ],
        Table([*words("case", "variant"), Column("peak"), Column("saved for the backward")], rows),
        facts=[(name, str(value)) for name, value in found["environment"].items()],
    )


def sweeps(source: Source, picture: str) -> Section:
    title = f"As sizes grow: {source.device}" if source.run else "As sizes grow"
    if not (source.run or {}).get("sweep"):
        return Section(title, ["Not measured."])
    return Section(title, picture=Picture(Path(picture), SWEEP_ALT))


def sweep_on_cpu(path: Path) -> Section:
    """Without kernels, but the same mathematics: linear growth is the algorithm's, and shows there too."""
    if not path.exists():
        return Section("As sizes grow: CPU", ["Not measured."])
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [point["spec"], point["variant"], f"{1e3 * point['seconds']:,.0f} ms", *growth(point, found["sweep"])]
        for point in found["sweep"]
    ]
    text = (
        "The CPU has no kernels, but eager does the same operations, in the same order of growth. Kernels on a GPU are "
        "expected to grow like it once they fill the device. Without the variables named below the largest batch takes "
        "5.7 times the one before it in eager, because the system's allocator hands large tensors out page by page."
    )
    return Section(
        "As sizes grow: CPU",
        [text],
        Table([*words("case", "variant"), Column("forward and backward"), Column("size ×"), Column("time ×")], rows),
        picture=Picture(Path(CPU_SWEEP), SWEEP_ALT),
        facts=[(name, str(value)) for name, value in found["environment"].items()],
    )


def growth(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """How many times the size and the time of the next smaller point."""
    alike = [p for p in points if (p["axis"], p["variant"]) == (point["axis"], point["variant"])]
    smaller = [p for p in alike if size_of(p) < size_of(point)]
    if not smaller:
        return NOTHING, NOTHING
    before = max(smaller, key=size_of)
    return f"{size_of(point) / size_of(before):g}", f"{point['seconds'] / before['seconds']:.2f}"


# --------------------------------------------------------------------------------------------------------------- page


def numbered(stem: str, index: int) -> str:
    """The picture of the first source has a plain name."""
    return f"{stem}.png" if index == 0 else f"{stem}-{index + 1}.png"


def page(results: Path, found: Sequence[Source]) -> Report:
    with open(RESOURCES, newline="", encoding="utf-8") as file:
        compiled = list(csv.DictReader(file))
    return Report(
        "Performance of the kernels",
        headlines(found, compilers(compiled)),
        [
            Section("How to read this page", definitions=HOW_TO_READ),
            *(part for index, source in enumerate(found) for part in of_source(source, numbered("roofline", index))),
            expected(results / "expected.json", found),
            resources(compiled),
            *versions(results / "versions.json"),
            memory(results / "memory.json"),
            *(sweeps(source, numbered("sweep", index)) for index, source in enumerate(found)),
            sweep_on_cpu(results / "cpu-sweep.json"),
            Section("How to reproduce", code=REPRODUCE),
        ],
    )


def write(results: Path, docs: Path) -> None:
    """The page and its pictures into ``docs``, from what is in ``results``."""
    found = sources(results / "gpu")
    write_markdown(page(results, found), docs / "performance.md")
    for index, source in enumerate(found):
        draw_roofline(points(source), source.rates, docs / numbered("roofline", index))
        if source.run and source.run.get("sweep"):
            draw_sweep(source.run["sweep"], docs / numbered("sweep", index))
    if (on_cpu := results / "cpu-sweep.json").exists():
        draw_sweep(json.loads(on_cpu.read_text(encoding="utf-8"))["sweep"], docs / CPU_SWEEP)


if __name__ == "__main__":
    write(RESULTS, DOCS)
