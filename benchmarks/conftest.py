"""What ``pytest benchmarks/`` says before it starts and in the end, and what its JSON says about the machine."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
import torch

from benchmarks import table
from benchmarks.record import read, record

SECONDS, COMPILED_SECONDS = 2.0, 70.0  # of one measurement, on two idle cores; what a case takes to compile besides


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="benchmarks: rows into benchmarks/results/cpu.json")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # the table here has the ratios


def pytest_collection_finish(session: pytest.Session) -> None:
    """How much is to come, and for about how long."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    items: list[Any] = [item for item in session.items if "benchmark" in getattr(item, "fixturenames", ())]
    if reporter is None or not items:
        return
    compiled = {item.callspec.params["spec"] for item in items if item.get_closest_marker("slow")}
    untimed = session.config.option.benchmark_disable
    minutes = (len(items) * (1.0 if untimed else SECONDS) + len(compiled) * COMPILED_SECONDS) / 60
    what = "checked and run once, untimed" if untimed else "checked, then timed beside what competes with them"
    reporter.write_line(
        f"benchmarks: {len(items)} measurements {what}; {len(compiled)} cases are compiled. "
        f"About {max(minutes, 1):.0f} min on two idle cores."
    )


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    rows = [bench.extra_info for bench in config._benchmarksession.benchmarks if "case" in bench.extra_info]
    if rows:
        terminalreporter.section("against the strongest way without this library")
        for line in table.lines(rows):
            terminalreporter.write_line(line)
        if config.option.record:
            again = {identity(row) for row in rows}  # what was not measured this time stays
            kept = [row for row in read().get("speed", {}).get("rows", []) if identity(row) not in again]
            file = record("speed", kept + rows, "pytest benchmarks/ --benchmark-only --record")
            terminalreporter.write_line(f"recorded in {file}")


def identity(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["case"], row["own"], row["direction"]


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Enough to judge the figures, nothing that names a host."""
    cpu = machine_info.get("cpu", {})
    kept = {name: machine_info.get(name) for name in ("machine", "python_version", "system")}
    kept["cpu"] = {name: cpu.get(name) for name in ("brand_raw", "count")}
    kept |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "date": date.today().isoformat()}
    machine_info.clear()
    machine_info.update(kept)
