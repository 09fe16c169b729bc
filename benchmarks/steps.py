"""A variant's work as calls without arguments, one for each copy of the inputs, ready for a clock or a capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.operators import Call, Case
from benchmarks.operators.base import as_upstream

Tensors = tuple[Tensor, ...]
Step = Callable[[], Tensors]


def steps_of(call: Call, case: Case, direction: str, copies: int) -> Sequence[Step]:
    """``forward`` keeps what a backward needs; ``backward`` runs on graphs made here; ``both`` is one after the other.

    Each returns what it has written, so that a capture which keeps the results writes each to its own address.
    """
    sets = case.copies(copies)
    if direction == "forward":
        return [partial(call, *leaves) for leaves, _ in sets]
    if direction == "backward":
        graphs = [(call(*leaves), leaves, upstream) for leaves, upstream in sets]
        return [partial(backward, outputs, leaves, as_upstream(u, outputs)) for outputs, leaves, u in graphs]
    outputs = call(*sets[0][0])  # only for their dtypes: casting upstream gradients is no part of anybody's work
    return [partial(both, call, leaves, as_upstream(upstream, outputs)) for leaves, upstream in sets]


def backward(outputs: Tensors, leaves: Tensors, upstream: Tensors) -> Tensors:
    return torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def both(call: Call, leaves: Tensors, upstream: Tensors) -> Tensors:
    return torch.autograd.grad(call(*leaves), leaves, upstream)


def keep_buffers() -> None:
    """Let compiled backwards run again on one graph (``retain_graph``), which donated buffers forbid."""
    import torch._functorch.config as config

    if hasattr(config, "donated_buffer"):
        config.donated_buffer = False
