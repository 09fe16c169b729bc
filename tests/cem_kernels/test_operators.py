"""What each operator promises beyond agreeing with its reference."""

import math

import pytest
import torch
from problems import DEVICE, cross_problem, few, labels_with_holes, slot_problem

from cem_kernels import ClassGroups, LogHinge
from cem_kernels.variance import class_variance

both_backends = pytest.mark.parametrize("backend", ["eager", "reference"])


@pytest.mark.parametrize("backend", ["eager", "reference", "triton"])
def test_class_without_samples_keeps_its_slots(backend):
    problem = few(slot_problem, torch.tensor([1, 1, 3], device=DEVICE))
    (slots,) = problem.run(backend, **problem.leaves)
    assert torch.equal(slots[[0, 2]], problem.leaves["slots"][[0, 2]])
    assert not torch.equal(slots[1], problem.leaves["slots"][1])


@both_backends
def test_slot_attention_stays_finite_for_extreme_tokens(backend):
    problem = few(slot_problem)
    (slots,) = problem.run(backend, **(problem.leaves | {"tokens": problem.leaves["tokens"] * 1e18}))
    assert slots.isfinite().all()


@both_backends
def test_closed_gates_leave_the_tokens_alone(backend):
    problem = few(cross_problem)
    shut = {name: torch.zeros((), device=DEVICE) for name in ("alpha_xattn", "alpha_ffn")}
    (out,) = problem.run(backend, **(problem.leaves | shut))
    assert torch.equal(out, problem.leaves["tokens"])


def dropped(backend: str, dropout: float) -> torch.Tensor:
    """Cross attention whose FFN is shut, minus its input: the gated, dropped read."""
    problem = cross_problem(labels_with_holes(200, 5), 5, D=16, seed=1, dropout=dropout)
    torch.manual_seed(0)
    shut = {"alpha_ffn": torch.zeros((), dtype=torch.float64)}
    return problem.run(backend, **(problem.leaves | shut))[0] - problem.leaves["tokens"]


def test_dropout_drops_its_share_scales_the_rest_and_is_the_same_draw_in_both_backends():
    kept, plain = dropped("eager", 0.25), dropped("eager", 0.0)
    zero = kept.abs() < 1e-12
    assert 0.22 < float(zero.double().mean()) < 0.28
    torch.testing.assert_close(kept[~zero], plain[~zero] / 0.75, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kept, dropped("reference", 0.25), rtol=1e-9, atol=1e-9)


@both_backends
def test_class_variance_of_a_case_worked_by_hand(backend):
    features = torch.tensor([[0.0, 1], [2, 1], [5, 5], [3, 0], [3, 4], [3, 4], [3, 0]], dtype=torch.float64)
    groups = ClassGroups.from_labels(torch.tensor([0, 0, 1, 2, 2, 2, 2]), 3)
    result = class_variance(features, groups, LogHinge(0.5, floor=1e-4, gamma=1e-6), backend=backend)
    # Class 0: variances 2 and 0; the second column is floored and below the threshold. Class 1: one sample, which does
    # not count. Class 2: variances 0 and 16/3.
    penalties = [0.5 * (math.log(v + 1e-6) - math.log(0.5 + 1e-6)) for v in (2, 16 / 3)]
    assert result.class_penalty.tolist() == pytest.approx([penalties[0], 0.0, penalties[1]])
    assert result.class_mse.tolist() == pytest.approx([0.5, 0.0, 2.0])
    assert float(result.rob_loss) == pytest.approx((2 * penalties[0] + 4 * penalties[1]) / 6)
    assert float(result.intra_mse) == pytest.approx((2 * 0.5 + 4 * 2.0) / 6)


@both_backends
def test_no_class_with_enough_samples_gives_an_attached_zero(backend):
    features = torch.randn(4, 3, requires_grad=True)
    groups = ClassGroups.from_labels(torch.arange(4), 4)
    result = class_variance(features, groups, LogHinge(0.1), backend=backend)
    assert (result.rob_loss.item(), result.intra_mse.item()) == (0, 0)
    (result.rob_loss + result.intra_mse).backward()
    assert torch.equal(features.grad, torch.zeros(4, 3))


def test_variance_of_tight_classes_far_from_zero_keeps_its_digits_in_eager():
    """A mean rounded to fp32 is off by a part of the spread, and so is every distance to it: in the reference, 1e-4."""
    features = 3 + 1e-3 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    groups = ClassGroups.from_labels(torch.arange(60) % 3, 3)
    losses, gradients = [], []
    for x, by in ((features.double(), "reference"), (features, "eager")):
        x = x.detach().requires_grad_()
        losses.append(class_variance(x, groups, LogHinge(1e-8, floor=1e-9), backend=by).rob_loss)
        losses[-1].backward()
        gradients.append(x.grad)
    exact, found = gradients
    assert (found - exact).norm() < 1e-6 * exact.norm()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)


@both_backends
def test_every_axis_after_the_first_is_a_column(backend):
    groups, maps = ClassGroups.from_labels(labels_with_holes(20, 3), 3), torch.randn(20, 4, 3, 2)
    found, want = (class_variance(x, groups, LogHinge(0.1), backend=backend) for x in (maps, maps.flatten(1)))
    assert torch.equal(found.rob_loss, want.rob_loss)
