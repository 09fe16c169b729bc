"""What every kernel launcher needs. Imports Triton, so only the ``triton.py`` files import this module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton

# Kernels are compiled for CUDA (and ROCm, which PyTorch calls cuda too) and interpreted on the CPU.
DISPATCH_KEYS = ("CPU", "CUDA")

# For kernels of few programs: left alone, ptxas may spill to make room for more programs than there are.
ALL_REGISTERS: dict[str, Any] = {} if torch.version.hip else {"maxnreg": 255}

Grid = tuple[int, ...]
Sizes = TypeVar("Sizes", bound=NamedTuple)

_tuned: dict[str, dict[str, int]] = {}


def tune(operator: str, **sizes: int) -> None:
    """Compile an operator's kernels for other sizes than the default ones, for the rest of the process.

    Nothing tunes itself: sizes are fixed, so that no call is slow or different because it came first. Whoever has a
    device and the time tries others, checks the results and measures (``python -m benchmarks.gpu`` does both).

    Args:
        operator: a registered operator, ``gated_read_backward`` say, or one of several kernels of an operator, by its
            name without ``_kernel``: ``attend_backward``.
        sizes: fields of its ``Tiles`` or ``Blocks`` to replace, ``BLOCK_N=32, num_warps=2`` say; none of them: back to
            the defaults.

    A field that does not exist is a ValueError in the operator's next call.
    """
    _tuned[operator] = sizes


def tuned(operator: str, defaults: Sizes) -> Sizes:
    """``defaults``, but for what :func:`tune` has replaced."""
    replaced: Sizes = defaults._replace(**_tuned.get(operator, {}))
    return replaced


def launch(kernel: Any, grid: Grid, device: torch.device, *args: Any, **options: Any) -> None:
    """Run ``kernel`` on ``device``, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; an H200's where there is none, so that the interpreter splits alike."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def splits_per_class(units: int, num_classes: int, programs: int) -> int:
    """Into how many programs the work of a class is split, from sizes known on the host.

    Args:
        units: the least pieces of work in the whole batch that are worth a program each.
        num_classes: ``K``; every class gets as many programs.
        programs: how many fill the device. More would only mean more partial sums.

    Class sizes are on the device, and asking for them would wait for it. With classes of equal size every program has
    work; a batch of one class keeps only this many programs busy.
    """
    return max(1, min(triton.cdiv(units, num_classes), triton.cdiv(programs, num_classes)))


def input_precision(dtype: torch.dtype) -> str:
    """How kernels multiply matrices of ``dtype``: ``tf32`` only for fp32, and only where PyTorch is allowed to."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a launcher as the PyTorch operator ``cem_kernels::<schema>`` and return that operator.

    ``torch.compile`` then sees one opaque call with known shapes. The operators have no autograd formula of their own:
    the ``autograd.Function`` that calls them is differentiable.
    """

    def register(launcher: Callable[..., Any]) -> Any:
        name = schema[: schema.index("(")]
        torch.library.define(f"cem_kernels::{name}", schema[len(name) :])
        for key in DISPATCH_KEYS:
            torch.library.impl(f"cem_kernels::{name}", key)(launcher)
        torch.library.register_fake(f"cem_kernels::{name}")(fake)
        return getattr(torch.ops.cem_kernels, name).default

    return register
