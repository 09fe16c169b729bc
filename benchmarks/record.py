"""``results/cpu.json``: what was measured without a GPU, one part a study, one line a row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.environment import versions
from cem.files import replacing

FILE = Path(__file__).parent / "results" / "cpu.json"


def record(part: str, rows: Iterable[Mapping[str, Any]], command: str, path: Path = FILE, **more: Any) -> Path:
    """Put a study's rows into the file, with the command, the date and the versions, and leave its other parts."""
    parts = read(path)
    found = {name: version for name, version in versions().items() if name != "cuda"}
    parts[part] = {
        "command": command, "date": date.today().isoformat(), "threads": torch.get_num_threads(),
        **found, **more, "rows": list(rows),
    }  # fmt: skip
    write(parts, path)
    return path


def read(path: Path = FILE) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def write(parts: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    blocks = []
    for name, part in parts.items():
        head = json.dumps({key: value for key, value in part.items() if key != "rows"}, ensure_ascii=False)
        rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in part["rows"])
        blocks.append(f'{json.dumps(name)}: {head[:-1]}, "rows": [\n{rows}\n]}}')
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
