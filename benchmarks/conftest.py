"""What a benchmark's JSON says about the machine: enough to judge the figures, nothing that names a host."""

from __future__ import annotations

from typing import Any

import torch


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    cpu = machine_info.get("cpu", {})
    kept = {name: machine_info.get(name) for name in ("machine", "python_version", "system")}
    kept["cpu"] = {name: cpu.get(name) for name in ("brand_raw", "count")}
    kept["torch"] = torch.__version__
    kept["threads"] = torch.get_num_threads()
    machine_info.clear()
    machine_info.update(kept)
