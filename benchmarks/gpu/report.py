"""The raw figures as JSON, on disk after every step: a run that is cut off leaves what it had."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu.measure import failures_of


class Report:
    """A dictionary that is written whole, through a neighbouring file, whenever something is added.

    Args:
        path: of the JSON file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"correctness": [], "sanitizer": [], "cases": [], "left_out": [], "targets": []}
        path.parent.mkdir(parents=True, exist_ok=True)

    def set(self, **values: Any) -> None:
        self.data |= values
        self.write()

    def add(self, key: str, value: Any) -> None:
        self.data[key].append(value)
        self.write()

    def write(self) -> None:
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)

    def failures(self) -> list[str]:
        """Everything that makes the run fail: wrong results, errors, and what a sanitizer found."""
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
        return lines + [line for case in self.data["cases"] for line in failures_of(case)]
