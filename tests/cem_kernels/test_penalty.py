"""What a variance costs: values worked by hand, thresholds that move, digits at small variances, refusals."""

import dataclasses
import math

import pytest
import torch
from exactness import DEVICE

from cem_kernels import ClassGroups, LogHinge, Nats, RunningMoments
from cem_kernels.variance import centroid_variance, class_variance

BACKENDS = ["reference", "eager", "triton"]


def test_nats_of_a_variance_as_large_as_the_noise_are_half_a_bit():
    assert Nats(0.3).cost(torch.tensor(0.09, dtype=torch.float64)).item() == pytest.approx(math.log(2) / 2)


def test_log_hinge_costs_nothing_up_to_the_threshold_and_the_logarithm_beyond():
    cost = LogHinge(0.5, gamma=1e-6).cost(torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64))
    assert cost.tolist() == pytest.approx([0.0, 0.0, math.log(2 + 1e-6) - math.log(0.5 + 1e-6)])


def test_softplus_is_the_smooth_form_of_the_same():
    cost = LogHinge(0.5, hinge="softplus").cost(torch.tensor([0.5, 50.0], dtype=torch.float64))
    assert cost.tolist() == pytest.approx([math.log(2), math.log1p(100)], rel=1e-5)


def test_no_gradient_reaches_a_variance_below_the_floor():
    variance = torch.tensor([1e-5, 1e-3], requires_grad=True)
    LogHinge(1e-8, floor=1e-4, hinge="softplus").cost(variance).sum().backward()
    assert variance.grad[0] == 0
    assert variance.grad[1] > 0


@pytest.mark.parametrize("penalty", [Nats(0.1), LogHinge(0.1)])
def test_penalties_do_not_change(penalty):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(penalty, dataclasses.fields(penalty)[0].name, 1.0)


def two_columns(v: float, dtype: torch.dtype) -> torch.Tensor:
    """Two samples of a class whose unbiased variance is ``v`` to the last bits, in both columns."""
    away = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) * math.sqrt(v / 2)
    return away.expand(2, 2).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [1e-8, 1e-5, 1e-2])
def test_nats_keep_their_digits_where_the_variance_is_small_against_the_noise(backend, ratio):
    """``log(v + σ²) − log(σ²)`` would have lost all of them in fp32 at 1e-8, and three at 1e-5."""
    groups = ClassGroups.from_labels(torch.zeros(2, dtype=torch.long, device=DEVICE), 1)
    features = two_columns(ratio * 0.01, torch.float32)
    exact = class_variance(features.double(), groups, Nats(0.1), backend="reference").rob_loss
    found = class_variance(features, groups, Nats(0.1), backend=backend).rob_loss
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    assert exact.item() == pytest.approx(0.5 * math.log1p(ratio), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
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


REFUSED = [
    (lambda: Nats(0.0), "noise_std must be finite and positive, got 0.0"),
    (lambda: LogHinge(0.0), "threshold must be finite and positive, got 0.0"),
    (lambda: LogHinge(float("nan")), "threshold must be finite and positive, got nan"),
    (lambda: LogHinge(torch.ones(2)), r"threshold must have shape \[\], got \[2\]"),
    (lambda: LogHinge(0.1, floor=-1.0), "floor must be finite and positive, got -1.0"),
    (lambda: LogHinge(0.1, gamma=float("inf")), "gamma must be finite and positive, got inf"),
    (lambda: LogHinge(0.1, hinge="elu"), "hinge must be one of relu, softplus, got 'elu'"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_penalty_that_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_number_in_place_of_a_penalty_is_refused():
    groups = ClassGroups.from_labels(torch.zeros(2, dtype=torch.long), 1)
    with pytest.raises(TypeError, match="penalty must be Nats or LogHinge, got float"):
        class_variance(torch.randn(2, 2), groups, 0.1)
