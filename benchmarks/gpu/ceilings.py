"""The rates that this very device reaches: what a kernel's bytes and operations are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.timing import quantiles

# For predictions where nothing has been measured: an H200's, to be replaced by options or by a run on a device.
ASSUMED = {"copy": 4.3e12, "bf16": 780e12, "fp32": 60e12}


def seconds_of(call: Callable[[], object], samples: int) -> dict[str, Any]:
    """Device seconds of a call of a millisecond or more, by events."""
    for _ in range(3):
        call()
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e-3)
    return quantiles(times)


def copy_rate(samples: int) -> dict[str, Any]:
    """Bytes a second, read plus written, of a copy between two buffers of 4 GiB (a tenth of the memory at most)."""
    size = min(4 * 2**30, torch.cuda.get_device_properties(0).total_memory // 10) // 4
    source = torch.randn(size, device="cuda")
    target = torch.empty_like(source)
    timing = seconds_of(lambda: target.copy_(source), samples)
    return {"unit": "byte/s", "rate": 8 * size / timing["median"], "bytes": 8 * size, "seconds": timing}


def matmul_rate(dtype: torch.dtype, samples: int, *, tf32: bool = False, size: int = 8192) -> dict[str, Any]:
    """Operations a second of a square product of random matrices through ``torch.matmul``."""
    left, right = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        timing = seconds_of(lambda: torch.matmul(left, right, out=product), samples)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"unit": "operation/s", "rate": 2 * size**3 / timing["median"], "size": size, "seconds": timing}


def measure_ceilings(samples: int) -> dict[str, Any]:
    """``copy``, and the matrix rates ``bf16``, ``fp32`` (TF32 off) and ``tf32``."""
    found = {
        "copy": copy_rate(samples),
        "bf16": matmul_rate(torch.bfloat16, samples),
        "fp32": matmul_rate(torch.float32, max(samples // 3, 5)),
        "tf32": matmul_rate(torch.float32, samples, tf32=True),
    }
    torch.cuda.empty_cache()
    return found
