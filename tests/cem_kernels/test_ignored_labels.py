"""Samples labeled −100 do not count, in any operator and backend: they change nothing and get exact zeros back."""

import pytest
import torch
from problems import (
    DEVICE,
    Problem,
    cross_problem,
    every_backend,
    every_operator,
    every_penalty,
    few,
    slot_problem,
    variance_problem,
)

from cem_kernels import IGNORED
from cem_kernels.slot_attention import triton as slot_kernels

LABELS = torch.tensor([IGNORED, 1, 3, 3, IGNORED, IGNORED, 1, 3, 1, IGNORED], device=DEVICE)
AWAY, KEPT = (LABELS == IGNORED).nonzero()[:, 0], (LABELS != IGNORED).nonzero()[:, 0]

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


def of_kept(make, **sizes) -> tuple[Problem, Problem]:
    """A problem with samples that do not count, which hold NaN and infinity, and the same without these samples."""
    holes, plain = few(make, LABELS, **sizes), few(make, LABELS[KEPT], **sizes)
    name = next(iter(holes.leaves))
    holes.leaves[name][AWAY[:2]] = float("nan")
    holes.leaves[name][AWAY[2:]] = float("inf")
    return holes, Problem(holes.leaves | {name: holes.leaves[name][KEPT]}, plain.run)


@every_operator
@every_backend
def test_ignored_samples_change_nothing_and_get_zeros_back(make, backend):
    holes, plain = of_kept(make, T=3)
    # Upstream gradients are drawn by shape, which for one output a sample differs: there every one is one.
    if make is cross_problem:
        for problem in (holes, plain):
            run = problem.run
            problem.run = lambda backend, run=run, **leaves: (run(backend, **leaves)[0].square().sum(),)
    found, want = holes.results(backend), plain.results(backend)
    assert found[f"gradient of {next(iter(holes.leaves))}"][AWAY].eq(0).all()
    for name, expected in want.items():
        rows = found[name][KEPT] if found[name].shape[:1] == LABELS.shape else found[name]
        torch.testing.assert_close(rows, expected, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_ignored_samples_get_zeros_back_where_tokens_are_split_over_programs(monkeypatch):
    monkeypatch.setattr(slot_kernels, "tokens_are_split", lambda x, groups: True)
    holes, _ = of_kept(slot_problem)
    found = holes.results("triton")
    assert found["gradient of tokens"][AWAY].eq(0).all()
    assert all(value.isfinite().all() for value in found.values())


@every_backend
def test_of_an_ignored_sample_the_output_is_zero_and_no_upstream_gradient_reaches_a_weight(backend):
    holes, _ = of_kept(cross_problem, T=2)
    leaves = {n: t.clone().requires_grad_() for n, t in holes.leaves.items()}
    (out,) = holes.run(backend, **leaves)
    assert out[AWAY].eq(0).all()
    assert out[KEPT].isfinite().all()
    grads = torch.autograd.grad(out[AWAY].sum(), list(leaves.values()), allow_unused=True)
    assert all(grad is None or grad.eq(0).all() for grad in grads)


@every_operator
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_gradient_on_the_way_is_nan_for_ignored_samples(make):
    problem = few(make, LABELS, T=3)
    with torch.autograd.detect_anomaly(check_nan=True):
        problem.results("eager")


@every_operator
@every_backend
def test_a_batch_of_nothing_but_ignored_samples_gives_zeros(make, backend):
    problem = few(make, torch.full((5,), IGNORED, device=DEVICE))
    found = problem.results(backend)
    assert found[f"gradient of {next(iter(problem.leaves))}"].eq(0).all()
    assert all(value.isfinite().all() for value in found.values())


@every_operator
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_labels_out_of_range_are_ignored_where_values_are_not_read(make, backend, monkeypatch):
    want = few(make, LABELS).results(backend)
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    outside = LABELS.index_copy(0, AWAY, torch.tensor([-7, 4, 2**40, IGNORED], device=DEVICE))
    for name, each in few(make, outside, bound=7).results(backend).items():
        torch.testing.assert_close(each, want[name], rtol=1e-4, atol=1e-5)


@every_penalty
def test_ignored_samples_are_zero_for_every_penalty_where_tokens_are_many(penalty):
    labels = (torch.arange(300) % 2).masked_fill(torch.arange(300) % 7 == 0, IGNORED).to(DEVICE)
    problem = variance_problem(labels, 3, D=40, penalty=penalty)
    gradient = problem.results("triton", features=problem.leaves["features"].float())["gradient of features"]
    assert gradient[labels == IGNORED].eq(0).all()
    assert gradient.isfinite().all()
