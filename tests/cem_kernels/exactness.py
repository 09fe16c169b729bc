"""The rule that kernels are held to: at most twice the error of the reference in the kernel's own precision.

Errors are Euclidean norms against the reference in fp64, tensor by tensor, outputs and every gradient.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from typing import Any

import pytest
import torch
from problems import DEVICE, Problem, assert_same, labels_with_holes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

HOLES = labels_with_holes(23, 7).to(DEVICE)

LABEL_CASES = {
    "holes in front, middle and back": (HOLES, 7),
    "one sample": (torch.tensor([2], device=DEVICE), 4),
    "one class": (torch.zeros(9, dtype=torch.long, device=DEVICE), 1),
    "all in the last of many": (torch.full((6,), 5, device=DEVICE), 6),
    "more classes than samples": (torch.tensor([3, 7, 3, 9, 0], device=DEVICE), 10),
    "one sample each": (torch.arange(5, device=DEVICE), 5),
    "no sample": (torch.zeros(0, dtype=torch.long, device=DEVICE), 3),
}
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="a device chooses the order of programs itself")
every_labeling = pytest.mark.parametrize(("labels", "num_classes"), LABEL_CASES.values(), ids=LABEL_CASES.keys())


def assert_as_exact(
    *problems: Problem, dtype: torch.dtype = torch.float32, own_precision: tuple[Problem, ...] = ()
) -> None:
    """Triton, with the leaves of ``problems`` rounded to ``dtype``, is as exact as the reference.

    Several problems that differ in their seed are judged together, and single numbers less strictly: what many terms
    add up to, like the gradient of a gate, comes out exact or not by luck. ``own_precision`` are the same problems with
    a reference that computes in ``dtype`` throughout, where backend "reference" does not.
    """
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    single = set()
    for problem, own in zip(problems, own_precision or problems, strict=True):
        rounded = {name: leaf.to(dtype) for name, leaf in problem.leaves.items()}
        exact = problem.results("reference", **{name: leaf.double() for name, leaf in rounded.items()})
        reference = own.results("reference", **rounded)
        found = problem.results("triton", **rounded)
        for name, want in exact.items():
            assert found[name].shape == want.shape, name
            assert found[name].isfinite().all(), f"{name} is not finite"
            norms = (found[name] - want).norm(), (reference[name] - want).norm(), want.norm()
            squares[name] += torch.stack(norms).double().cpu() ** 2
            if want.numel() == 1:
                single.add(name)
    # The interpreter truncates to bf16 where a device rounds, which doubles the error of a conversion by itself.
    factor = 2.0 if DEVICE == "cuda" or dtype != torch.bfloat16 else 4.0
    largest = max(float(square[2].sqrt()) for square in squares.values())
    for name, square in squares.items():
        error, allowed, scale = square.sqrt().tolist()
        # Where terms cancel for good, what rounding leaves of them is measured against the other tensors.
        scale = scale if scale > 1e-9 * largest else largest
        lucky = (256 if name in single else 16) * torch.finfo(torch.float32).eps * scale
        limit = factor * allowed + lucky + 1e-9
        assert error <= limit, f"{name}: error {error:.3g}, reference {allowed:.3g}, norm {scale:.3g}"


def assert_close_to_exact(problem: Problem) -> None:
    """Triton in fp32 and the reference in fp64 say the same, to a few parts in 10⁵ of a tensor's largest entry."""
    rounded = {name: leaf.float() for name, leaf in problem.leaves.items()}
    exact = problem.results("reference", **{name: leaf.double() for name, leaf in rounded.items()})
    assert_same({n: t.double() for n, t in problem.results("triton", **rounded).items()}, exact, tolerance=3e-5)


def last_program_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run the programs of every launch in the opposite order."""
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    choose = builder.set_grid_idx

    def from_the_end(*place: int) -> None:
        choose(*(size - 1 - at for size, at in zip(builder.grid_dim, place, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", from_the_end)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(found[name], want), name


class Calls(TorchDispatchMode):
    """The first call of every registered operator: its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **(kwargs or {}))
        if operator.namespace == "cem_kernels":
            self.found.setdefault(operator, (tree_map_only(Tensor, Tensor.detach, args), results))
        return results
