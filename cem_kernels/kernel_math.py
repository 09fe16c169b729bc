"""Functions that kernels share. Imports Triton, so only the ``triton.py`` files import this module."""

from __future__ import annotations

import triton
import triton.language as tl

from cem_kernels import backends

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
    """``log(1 + u)`` of ``u`` in [0, 1], to the last bits for small ``u`` too (Kahan)."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def last_to_arrive(counter, programs):
    """Whether this program is the last of ``programs`` to come to ``counter``, which begins at zero.

    What the others wrote before they came is then visible to it: partial results are added up by whoever is last, in
    an order that does not depend on who that is, and a launch is saved.
    """
    tl.debug_barrier()  # one thread counts, after all of the program's threads have written
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
