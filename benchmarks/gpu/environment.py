"""What a figure was measured on: enough to judge it, nothing that names a host."""

from __future__ import annotations

import platform
import re
import subprocess
from typing import Any

import torch

from benchmarks.gpu.timing import cache_bytes


def driver_version() -> str | None:
    """As ``nvidia-smi`` tells it, or None where that tool is not there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split()[0] if answer.split() else None


def versions() -> dict[str, Any]:
    try:
        import triton

        installed = triton.__version__
    except ImportError:
        installed = None
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed,
        "python": platform.python_version(),
    }


def environment() -> dict[str, Any]:
    """The first CUDA device, its driver, and the versions of the software."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": cache_bytes(),
        "driver": driver_version(),
        **versions(),
    }


def slug(name: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
