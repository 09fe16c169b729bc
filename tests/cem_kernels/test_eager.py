"""Eager against the reference in fp64, outputs and every gradient, and what it promises beyond its numbers."""

import pytest
import torch
from exactness import assert_same_bits, every_labeling
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    OPERATORS,
    PENALTIES,
    Problem,
    assert_same,
    cross_problem,
    every_operator,
    labels_with_holes,
    slot_problem,
    variance_problem,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from cem_kernels import ClassGroups

LABELS = labels_with_holes(19, 6)


def assert_agree(problem: Problem) -> None:
    assert_same(problem.results("eager"), problem.results("reference"))


@every_operator
@every_labeling
@pytest.mark.parametrize(("T", "bound"), [(1, None), (3, 23)])
def test_eager_equals_reference(make, labels, num_classes, T, bound):
    assert_agree(make(labels.cpu(), num_classes, T=T, bound=bound))


@given(
    operator=st.sampled_from(sorted(OPERATORS)),
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=14),
    sizes=st.fixed_dictionaries({"T": st.integers(1, 3), "D": st.integers(1, 12)}),
    S=st.integers(1, 8),
    J=st.integers(1, 3),
    penalty=st.sampled_from(sorted(PENALTIES)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_eager_equals_reference_for_any_labels_and_sizes(operator, labels, sizes, S, J, penalty, seed):
    if operator in ("class_variance", "centroid_variance"):
        sizes["penalty"] = PENALTIES[penalty]
    else:
        sizes["S"] = S
    if operator == "class_variance":
        sizes["min_samples"] = 2 + seed % 3
    if operator == "slot_attention":
        sizes["J"] = J
    if operator == "cross_attention":
        sizes["H"] = 1 + seed % min(sizes["D"], 8)
        sizes["D"] *= sizes["H"]
    assert_agree(OPERATORS[operator](torch.tensor(labels), 6, seed=seed, **sizes))


@pytest.mark.parametrize("make", [slot_problem, cross_problem, variance_problem])
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_gradcheck_and_gradgradcheck(make, backend):
    problem = make(torch.tensor([0, 2, 2, 0, 2]), 4, D=2)
    names = list(problem.leaves)
    leaves = [leaf.clone().requires_grad_() for leaf in problem.leaves.values()]

    def call(*args):
        return problem.run(backend, **dict(zip(names, args, strict=True)))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True, atol=1e-4)


@every_operator
def test_layout_of_any_input_changes_nothing(make):
    problem = make(LABELS, 6, T=2)
    want = dict(enumerate(problem.run("eager", **problem.leaves)))
    for name, leaf in problem.leaves.items():
        if leaf.dim() >= 2:
            turned = leaf.mT.contiguous().mT
            assert not turned.is_contiguous()
            found = problem.run("eager", **(problem.leaves | {name: turned}))
            assert_same(dict(enumerate(found)), want, tolerance=1e-13)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_computed_in_fp32(make, dtype):
    problem = make(LABELS, 6).to(dtype)
    exact = problem.run("reference", **problem.to(torch.float64).leaves)
    for found, want in zip(problem.run("eager", **problem.leaves), exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)


@every_operator
def test_neither_repetition_nor_autocast_changes_a_bit(make):
    problem = make(LABELS, 6).to(torch.float32)
    want = problem.results("eager")
    assert_same_bits(problem.results("eager"), want)
    assert_same_bits(problem.results("eager", forward_under=torch.autocast("cpu", dtype=torch.bfloat16)), want)


@every_operator
def test_a_static_bound_needs_no_host_sync(make, monkeypatch):
    # Fake tensors have shapes and no values: whatever reads a value, or makes a shape depend on one, raises. The
    # checks of values, which only the CPU does, are left out as they are on CUDA.
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    with FakeTensorMode():
        results = make(torch.zeros(23, dtype=torch.long), 7, bound=20).results("eager")
    assert len(results) > 1


def test_without_a_bound_eager_reads_one_number_for_all_operators(monkeypatch):
    groups = ClassGroups.from_labels(LABELS, 6)
    reads = []
    read = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: reads.append(1) or read(self))
    groups.pad(torch.randn(19, 2))
    groups.pad(torch.randn(19, 4))
    _ = groups.padding.mask
    assert len(reads) == 1
