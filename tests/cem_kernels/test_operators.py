"""What each operator promises beyond agreeing with its reference."""

import math

import pytest
import torch
from problems import cross_problem, labels_with_holes, slot_problem, variance_problem

from cem_kernels import ClassGroups, CrossAttentionWeights, LogHinge
from cem_kernels.cross_attention import cross_attention
from cem_kernels.variance import class_variance

both_backends = pytest.mark.parametrize("backend", ["eager", "reference"])


@both_backends
def test_class_without_samples_keeps_its_slots(backend):
    problem = slot_problem(torch.tensor([1, 1, 1]), 3)
    (slots,) = problem.run(backend, **problem.leaves)
    assert torch.equal(slots[[0, 2]], problem.leaves["slots"][[0, 2]])
    assert not torch.equal(slots[1], problem.leaves["slots"][1])


@both_backends
def test_slot_attention_stays_finite_for_extreme_tokens(backend):
    problem = slot_problem(labels_with_holes(12, 5), 5, dtype=torch.float32)
    (slots,) = problem.run(backend, **(problem.leaves | {"tokens": problem.leaves["tokens"] * 1e18}))
    assert slots.isfinite().all()


@both_backends
def test_closed_gates_leave_the_tokens_alone(backend):
    problem = cross_problem(labels_with_holes(12, 5), 5)
    shut = {
        "alpha_xattn": torch.zeros((), dtype=torch.float64),
        "alpha_ffn": torch.zeros((), dtype=torch.float64),
    }
    (out,) = problem.run(backend, **(problem.leaves | shut))
    assert torch.equal(out, problem.leaves["tokens"])


def dropped(backend: str, dropout: float) -> torch.Tensor:
    """Cross attention whose FFN is shut, minus its input: the gated, dropped read."""
    labels = labels_with_holes(200, 5)
    problem = cross_problem(labels, 5, D=16, seed=1)
    weights = CrossAttentionWeights(**{n: t for n, t in problem.leaves.items() if n not in ("tokens", "slots")})
    weights = weights._replace(alpha_ffn=torch.zeros((), dtype=torch.float64))
    torch.manual_seed(0)
    tokens = problem.leaves["tokens"]
    groups = ClassGroups.from_labels(labels, 5)
    return (
        cross_attention(tokens, problem.leaves["slots"], groups, weights, num_heads=4, dropout=dropout, backend=backend)
        - tokens
    )


def test_dropout_drops_its_share_and_scales_the_rest():
    kept, plain = dropped("eager", 0.25), dropped("eager", 0.0)
    zero = kept.abs() < 1e-12
    assert 0.22 < float(zero.double().mean()) < 0.28
    torch.testing.assert_close(kept[~zero], plain[~zero] / 0.75, rtol=1e-9, atol=1e-9)


def test_dropout_is_the_same_draw_in_both_backends():
    torch.testing.assert_close(dropped("eager", 0.25), dropped("reference", 0.25), rtol=1e-9, atol=1e-9)


@both_backends
def test_class_variance_of_a_case_worked_by_hand(backend):
    features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 5.0]], dtype=torch.float64)
    groups = ClassGroups.from_labels(torch.tensor([0, 0, 1]), 2)
    result = class_variance(features, groups, LogHinge(0.5, floor=1e-4, gamma=1e-6), backend=backend)
    # Class 0: variances 2 and 0; the second column is floored and below the threshold. Class 1: one sample.
    penalty = 0.5 * (math.log(2 + 1e-6) - math.log(0.5 + 1e-6))
    assert result.class_penalty.tolist() == pytest.approx([penalty, 0.0])
    assert result.class_mse.tolist() == pytest.approx([0.5, 0.0])
    assert float(result.rob_loss) == pytest.approx(penalty)
    assert float(result.intra_mse) == pytest.approx(0.5)


@both_backends
def test_losses_weight_classes_by_their_samples(backend):
    labels = torch.tensor([0] * 3 + [1] * 6)
    problem = variance_problem(labels, 2)
    rob_loss, intra_mse, penalty, mse = problem.run(backend, **problem.leaves)
    assert float(rob_loss) == pytest.approx(float(penalty @ torch.tensor([3.0, 6.0]).double() / 9))
    assert float(intra_mse) == pytest.approx(float(mse @ torch.tensor([3.0, 6.0]).double() / 9))


@both_backends
def test_no_class_with_enough_samples_gives_an_attached_zero(backend):
    features = torch.randn(4, 3, requires_grad=True)
    groups = ClassGroups.from_labels(torch.arange(4), 4)
    result = class_variance(features, groups, LogHinge(0.1), backend=backend)
    assert result.rob_loss.item() == 0
    assert result.intra_mse.item() == 0
    (result.rob_loss + result.intra_mse).backward()
    assert torch.equal(features.grad, torch.zeros(4, 3))


@both_backends
def test_variance_survives_a_mean_a_million_times_its_spread(backend):
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(64, 4, generator=generator)
    groups = ClassGroups.from_labels(torch.zeros(64, dtype=torch.long), 1)
    shifted = (spread * 0.5 + 1e5).float()
    exact = class_variance(shifted.double(), groups, LogHinge(1e-3), backend="reference")
    found = class_variance(shifted, groups, LogHinge(1e-3), backend=backend)
    assert float(found.rob_loss) == pytest.approx(float(exact.rob_loss), rel=1e-4)


@both_backends
def test_variance_below_its_floor_has_no_gradient(backend):
    features = (torch.randn(8, 3) * 1e-4).requires_grad_()
    groups = ClassGroups.from_labels(torch.zeros(8, dtype=torch.long), 1)
    class_variance(features, groups, LogHinge(1e-6, floor=1e-4), backend=backend).rob_loss.backward()
    assert torch.equal(features.grad, torch.zeros(8, 3))


@both_backends
def test_threshold_may_be_a_tensor_that_changes_in_place(backend):
    problem = variance_problem(labels_with_holes(20, 3), 3)
    groups = ClassGroups.from_labels(labels_with_holes(20, 3), 3)
    features, threshold = problem.leaves["features"], torch.tensor(0.05)
    want = class_variance(features, groups, LogHinge(0.2), backend=backend).rob_loss
    threshold.fill_(0.2)
    found = class_variance(features, groups, LogHinge(threshold), backend=backend).rob_loss
    torch.testing.assert_close(found, want, rtol=1e-7, atol=0)


def test_gradient_of_tight_classes_far_from_zero_keeps_its_digits_in_eager():
    """A mean rounded to fp32 is off by a part of the spread, and so is every distance to it: in the reference, 1e-4."""
    generator = torch.Generator().manual_seed(0)
    features = 3 + 1e-3 * torch.randn(60, 8, generator=generator)
    groups = ClassGroups.from_labels(torch.arange(60) % 3, 3)
    gradients = []
    for x, by in ((features.double(), "reference"), (features, "eager")):
        x = x.detach().requires_grad_()
        class_variance(x, groups, LogHinge(1e-8, floor=1e-9), backend=by).rob_loss.backward()
        gradients.append(x.grad)
    exact, found = gradients
    assert (found - exact).norm() < 1e-6 * exact.norm()


@both_backends
def test_every_axis_after_the_first_is_a_column(backend):
    labels = labels_with_holes(20, 3)
    groups = ClassGroups.from_labels(labels, 3)
    maps = torch.randn(20, 4, 3, 2)
    found = class_variance(maps, groups, LogHinge(0.1), backend=backend)
    want = class_variance(maps.flatten(1), groups, LogHinge(0.1), backend=backend)
    assert torch.equal(found.rob_loss, want.rob_loss)
