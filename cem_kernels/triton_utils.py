"""What kernels and launchers share. Imports Triton: only ``triton.py`` and ``kernels*.py`` files import this module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cem_kernels import backends

LN_EPS = 1e-5  # F.layer_norm's

# -------------------------------------------------------------------------------------------------------- launchers

# Multiplications and additions are fused, which is said because versions of Triton differ in what they do by default.
FUSION = {"enable_fp_fusion": True}
# For kernels of few programs: left alone, ptxas may spill to make room for more programs than there are.
ALL_REGISTERS: dict[str, Any] = {} if torch.version.hip else {"maxnreg": 255}

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
    sizes = _tuned.get(operator, {})
    if unknown := sizes.keys() - set(defaults._fields):
        raise ValueError(f"{operator} has no sizes {sorted(unknown)}, but {list(defaults._fields)}")
    return defaults._replace(**sizes)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Run ``kernel`` on ``device``, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **FUSION, **options)


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
    if dtype != torch.float32:
        return "ieee"
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if newer is not None:  # once it was set, reading the older switch is an error
        return "tf32" if newer == "tf32" else "ieee"
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a launcher as the PyTorch operator ``cem_kernels::<schema>`` and return that operator.

    ``torch.compile`` then sees one opaque call with known shapes. The operators have no autograd formula of their own:
    the ``autograd.Function`` that calls them is differentiable.
    """

    def register(launcher: Callable[..., Any]) -> Any:
        name = schema[: schema.index("(")]
        torch.library.define(f"cem_kernels::{name}", schema[len(name) :])
        for key in ("CPU", "CUDA"):  # interpreted, and compiled, for ROCm too, which PyTorch calls cuda
            torch.library.impl(f"cem_kernels::{name}", key)(launcher)
        torch.library.register_fake(f"cem_kernels::{name}")(fake)
        return getattr(torch.ops.cem_kernels, name).default

    return register


def with_rows(tokens: Tensor) -> Tensor:
    """``tokens [B, T, D]`` with any strides of samples and tokens, but a token's elements side by side."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def backward_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``backward`` that is not differentiated again, and computes as its forward did whatever autocast says now."""

    def plain(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return backward(ctx, *grads)

    return once_differentiable(plain)


# ---------------------------------------------------------------------------------------------------------- kernels

INTERPRETING = tl.constexpr(backends.INTERPRETING)


@triton.jit
def dot(a, b, sum, PRECISION: tl.constexpr):
    """``sum + a @ b``, accumulated in fp32."""
    if INTERPRETING:  # which multiplies bf16 as if they were integers; products of bf16 or fp16 are exact in fp32
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def dot_over_rows(a, b, sum, PRECISION: tl.constexpr, ROWS: tl.constexpr):
    """:func:`dot` over ``ROWS``, which may be fewer than the 16 that Triton's product wants."""
    if ROWS < 16:
        sum += tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    else:  # nothing after a return in the other branch: Triton would compile it all the same
        sum = dot(a, b, sum, PRECISION)
    return sum


@triton.jit
def tanh(x):
    """``tanh``, to the last bits near zero too, and without overflow."""
    z = x * x
    small = -5.70498872745e-3
    small = small * z + 2.06390887954e-2
    small = small * z - 5.37397155531e-2
    small = small * z + 1.33314422036e-1
    small = small * z - 3.33332819422e-1
    small = small * z * x + x
    # exp of minus twice the magnitude cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def tanh_slope(x):
    """The derivative of ``tanh``, without the cancellation of ``1 − tanh²``."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def log1p(u):
    """``log(1 + u)`` of ``u ≥ 0``, to the last bits for small ``u`` too: what rounding took from ``1 + u`` is added."""
    w = 1.0 + u
    return tl.log(w) + (u - (w - 1.0)) * (1.0 / w)


@triton.jit
def layer_norm_backward(d_normal, normal, mean_1, mean_x, rstd):
    """The gradient of a block of rows before their norm, from that of their normalized form and its two means.

    ``mean_1`` and ``mean_x`` are a row's means of ``d_normal`` and of ``d_normal ∘ normal`` over all columns.
    """
    return rstd[:, None] * (d_normal - mean_1[:, None] - normal * mean_x[:, None])


@triton.jit
def zero_ignored(out, order, offsets, program, programs, num_classes, num_samples, T, width, BLOCK: tl.constexpr):
    """Zeros in the rows of ``out [B, T, width]`` whose samples are in no class: they come last in ``order``.

    All ``programs`` share them, a sample at a time, which costs few registers; mostly there is none.
    """
    first_sample = tl.load(offsets + num_classes)
    for n in range(program, (num_samples - first_sample).to(tl.int32), programs):
        rows = out + tl.load(order + first_sample + n).to(tl.int64) * (T * width)
        for first in range(0, T * width, BLOCK):
            d = first + tl.arange(0, BLOCK)
            tl.store(rows + d, tl.zeros([BLOCK], out.dtype.element_ty), mask=d < T * width)


@triton.jit
def last_to_arrive(counter, programs):
    """Whether this program is the last of ``programs`` to come to ``counter``, which begins at zero.

    What the others wrote before they came is then visible to it: partial results are added up by whoever is last, in
    an order that does not depend on who that is, and a launch is saved.
    """
    tl.debug_barrier()  # one thread counts, after all of the program's threads have written
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
