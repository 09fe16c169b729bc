"""What a run has found: a JSON file that is whole after every figure, and the same as text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cem.files import write_text
from cem.report.numbers import figure as number

FINE = ("ok", "absent")  # where a program or the kernels cannot be, nothing has failed
HEADS = {
    "time": f"{'':60}{'forward':>9}{'backward':>9}{'both':>9}{'call':>9}{'copy f/b':>10}{'MiB':>8}",
    "compare": f"{'':79}{'both':>9}{'call':>9}{'times in both orders':>22}{'call':>8}{'best':>8}{'MiB':>8}",
}
LEGEND = """\
Median µs of device time in CUDA graphs, inputs past the L2 cache (e: by events, there is no graph); call: of host time,
forward and backward. copy: bytes over time in % of the measured copy. MiB: peak above the inputs. times: theirs over
ours, in graphs (ours first, then last), launched call by call, and the quicker of both."""


def describe(error: BaseException) -> str:
    """Kind and first line of an error, with folders cut off file names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {cut_folders(lines[0] if lines else '')}"[:300].removesuffix(": ")


def cut_folders(text: str) -> str:
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", text)


class Report:
    """Records of jobs, written whole whenever one is added.

    Args:
        path: of the JSON file; its folder is made.
        keep: what the file holds already stays, but for what is measured again.
    """

    def __init__(self, path: Path, keep: bool = False) -> None:
        self.path = path
        kept = json.loads(path.read_text(encoding="utf-8")) if keep and path.exists() else {}
        self.data: dict[str, Any] = {"records": [], "left_out": {}, **kept}

    def set(self, **values: Any) -> None:
        self.data |= values
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")

    def add(self, record: Mapping[str, Any]) -> None:
        """In place of the record of that kind, name and variant, if there is one."""
        others = [each for each in self.data["records"] if identity(each) != identity(record)]
        self.set(records=[*others, dict(record)])

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.data["records"] if record["kind"] == kind]

    def rates(self) -> dict[str, float]:
        """Of the device, as measured; empty where that did not work."""
        return next((record["rates"] for record in self.of("rates") if record["status"] == "ok"), {})

    def failures(self) -> list[str]:
        """What was wrong, what broke and what hung, a line each."""
        bad = [record for record in self.data["records"] if record["status"] not in FINE]
        return [f"{' '.join(identity(record)).strip()}: {record['status']}: {record['why']}" for record in bad]


def identity(record: Mapping[str, Any]) -> tuple[str, str, str]:
    return record["kind"], record["name"], record["variant"]


def microseconds(figure: Mapping[str, Any]) -> str:
    mark = "" if figure.get("how", "graph") == "graph" else "e"
    return f"{number(1e6 * figure.get('device', figure)['median']) + mark:>9}"


def of_copy(figure: Mapping[str, Any], rates: Mapping[str, float]) -> float | None:
    """The share of the measured copy rate at which a direction moved its operator's bytes."""
    return figure["bytes"] / figure["device"]["median"] / rates["copy"] if "copy" in rates else None


def line_of(record: Mapping[str, Any], rates: Mapping[str, float]) -> str:
    """A record of any kind."""
    kind, start = record["kind"], f"{record['name']:60}"
    start += f"{record['variant']:19}" if kind == "compare" else ""
    if (record["status"] != "ok" and kind != "training") or kind == "command":
        return f"{start}{record['status']:8}{record['took']:6.0f} s  {record.get('why', '')}".rstrip()
    if kind == "time":
        shares = [of_copy(record[direction], rates) for direction in ("forward", "backward")]
        times = "".join(microseconds(record[d]) for d in ("forward", "backward", "both"))
        copies = "/".join("–" if share is None else f"{share:.0%}" for share in shares)
        return f"{start}{times}{microseconds(record['wall'])}{copies:>10}{record['peak_bytes'] / 2**20:8.0f}"
    if kind == "compare":
        times = record["times"]
        orders = f"{' / '.join(number(each) for each in times['by_order']):>22}"
        end = f"{number(times['launched']):>8}{number(times['quickest']):>8}{record['peak_bytes'] / 2**20:8.0f}"
        return f"{start}{microseconds(record['both'])}{microseconds(record['wall'])}{orders}{end}"
    if kind == "profile":
        rows = [
            f"{each['microseconds']:10.1f} µs  × {each['count']:<5g}{each['kernel'][:90]}" for each in record["kernels"]
        ]
        return "\n".join([f"{start}{record['launches']:.0f} kernels, {record['microseconds']:.0f} µs", *rows[:8]])
    if kind == "training":
        steps = record.get("step_seconds", {}).items()
        return "\n".join([start, *(f"  {way:20}{1e3 * seconds['median']:9.3f} ms" for way, seconds in steps)])
    if kind == "rates":
        return start + ", ".join(f"{name} {value:.3g}" for name, value in record["rates"].items())
    return f"{start}{microseconds(record['both'])} µs"


def target_line(target: Mapping[str, Any]) -> str:
    verdict = {True: "reached", False: "MISSED", None: "not measured"}[target["reached"]]
    return f"{verdict:13}{target['target']}: {number(target['measured'])} {target['note']}".rstrip()


def text(report: Report, predicted: Iterable[str]) -> str:
    """Everything in a report's file but for what passed its check; what was reached and what failed comes last."""
    data, rates, checks = report.data, report.rates(), report.of("check")
    good = sum(record["status"] == "ok" for record in checks)
    device = ", ".join(f"{key} {value}" for key, value in data["environment"].items())
    parts = [[device, f"{good} of {len(checks)} checks passed: kernels, compiled competitors, outputs and gradients"]]
    for kind in ("command", "rates", "time", "compare", "training", "profile", "sweep"):
        found = [line_of(record, rates) for record in report.of(kind)]
        parts.append([f"== {kind}", *filter(None, [HEADS.get(kind)]), *found] if found else [])
    parts += [LEGEND.splitlines(), list(predicted)]
    parts.append([f"left out of phase {n}: {', '.join(names)}" for n, names in data["left_out"].items() if names])
    parts.append([target_line(target) for target in data.get("targets", ())])
    failures = report.failures()
    parts.append([f"{len(failures)} failed:", *failures] if failures else ["nothing failed"])
    return "\n\n".join("\n".join(part) for part in parts if part)
