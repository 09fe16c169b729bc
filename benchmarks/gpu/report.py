"""The raw figures as JSON, on disk after every step: a run that is cut off leaves what it had."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu.measure import failures_of


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Whole or not at all, through a neighboring file; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


class Report:
    """A dictionary that is written whole whenever something is added.

    Args:
        path: of the JSON file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lists = ("correctness", "sanitizer", "cases", "sweep", "broken", "left_out", "targets")
        self.data: dict[str, Any] = {name: [] for name in lists}

    def set(self, **values: Any) -> None:
        self.data |= values
        self.write()

    def add(self, key: str, value: Any) -> None:
        self.data[key].append(value)
        self.write()

    def write(self) -> None:
        write_json(self.path, self.data)

    def failures(self) -> list[str]:
        """Everything that makes the run fail: wrong results, errors, what a sanitizer found, and steps that broke."""
        lines = [
            f"{check['name']}, {check['variant']}: {check['status']}: {check['why']}"
            for check in self.data["correctness"]
            if check["status"] not in ("ok", "absent")
        ]
        lines += [
            f"compute-sanitizer {run['tool']}: {run['status']}: {run.get('summary', '')}"
            for run in self.data["sanitizer"]
            if run["status"] in ("found", "error")
        ]
        lines += [line for case in self.data["cases"] for line in failures_of(case)]
        return lines + self.data["broken"]
