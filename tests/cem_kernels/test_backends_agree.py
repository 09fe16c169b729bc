"""Eager against the reference in fp64: outputs and every gradient, over shapes and labels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    OPERATORS,
    PENALTIES,
    Problem,
    assert_same,
    cross_problem,
    labels_with_holes,
    slot_problem,
    variance_problem,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from cem_kernels import ClassGroups

every_operator = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())

LABEL_CASES = {
    "holes in front, middle and back": (labels_with_holes(23, 7), 7),
    "one sample": (torch.tensor([2]), 4),
    "one class": (torch.zeros(9, dtype=torch.long), 1),
    "all in the last of many": (torch.full((6,), 11), 12),
    "more classes than samples": (torch.tensor([3, 17, 3, 29, 0]), 30),
    "one sample each": (torch.arange(5), 5),
}


def assert_agree(problem: Problem, tolerance: float = 1e-9) -> None:
    assert_same(problem.results("eager"), problem.results("reference"), tolerance)


@every_operator
@pytest.mark.parametrize(("labels", "num_classes"), LABEL_CASES.values(), ids=LABEL_CASES.keys())
@pytest.mark.parametrize("tokens_per_sample", [1, 3])
def test_eager_equals_reference(make, labels, num_classes, tokens_per_sample):
    assert_agree(make(labels, num_classes, T=tokens_per_sample))


@every_operator
def test_eager_equals_reference_under_a_static_bound(make):
    labels = labels_with_holes(23, 7)
    assert_agree(make(labels, 7, bound=23))


@pytest.mark.parametrize("S", [1, 3, 8])
@pytest.mark.parametrize("D", [1, 5, 16])
@pytest.mark.parametrize("J", [1, 3])
def test_slot_attention_agrees_for_odd_sizes(S, D, J):
    assert_agree(slot_problem(labels_with_holes(12, 5), 5, S=S, D=D, J=J))


@pytest.mark.parametrize("S", [1, 5])
@pytest.mark.parametrize(("D", "H"), [(5, 1), (7, 7), (12, 4), (9, 3)])
def test_cross_attention_agrees_for_odd_sizes(S, D, H):
    assert_agree(cross_problem(labels_with_holes(12, 5), 5, S=S, D=D, H=H))


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())
@pytest.mark.parametrize("min_samples", [2, 4])
def test_class_variance_agrees_for_every_penalty_and_minimum(penalty, min_samples):
    assert_agree(variance_problem(labels_with_holes(17, 6), 6, penalty=penalty, min_samples=min_samples))


@given(
    operator=st.sampled_from(sorted(OPERATORS)),
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=14),
    sizes=st.fixed_dictionaries({"T": st.integers(1, 3), "D": st.integers(1, 9)}),
    S=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_eager_equals_reference_for_any_labels_and_sizes(operator, labels, sizes, S, seed):
    if operator in ("slot_attention", "cross_attention"):
        sizes = {**sizes, "S": S}
    if operator == "cross_attention":
        sizes["H"] = 1 + seed % sizes["D"]
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


def strided(x):
    """The same values, every second column of a wider tensor."""
    wide = torch.randn(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


@every_operator
@pytest.mark.parametrize("relayout", [strided, lambda x: x.mT.contiguous().mT], ids=["strided", "transposed"])
def test_layout_of_any_input_changes_no_bit(make, relayout):
    problem = make(labels_with_holes(10, 5), 5, T=2, D=8)
    want = problem.run("eager", **problem.leaves)
    for name, leaf in problem.leaves.items():
        if leaf.dim() < 2:
            continue
        assert not relayout(leaf).is_contiguous()
        for found, expected in zip(
            problem.run("eager", **(problem.leaves | {name: relayout(leaf)})), want, strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@every_operator
def test_gradients_reach_expanded_inputs(make):
    problem = make(labels_with_holes(10, 5), 5, T=2, D=8)
    name, leaf = next(iter(problem.leaves.items()))
    one = leaf[:1].clone().requires_grad_()
    dense = leaf[:1].expand_as(leaf).contiguous().requires_grad_()
    for x in (one, dense):
        value = x.expand_as(leaf) if x is one else x
        sum(o.sum() for o in problem.run("eager", **(problem.leaves | {name: value}))).backward()
    torch.testing.assert_close(one.grad, dense.grad.sum(dim=0, keepdim=True), rtol=1e-11, atol=1e-11)


@every_operator
def test_expanded_upstream_gradient_equals_a_dense_one(make):
    problem = make(labels_with_holes(10, 5), 5)
    leaves = {n: t.clone().requires_grad_() for n, t in problem.leaves.items()}
    output = problem.run("eager", **leaves)[0]
    inputs = list(leaves.values())
    by_sum = torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True)
    dense = torch.autograd.grad(output, inputs, torch.ones_like(output).contiguous(), allow_unused=True)
    for found, want in zip(by_sum, dense, strict=True):
        assert (found is None) == (want is None)
        assert found is None or torch.equal(found, want)


@every_operator
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_permuting_the_samples_changes_nothing(make, backend):
    labels = labels_with_holes(19, 6)
    shuffle = torch.randperm(19, generator=torch.Generator().manual_seed(3))
    plain, shuffled = make(labels, 6, T=2), make(labels[shuffle], 6, T=2)
    name = next(iter(plain.leaves))
    want = plain.run(backend, **plain.leaves)
    found = shuffled.run(backend, **(plain.leaves | {name: plain.leaves[name][shuffle]}))
    for f, w in zip(found, want, strict=True):
        if w.shape[:1] == (19,):  # one row per sample
            w = w[shuffle]
        torch.testing.assert_close(f, w, rtol=1e-12, atol=1e-12)


def test_relabeling_classes_permutes_slots():
    labels = labels_with_holes(19, 6)
    relabel = torch.tensor([3, 0, 5, 1, 4, 2])
    plain, relabeled = slot_problem(labels, 6), slot_problem(relabel[labels], 6)
    (want,) = plain.run("eager", **plain.leaves)
    slots = torch.empty_like(plain.leaves["slots"])
    slots[relabel] = plain.leaves["slots"]
    (found,) = relabeled.run("eager", **(plain.leaves | {"slots": slots}))
    torch.testing.assert_close(found[relabel], want, rtol=1e-12, atol=1e-12)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_computed_in_fp32(make, dtype):
    problem = make(labels_with_holes(23, 7), 7, dtype=dtype)
    for found, want in zip(
        problem.run("eager", **problem.leaves),
        problem.run("reference", **{n: t.double() for n, t in problem.leaves.items()}),
        strict=True,
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)


@every_operator
def test_autocast_changes_nothing(make):
    problem = make(labels_with_holes(23, 7), 7, dtype=torch.float32)
    want = problem.results("eager")
    found = problem.results("eager", forward_under=torch.autocast("cpu", dtype=torch.bfloat16))
    for name in want:
        assert torch.equal(found[name], want[name]), name


@every_operator
def test_the_same_call_twice_gives_the_same_bits(make):
    problem = make(labels_with_holes(23, 7), 7, dtype=torch.float32)
    first, second = problem.results("eager"), problem.results("eager")
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_static_bound_needs_no_host_sync(operator, monkeypatch):
    # Fake tensors have shapes and no values: whatever reads a value, or makes a shape depend on one, raises. The
    # checks of values, which only the CPU does, are left out as they are on CUDA.
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    with FakeTensorMode():
        labels = torch.zeros(23, dtype=torch.long)
        problem = OPERATORS[operator](labels, 7, bound=20)
        results = problem.results("eager")
    assert len(results) > 1


def test_without_a_bound_eager_reads_one_number_for_all_operators(monkeypatch):
    labels = labels_with_holes(23, 7)
    groups = ClassGroups.from_labels(labels, 7)
    reads = []
    read = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: reads.append(1) or read(self))
    groups.pad(torch.randn(23, 2))
    groups.pad(torch.randn(23, 4))
    _ = groups.padding.mask
    assert len(reads) == 1
