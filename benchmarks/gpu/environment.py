"""What a figure was measured on: enough to judge it, nothing that names a host; and what is missing here."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def missing() -> list[str]:
    """Requirements of the package and of its tests that are not installed, or too old."""
    if sys.version_info < (3, 11):  # which has no reader of TOML
        return []
    import tomllib  # type: ignore[import-not-found, unused-ignore]
    from packaging.requirements import Requirement

    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    wanted = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["test"]])
    needed = {each: version_of(each.name) for each in wanted if each.marker is None or each.marker.evaluate()}
    fits = [each for each, found in needed.items() if found and each.specifier.contains(found, prereleases=True)]
    return [f"{each.name}{each.specifier}" for each in needed if each not in fits]


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    import torch

    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": version_of("triton")}
    return {**found, "python": platform.python_version()}


def environment() -> dict[str, Any]:
    """The first CUDA device, its driver, and the versions of the software."""
    import torch

    device = torch.cuda.get_device_properties(0)
    names = ("major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    found = {"device": device.name, **{name: getattr(device, name, None) for name in names}}
    command = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    answer = subprocess.run(command, shell=True, capture_output=True, text=True).stdout.split()
    return {**found, "driver": answer[0] if answer else None, **versions()}
