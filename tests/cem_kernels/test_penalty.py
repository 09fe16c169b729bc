"""What a variance costs: values worked by hand, thresholds that move, digits at small variances."""

import math

import pytest
import torch
from problems import DEVICE, centroid_problem, every_backend, every_penalty, few, variance_problem

from cem_kernels import ClassGroups, LogHinge, Nats
from cem_kernels.variance import class_variance


@pytest.mark.parametrize(
    ("penalty", "variances", "costs"),
    [
        (Nats(0.3), [0.0, 0.09], [0.0, math.log(2) / 2]),  # as large as the noise: half a bit
        (LogHinge(0.5, gamma=1e-6), [0.0, 0.5, 2.0], [0.0, 0.0, math.log(2 + 1e-6) - math.log(0.5 + 1e-6)]),
        (LogHinge(0.5, hinge="softplus"), [0.5, 50.0], [math.log(2), math.log1p(100)]),
    ],
)
def test_costs_worked_by_hand(penalty, variances, costs):
    assert penalty.cost(torch.tensor(variances, dtype=torch.float64)).tolist() == pytest.approx(costs, rel=1e-5)


@pytest.mark.parametrize("noise_std", [1e-25, 1e-170, 1e25, 1e170])
def test_noise_whose_variance_fp32_does_not_hold_is_refused(noise_std):
    with pytest.raises(ValueError, match="noise_std must have a square that fp32 holds"):
        Nats(noise_std)


def test_no_gradient_reaches_a_variance_below_the_floor():
    variance = torch.tensor([1e-5, 1e-3], requires_grad=True)
    LogHinge(1e-8, floor=1e-4, hinge="softplus").cost(variance).sum().backward()
    assert variance.grad[0] == 0
    assert variance.grad[1] > 0


@every_backend
@pytest.mark.parametrize("ratio", [1e-8, 1e-5, 1e-2])
def test_nats_keep_their_digits_where_the_variance_is_small_against_the_noise(backend, ratio):
    """``log(v + σ²) − log(σ²)`` would have lost all of them in fp32 at 1e-8, and three at 1e-5."""
    groups = ClassGroups.from_labels(torch.zeros(2, dtype=torch.long, device=DEVICE), 1)
    features = math.sqrt(ratio * 0.01 / 2) * torch.tensor([[1.0, 1.0], [-1.0, -1.0]], device=DEVICE)
    exact = class_variance(features.double(), groups, Nats(0.1), backend="reference").rob_loss
    found = class_variance(features, groups, Nats(0.1), backend=backend).rob_loss
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    assert exact.item() == pytest.approx(0.5 * math.log1p(ratio), rel=1e-5)


@every_backend
@pytest.mark.parametrize("make", [variance_problem, centroid_problem], ids=["class_variance", "centroid_variance"])
def test_a_threshold_that_is_a_tensor_is_read_at_every_call(make, backend):
    threshold = torch.tensor(0.1, device=DEVICE)
    moving, fixed = (few(make, penalty=LogHinge(at)) for at in (threshold, 0.4))
    before = moving.run(backend, **moving.leaves)[0]
    threshold.fill_(0.4)
    found, want = (problem.run(backend, **problem.leaves)[0] for problem in (moving, fixed))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
    assert found < before


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of inf − inf
@every_penalty
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_kernels_do_not_hide_what_is_not_finite_but_in_classes_that_do_not_count(bad, penalty):
    features = torch.randn(5, 16, device=DEVICE)
    features[0, 3] = features[4, 5] = bad
    features.requires_grad_()
    groups = ClassGroups.from_labels(torch.tensor([0, 0, 1, 1, 2], device=DEVICE), 3)
    result = class_variance(features, groups, penalty, backend="triton")
    assert result.class_penalty.isfinite().tolist() == [False, True, True]
    assert not result.rob_loss.isfinite()
    (gradient,) = torch.autograd.grad(result.class_penalty[1], features)
    assert gradient[2:].isfinite().all()
    assert gradient[2:].any(dim=1).tolist() == [True, True, False]
