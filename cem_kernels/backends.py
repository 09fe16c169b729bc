"""The backend names, and the one rule that picks one.

``reference``
    The definition: one class at a time, plain PyTorch.
``eager``
    Vectorised over classes with the projections absorbed; any device, any dtype, twice differentiable.
``triton``
    Fused kernels for CUDA tensors.
``auto``
    ``triton`` for CUDA tensors where the operator has kernels that support them, else ``eager``.

A backend asked for by name is used or refused with an error that says why; it never falls back silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

BACKENDS = ("auto", "triton", "eager", "reference")


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot run this call."""


def check_backend(backend: str) -> None:
    """Raise ValueError when ``backend`` is no backend's name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def pick(backend: str, operator: str, implementations: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The implementation of ``operator`` that ``backend`` stands for.

    Args:
        backend: one of :data:`BACKENDS`.
        operator: the operator's public name, for the error.
        implementations: backend name to function, of the backends that this operator has.

    Raises:
        ValueError: no such backend name.
        BackendUnavailableError: a real backend that this operator does not have.
    """
    check_backend(backend)
    name = "eager" if backend == "auto" else backend
    if name not in implementations:
        available = ", ".join(sorted(implementations))
        raise BackendUnavailableError(
            f"{operator} has no {name!r} backend in this release (available: {available}; 'auto' picks for you)"
        )
    return implementations[name]
