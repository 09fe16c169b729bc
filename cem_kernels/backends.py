"""The backend names, and the one rule that picks one.

``reference``
    The definition: one class at a time, plain PyTorch.
``eager``
    Vectorized over classes with the projections absorbed; any device, any dtype, twice differentiable.
``triton``
    Fused kernels for CUDA tensors.
``auto``
    ``triton`` for CUDA tensors where the operator has kernels that support them, else ``eager``.

A backend asked for by name is used or refused with an error that says why; it never falls back silently.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "eager", "reference")

# Both are read once, as Triton itself reads the second: what has been decorated cannot change its mind.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot run this call."""


def check_backend(backend: str) -> None:
    """Raise ValueError when ``backend`` is no backend's name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def check_available(backend: str, operator: str, objection: str | None = None) -> None:
    """What can be said of ``backend`` before there is any tensor.

    Args:
        backend: one of :data:`BACKENDS`.
        operator: the operator's public name, for the error.
        objection: what keeps its kernels from running any call, or None.

    Raises:
        ValueError: no such backend name.
        BackendUnavailableError: Triton is asked for and not installed, or kernels object.
    """
    check_backend(backend)
    if backend == "triton" and not TRITON_INSTALLED:
        raise BackendUnavailableError(f"{operator}: backend='triton' needs the package triton, which is not installed")
    if backend == "triton" and objection is not None:
        raise BackendUnavailableError(f"{operator}: backend='triton' cannot run: {objection}")


def why_not_triton(tokens: Tensor) -> str | None:
    """Why no kernel of this library can take ``tokens``; None where one can.

    The interpreter (``TRITON_INTERPRET=1`` before the first import) stands in for a device and takes CPU tensors.
    """
    if not TRITON_INSTALLED:
        return "the package triton is not installed"
    if tokens.dtype not in KERNEL_DTYPES:
        return f"kernels take fp32, bf16 and fp16, got {tokens.dtype}"
    if not tokens.is_cuda and not (INTERPRETING and tokens.device.type == "cpu"):
        return f"kernels run on CUDA devices, got a tensor on {tokens.device}"
    return None


MOST_CLASSES = 65_535  # a grid's second and third axes have no more programs


def size_outside_kernels(tokens: Tensor, slots: Tensor, *more: tuple[str, int, int, int]) -> str | None:
    """Which size kernels over tokens ``[B, T, D]`` and slots ``[K, S, D]`` do not take; None where they take all.

    Args:
        more: letter, size, least and most of what else a kernel limits.
    """
    (num_samples, num_tokens, width), (num_classes, num_slots, _) = tokens.shape, slots.shape
    limits = (
        ("D", width, 16, 512),
        ("S", num_slots, 1, 32),
        ("K", num_classes, 1, MOST_CLASSES),
        ("B·T", num_samples * num_tokens, 0, 2**30),  # tokens of a class are counted in 32 bits
        *more,
    )
    for letter, size, least, most in limits:
        if not least <= size <= most:
            return f"kernels take {letter} from {least} to {most}, got {size}"
    return None


def pick(backend: str, operator: str, tokens: Tensor, objection: str | None = None) -> str:
    """The backend that runs a call of ``operator``: what ``backend`` names, or what ``auto`` stands for.

    Args:
        backend: one of :data:`BACKENDS`.
        operator: the operator's public name, for the error.
        tokens: the call's main input; ``auto`` takes ``triton`` where it is on a CUDA device and kernels support it.
        objection: what else keeps this operator's kernels from running this call, or None.

    Raises:
        ValueError: no such backend name.
        BackendUnavailableError: a real backend that cannot run this call.
    """
    check_available(backend, operator)
    if backend == "auto":
        return "triton" if tokens.is_cuda and not (objection or why_not_triton(tokens)) else "eager"
    if backend == "triton":
        reason = why_not_triton(tokens) or objection
        if reason is not None:
            raise BackendUnavailableError(f"{operator}: backend='triton' cannot run this call: {reason}")
    return backend
