"""Slot attention in Triton against the reference in fp64, in both regimes: with one program for a class's tokens, and
with tokens split over programs."""

import pytest
import torch
from exactness import (
    DEVICE,
    HOLES,
    assert_as_exact,
    assert_close_to_exact,
    every_labeling,
    interpreted,
    last_program_first,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, assert_same, labels_with_holes, slot_problem

from cem_kernels import ClassGroups, SlotAttentionWeights
from cem_kernels.slot_attention import triton as kernels
from cem_kernels.slot_attention.reference import slot_attention as reference

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

SEEDS = range(2)


@pytest.fixture(params=[False, True], ids=["whole", "split"])
def regime(request, monkeypatch):
    monkeypatch.setattr(kernels, "tokens_are_split", lambda x, groups: request.param)
    return request.param


def in_own_precision(problem: Problem, groups: ClassGroups) -> Problem:
    """The same leaves for a reference with every operand and result in their dtype."""

    def run(backend, tokens, slots, **weights):
        return (reference(tokens, slots, groups, SlotAttentionWeights(**weights), 2, 1e-8).float(),)

    return Problem(problem.leaves, run)


@every_labeling
@pytest.mark.parametrize(("regime", "tokens_per_sample"), [(False, 1), (True, 3)], indirect=["regime"])
def test_as_exact_as_the_reference(regime, labels, num_classes, tokens_per_sample):
    # A third iteration would magnify rounding so much that luck decides.
    assert_as_exact(*(slot_problem(labels, num_classes, T=tokens_per_sample, D=16, S=4, seed=s) for s in SEEDS))


@pytest.mark.usefixtures("regime")
@pytest.mark.parametrize(("D", "S", "J"), [(16, 1, 3), (48, 5, 2), (64, 17, 1), (128, 8, 2), (32, 32, 1)])
def test_as_exact_for_every_number_of_slots_and_width(D, S, J):
    assert_as_exact(slot_problem(labels_with_holes(7, 4).to(DEVICE), 4, T=2, D=D, S=S, J=J))


@pytest.mark.parametrize(("D", "S"), [(200, 7), (512, 2)])
def test_as_exact_for_wide_tokens(D, S):
    assert_as_exact(slot_problem(torch.tensor([1, 0, 1], device=DEVICE), 2, T=2, D=D, S=S, J=1))


@pytest.mark.usefixtures("regime")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_exact_in_half_precision(dtype):
    problems = [slot_problem(HOLES, 7, T=3, D=32, S=4, seed=s) for s in range(3)]
    groups = ClassGroups.from_labels(HOLES, 7)
    assert_as_exact(*problems, dtype=dtype, own_precision=tuple(in_own_precision(p, groups) for p in problems))


@pytest.mark.usefixtures("regime")
def test_as_exact_where_a_program_has_several_tiles_of_tokens():
    assert_as_exact(slot_problem(HOLES % 2, 2, T=8, D=16, S=8))


def test_as_exact_with_a_hidden_layer_of_any_width():
    problem = slot_problem(HOLES, 7, D=16, S=4)
    narrow = {name: leaf for name, leaf in problem.leaves.items() if not name.startswith("mlp_in")}
    narrow |= {"mlp_in_weight": problem.leaves["mlp_in_weight"][:21], "mlp_in_bias": problem.leaves["mlp_in_bias"][:21]}
    narrow["mlp_out_weight"] = problem.leaves["mlp_out_weight"][:, :21]
    assert_as_exact(Problem(narrow, problem.run))


@settings(max_examples=8, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), max_size=40),
    T=st.integers(1, 4),
    D=st.integers(16, 24),
    S=st.integers(1, 6),
    J=st.integers(1, 2),
)
def test_as_exact_for_any_labels(labels, T, D, S, J):
    labels = torch.tensor(labels, dtype=torch.long, device=DEVICE)
    assert_close_to_exact(slot_problem(labels, 5, T=T, D=D, S=S, J=J))


def test_both_regimes_agree(monkeypatch):
    problem = slot_problem(HOLES, 7, T=4, D=32, S=8)
    leaves = {name: leaf.float() for name, leaf in problem.leaves.items()}
    found = []
    for split in (False, True):
        monkeypatch.setattr(kernels, "tokens_are_split", lambda x, groups, split=split: split)
        found.append(problem.results("triton", **leaves))
    assert_same(found[1], found[0], tolerance=1e-5)


def test_tokens_split_give_the_same_bits_twice(monkeypatch):
    monkeypatch.setattr(kernels, "tokens_are_split", lambda x, groups: True)
    problem = slot_problem(HOLES % 2, 2, T=8, D=16, S=4)
    leaves = {name: leaf.float() for name, leaf in problem.leaves.items()}
    first, second = problem.results("triton", **leaves), problem.results("triton", **leaves)
    assert all(torch.equal(first[name], second[name]) for name in first)


@interpreted
def test_the_order_in_which_programs_arrive_changes_no_bit(monkeypatch):
    monkeypatch.setattr(kernels, "tokens_are_split", lambda x, groups: True)
    monkeypatch.setattr(kernels, "TOKENS_OF_A_PART", 16)
    problem = slot_problem(HOLES % 2, 2, T=8, D=16, S=4)
    leaves = {name: leaf.float() for name, leaf in problem.leaves.items()}
    forwards = problem.results("triton", **leaves)
    last_program_first(monkeypatch)
    backwards = problem.results("triton", **leaves)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


@pytest.mark.parametrize(
    ("samples", "tokens", "groups", "split"),
    [(128, 1, 5, False), (512, 1, 50, False), (1024, 64, 5, True), (1024, 64, 500, False), (1, 6000, 1, True)],
)
def test_tokens_are_split_where_one_program_a_class_would_leave_the_device_idle(samples, tokens, groups, split):
    assert kernels.tokens_are_split(torch.empty(samples, tokens, 128, device="meta"), groups) is split


def test_slots_of_a_class_without_samples_stay_as_they_are():
    labels = torch.tensor([0, 0, 2], device=DEVICE)
    problem = slot_problem(labels, 3, D=16, S=4)
    (slots,) = problem.run("triton", **{name: leaf.float() for name, leaf in problem.leaves.items()})
    assert torch.equal(slots[1], problem.leaves["slots"][1].float())
