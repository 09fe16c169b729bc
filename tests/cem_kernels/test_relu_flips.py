"""Slot attention in bf16 where units of the MLP's hidden layer are so close to zero that rounding puts them on the
other side. The gradient of such a unit is there in one arithmetic and not in another, and where rows are few that is a
large part of a weight's: kernels are held to the reference among those that have the same units on.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import Calls, assert_as_exact
from problems import DEVICE, Problem, slot_problem
from torch import Tensor

from cem_kernels import ClassGroups, SlotAttentionWeights
from cem_kernels.slot_attention.reference import slot_attention as reference

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

LABELS, NUM_CLASSES = torch.tensor([0, 1, 0, 1, 1], device=DEVICE), 2
D, S, J = 32, 2, 2
# Truncation switches units in both of these, rounding to nearest in the last, and a reference in bf16 in none: not told
# what units are on, it is up to ten times as exact.
SEEDS = (2, 17)
PROBLEMS = [slot_problem(LABELS, NUM_CLASSES, T=2, D=D, S=S, J=J, seed=seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def units_on() -> list[Tensor]:
    """Which units the kernels have on, ``[K·J, S, hidden]`` of every problem, in the order of the reference."""
    found = []
    for problem in PROBLEMS:
        with Calls() as calls:
            problem.run("triton", **problem.to(torch.bfloat16).leaves)
        ((_, kept),) = calls.found.values()
        hidden = kept[2][..., 3 * D :].unflatten(1, (NUM_CLASSES, S))  # [J, K, S, hidden]
        found.append(hidden.transpose(0, 1).flatten(0, 1) > 0)
    return found


def told_units(problem: Problem, on: Tensor, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Problem:
    """``problem`` with the reference ``run``, which has the units ``on``."""

    def told(backend: str, **leaves: Tensor) -> tuple[Tensor, ...]:
        if backend == "triton":
            return problem.run(backend, **leaves)
        layers = iter(on)
        with monkeypatch.context() as patch:
            patch.setattr(F, "relu", lambda before: torch.where(next(layers), before, 0))
            return run(backend, **leaves)

    return Problem(problem.leaves, told)


def in_own_precision(backend: str, tokens: Tensor, slots: Tensor, **weights: Tensor) -> tuple[Tensor, ...]:
    groups = ClassGroups.from_labels(LABELS, NUM_CLASSES)
    return (reference(tokens, slots, groups, SlotAttentionWeights(**weights), J, 1e-8).float(),)


def test_as_exact_as_the_reference_with_the_same_units_on(units_on, monkeypatch):
    problems = list(zip(PROBLEMS, units_on, strict=True))
    wide = (told_units(problem, on, problem.run, monkeypatch) for problem, on in problems)
    own = tuple(told_units(problem, on, in_own_precision, monkeypatch) for problem, on in problems)
    assert_as_exact(*wide, dtype=torch.bfloat16, own_precision=own)


def test_units_that_rounding_switches_are_close_to_zero(units_on, monkeypatch):
    for problem, on in zip(PROBLEMS, units_on, strict=True):
        layers: list[Tensor] = []
        with monkeypatch.context() as patch:
            patch.setattr(F, "relu", lambda before, layers=layers: layers.append(before) or before.clamp(min=0))
            problem.run("reference", **problem.to(torch.bfloat16).to(torch.float64).leaves)
        before = torch.stack(layers)
        switched = on != (before > 0)
        assert (before[switched].abs() < torch.finfo(torch.bfloat16).eps / 2 * before.abs().max()).all()
        assert DEVICE == "cuda" or switched.any(), "nothing was tested"
