"""Samples labeled −100 do not count, in any operator and backend: they change nothing and get exact zeros back."""

import pytest
import torch
from exactness import DEVICE
from problems import OPERATORS, PENALTIES, Problem, labels_with_holes, variance_problem

from cem_kernels import IGNORED, ClassGroups

LABELS = labels_with_holes(23, 7)
AWAY = torch.tensor([0, 7, 8, 22])
KEPT = torch.tensor([i for i in range(23) if i not in AWAY.tolist()])
every_operator = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
every_backend = pytest.mark.parametrize("backend", ["reference", "eager", "triton"])

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


def with_holes(label: int = IGNORED) -> torch.Tensor:
    return LABELS.clone().index_fill_(0, AWAY, label).to(DEVICE)


def of_kept(make, **sizes) -> tuple[Problem, Problem]:
    """A problem with samples that do not count, which hold NaN and infinity, and the same without these samples."""
    holes, plain = make(with_holes(), 7, D=16, **sizes), make(LABELS[KEPT].to(DEVICE), 7, D=16, **sizes)
    name = next(iter(holes.leaves))
    leaves = {n: t.float() for n, t in holes.leaves.items()}
    leaves[name][AWAY[:2]] = float("nan")
    leaves[name][AWAY[2:]] = float("inf")
    fewer = leaves | {name: leaves[name][KEPT]}
    return Problem(leaves, holes.run), Problem(fewer, plain.run)


def assert_ignored(holes: Problem, plain: Problem, backend: str) -> None:
    name = f"gradient of {next(iter(holes.leaves))}"
    found, want = holes.results(backend), plain.results(backend)
    assert found[name][AWAY].eq(0).all()
    for each, expected in want.items():
        rows = found[each][KEPT] if found[each].shape[:1] == (23,) else found[each]
        torch.testing.assert_close(rows, expected, rtol=2e-4, atol=2e-5, msg=lambda text, each=each: f"{each}: {text}")


@every_operator
@every_backend
@pytest.mark.parametrize("T", [1, 3])
def test_ignored_samples_change_nothing_and_get_zeros_back(make, backend, T):
    holes, plain = of_kept(make, T=T)
    # Upstream gradients are drawn by shape, which for one output a sample differs: there every one is one.
    if make is OPERATORS["cross_attention"]:
        for problem in (holes, plain):
            run = problem.run
            problem.run = lambda backend, run=run, **leaves: (run(backend, **leaves)[0].square().sum(),)
    assert_ignored(holes, plain, backend)


@every_backend
def test_output_of_an_ignored_sample_is_zero(backend):
    holes, _ = of_kept(OPERATORS["cross_attention"], T=2)
    (out,) = holes.run(backend, **holes.leaves)
    assert out[AWAY].eq(0).all()
    assert out[KEPT].isfinite().all()


@every_backend
def test_upstream_gradient_of_an_ignored_sample_reaches_no_weight(backend):
    holes, _ = of_kept(OPERATORS["cross_attention"], T=2)
    leaves = {n: t.clone().requires_grad_() for n, t in holes.leaves.items()}
    (out,) = holes.run(backend, **leaves)
    grads = torch.autograd.grad(out[AWAY].sum(), list(leaves.values()), allow_unused=True)
    assert all(grad is None or grad.eq(0).all() for grad in grads)


@every_operator
@every_backend
def test_a_batch_of_nothing_but_ignored_samples_gives_zeros(make, backend):
    problem = make(torch.full((5,), IGNORED, device=DEVICE), 3, D=16)
    found = problem.results(backend, **{n: t.float() for n, t in problem.leaves.items()})
    assert found[f"gradient of {next(iter(problem.leaves))}"].eq(0).all()
    assert all(value.isfinite().all() for value in found.values())


@every_operator
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("label", [-7, 7, 2**40])
def test_label_out_of_range_is_ignored_where_values_are_not_read(make, backend, label, monkeypatch):
    problem = make(with_holes(), 7, T=2, D=16)
    leaves = {n: t.float() for n, t in problem.leaves.items()}
    want = problem.results(backend, **leaves)
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    found = make(with_holes(label), 7, T=2, D=16, bound=23).results(backend, **leaves)
    for name, expected in want.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", [-1, -101, 7])
def test_any_other_label_out_of_range_is_an_error_where_values_are_read(label):
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\), or be -100 where a sample does not count"):
        ClassGroups.from_labels(with_holes(label).cpu(), 7)


DTYPES = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_of_any_integer_dtype_are_cast_at_the_door(dtype):
    groups, want = ClassGroups.from_labels(LABELS.to(dtype), 7), ClassGroups.from_labels(LABELS, 7)
    assert torch.equal(groups.order, want.order)
    assert groups.labels.dtype == torch.int64


def test_a_large_unsigned_label_is_not_taken_for_the_ignored_one():
    labels = torch.tensor([1, 2**64 - 100], dtype=torch.uint64)
    with pytest.raises(ValueError, match="labels must lie in"):
        ClassGroups.from_labels(labels, 7)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())
def test_ignored_samples_are_zero_for_every_penalty_where_tokens_are_many(penalty):
    labels = (torch.arange(700) % 3).masked_fill(torch.arange(700) % 7 == 0, IGNORED).to(DEVICE)
    problem = variance_problem(labels, 4, D=40, penalty=penalty)
    gradient = problem.results("triton", features=problem.leaves["features"].float())["gradient of features"]
    assert gradient[labels == IGNORED].eq(0).all()
    assert gradient.isfinite().all()


def test_ignored_rows_come_last_in_the_order():
    groups = ClassGroups.from_labels(torch.tensor([1, -100, 0, -100, 1]), 3)
    assert groups.order.tolist() == [2, 0, 4, 1, 3]
    assert groups.offsets.tolist() == [0, 1, 3, 3]
    assert groups.counts.tolist() == [1, 2, 0]
