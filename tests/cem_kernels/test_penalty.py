"""What a variance costs: values worked by hand, thresholds that move, digits at small variances."""

import math

import pytest
import torch
from problems import DEVICE, every_backend, every_penalty

from cem_kernels import ClassGroups, LogHinge, Nats, RunningMoments
from cem_kernels.variance import centroid_variance, class_variance


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
@pytest.mark.parametrize("of", ["classes", "centroids"])
def test_a_threshold_that_is_a_tensor_is_read_at_every_call(of, backend):
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    groups = ClassGroups.from_labels(torch.arange(12, device=DEVICE) % 3, 3)
    threshold = torch.tensor(0.1, device=DEVICE)
    penalty = LogHinge(threshold)

    def loss(penalty: LogHinge) -> float:
        if of == "classes":
            return class_variance(features, groups, penalty, backend=backend).rob_loss.item()
        zeros = torch.zeros(3, 4, device=DEVICE)
        running = RunningMoments(zeros, zeros.clone(), torch.zeros(3, dtype=torch.long, device=DEVICE))
        return centroid_variance(features, groups, running, penalty, backend=backend).rob_loss.item()

    before = loss(penalty)
    threshold.fill_(0.4)
    assert loss(penalty) == pytest.approx(loss(LogHinge(0.4)), rel=1e-6)
    assert loss(penalty) < before


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of inf − inf
@every_penalty
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden_by_kernels(bad, penalty):
    features = torch.randn(4, 16, device=DEVICE)
    features[0, 3] = bad
    groups = ClassGroups.from_labels(torch.tensor([0, 0, 1, 1], device=DEVICE), 2)
    result = class_variance(features, groups, penalty, backend="triton")
    assert result.class_penalty.isfinite().tolist() == [False, True]
    assert not result.rob_loss.isfinite()
