"""Checks shared by the operators: errors that name what was expected and what came.

Shapes, dtypes and devices are known on the host and always checked. Values (label range, finiteness) are not: reading
them waits for the device, so they are checked for free on the CPU and on CUDA only in debug mode.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_debug = os.environ.get("CEM_KERNELS_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Check values on every device, at the price of host synchronizations.

    In debug mode :meth:`cem_kernels.ClassGroups.from_labels` checks label ranges and class bounds on CUDA too, and
    every operator refuses tokens that hold NaN or infinity. The environment variable ``CEM_KERNELS_DEBUG=1`` switches
    it on from outside.
    """
    global _debug
    _debug = bool(enabled)


def values_are_checked(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` may be read: on the CPU or in debug mode, never while being compiled."""
    if torch.compiler.is_compiling():
        return False
    return _debug or tensor.device.type == "cpu"


IGNORED = -100  # the label of samples that do not count, as PyTorch's losses have it


def check_labels(labels: Tensor, name: str = "labels") -> None:
    """``labels`` is an integer tensor of rank 1; values are not looked at."""
    if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or labels.dtype.is_complex:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} must be an integer tensor, got {kind}")
    if labels.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got torch.bool")
    if labels.dim() != 1:
        raise ValueError(f"{name} must have shape [B], got {list(labels.shape)}")


def as_labels(labels: Tensor, num_classes: int, name: str = "labels") -> tuple[Tensor, bool]:
    """``labels [B]`` of any integer dtype as int64, checked, and whether some of them may not count.

    Raises:
        TypeError: no integer tensor.
        ValueError: another rank, a ``num_classes`` below 1, or, where :func:`values_are_checked`, a label that is
            neither in ``[0, num_classes)`` nor :data:`IGNORED`.
    """
    check_labels(labels, name)
    if num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}")
    signed, labels = labels.dtype.is_signed, labels.long()
    ignores = not values_are_checked(labels)
    if labels.numel() and not ignores:
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if signed and low == IGNORED:
            ignores, low = True, int(labels.masked_fill(labels == IGNORED, max(high, 0)).amin())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{name} must lie in [0, {num_classes}), or be {IGNORED} where a sample does not count, got values "
                f"from {low} to {high}"
            )
    return labels, ignores


def check_float(name: str, tensor: Tensor) -> None:
    """``tensor`` is a floating-point tensor; in debug mode, a finite one."""
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if _debug and not torch.compiler.is_compiling() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity (checked because debug mode is on)")


def check_running(running: Any, shapes: Mapping[str, Mapping[str, int | None]], features: Tensor) -> str | None:
    """The named tuple ``running``, which a call moves, fits it; what kernels object to, or None.

    Args:
        running: statistics, floating-point, and ``batches`` and ``ignored``, int64.
        shapes: of every field, as :func:`check_shape` takes them.
        features: whose device it must be on.
    """
    counters = ("batches", "ignored")
    for name, expected in shapes.items():
        tensor = getattr(running, name)
        if name in counters:
            if tensor.dtype != torch.int64:
                raise TypeError(f"running.{name} must be torch.int64, got {tensor.dtype}")
        else:
            check_float(f"running.{name}", tensor)
        check_shape(f"running.{name}", tensor, expected)
        if tensor.requires_grad:
            raise ValueError(f"running.{name} takes no gradient: it is moved in place")
    for name, tensor in running._asdict().items():
        if tensor.device != features.device:
            raise ValueError(f"running.{name} must be on the features' device {features.device}, got {tensor.device}")
    fp32 = all(getattr(running, name).dtype == torch.float32 for name in shapes if name not in counters)
    if fp32 and all(each.is_contiguous() for each in running):
        return None
    return "kernels take running moments that are fp32 and contiguous"


def check_product_dtype(dtype: torch.dtype | None) -> None:
    """``dtype`` is one that matrices are multiplied in, or None."""
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"product_dtype must be fp32, bf16 or fp16, got {dtype}")


def check_shape(name: str, tensor: Tensor, expected: Mapping[str, int | None]) -> None:
    """``tensor`` has one axis per entry of ``expected``: letter to size, None where any size from 1 will do."""
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(expected) and all(
        have == want if want is not None else have > 0 for have, want in zip(sizes, expected.values(), strict=True)
    )
    if not fits:
        letters = ", ".join(f"{letter}>0" if want is None else f"{letter}={want}" for letter, want in expected.items())
        raise ValueError(f"{name} must have shape [{letters}], got {list(sizes)}")


def check_together(tokens: Tensor, others: Iterable[tuple[str, Tensor]]) -> None:
    """Everything is on the tokens' device, and fp64 is everywhere or nowhere.

    Half, bfloat16 and single precision mix freely, because all of them are computed in single precision.
    """
    for name, tensor in others:
        if tensor.device != tokens.device:
            raise ValueError(f"{name} must be on the tokens' device {tokens.device}, got {tensor.device}")
        if tensor.dtype.is_floating_point and (tensor.dtype == torch.float64) != (tokens.dtype == torch.float64):
            raise TypeError(f"{name} is {tensor.dtype} but the tokens are {tokens.dtype}: fp64 does not mix")


def check_weights(tokens: Tensor, weights: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    """The named tuple ``weights`` has these shapes, is as wide as the tokens, and is where they are.

    Its first field is the square projection of the tokens, by which the other shapes are judged.
    """
    width = tokens.shape[-1]
    named = [(f"weights.{name}", weight) for name, weight in zip(type(weights)._fields, weights, strict=True)]
    check_shape(named[0][0], named[0][1], {"D": width, "D'": width})
    for (name, weight), shape in zip(named, shapes, strict=True):
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(weight.shape)}")
    check_together(tokens, named)


def check_sizes(**sizes: int) -> None:
    """Each size is a whole number of at least 1, which fits 63 bits."""
    for name, size in sizes.items():
        if not _is_whole(size):
            raise ValueError(f"{name} must be a whole number, at least 1, got {size!r}")
        if not 1 <= size < 2**63:
            raise ValueError(f"{name} must be at least 1{' and below 2**63' * (size > 0)}, got {size}")


def check_sample_shape(name: str, shape: Any, letters: Iterable[str]) -> None:
    """``shape`` is that of one sample: as many sizes, each at least 1, as one of ``letters`` has, such as ``"CHW"``."""
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    whole = all(_is_whole(size) and 1 <= size < 2**63 for size in sizes)
    if len(sizes) not in map(len, letters) or not whole:
        forms = " or ".join(f"({', '.join(each)}{',' * (len(each) == 1)})" for each in letters)
        raise ValueError(f"{name} must be {forms}, whole numbers of at least 1, got {shape!r}")


def check_not_negative(**values: float) -> None:
    """Each value is finite and at least zero."""
    for name, value in values.items():
        if not (_is_finite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def check_positive(**values: float) -> None:
    """Each value is finite and above zero."""
    for name, value in values.items():
        if not (_is_finite(value) and value > 0):
            raise ValueError(f"{name} must be finite and positive, got {value!r}")


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):  # no number, or one that no float holds
        return False
