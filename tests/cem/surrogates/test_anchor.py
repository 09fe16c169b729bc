"""The attention surrogate around running centroids of the classes."""

import math

import pytest
import torch

import cem
from cem.surrogates.anchor import Anchors

MOMENTUM = 0.95


def batch(num_samples=24, width=6, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, width, generator=generator, dtype=torch.float64) + 3.0
    return features, torch.randint(0, num_classes, (num_samples,), generator=generator)


def surrogate(**kwargs):
    options = {"measure": "slots", "num_slots": 1, "num_classes": 4, "reg_strength": 0.5, "anchor": MOMENTUM, **kwargs}
    return cem.SlotCrossAttentionCEM(6, **options)


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.5, math.nan])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match="anchor must lie between 0 and 1"):
        Anchors(4, 6, momentum)


@pytest.mark.parametrize("options", [{}, {"penalty": "entropy"}, {"hinge": "softplus"}, {"gamma": 0.01}])
def test_the_first_batch_is_nearly_the_class_variance(options):
    x, labels = batch(4000)
    anchored, plain = surrogate(**options).double(), surrogate(anchor=0.0, **options).double()
    # But for n / (n - 1).
    assert [each.item() for each in anchored(x, labels)] == pytest.approx(
        [each.item() for each in plain(x, labels)], rel=1e-2
    )


def test_evaluation_measures_the_batch_alone_and_moves_nothing():
    x, labels = batch()
    module = surrogate().double()
    module(x, labels)
    before = {name: each.clone() for name, each in module.state_dict().items()}
    y, other = batch(seed=5)
    want = surrogate(anchor=0.0).double().eval()(y, other)
    torch.testing.assert_close(module.eval()(y, other), want)
    for name, each in module.state_dict().items():
        assert torch.equal(each, before[name]), name


def test_anchors_are_part_of_the_checkpoint():
    x, labels = batch()
    module, other = surrogate().double(), surrogate().double()
    module(x, labels)
    other.load_state_dict(module.state_dict())
    y, more = batch(seed=5)
    torch.testing.assert_close(other(y, more), module(y, more), rtol=0, atol=0)


def test_a_batch_of_one_sample_a_class_is_penalized_for_its_distance_to_the_anchors():
    x, labels = torch.eye(4, 6, dtype=torch.float64), torch.arange(4)
    module = surrogate().double()
    module(x, labels)
    away = (1.5 * x).requires_grad_()
    rob_loss, _ = module(away, labels)
    (gradient,) = torch.autograd.grad(rob_loss, away)
    assert rob_loss.item() > 0
    # Back toward where it was: along the class's own axis alone.
    assert torch.equal(gradient > 0, x > 0)


def test_an_empty_batch_gives_an_attached_zero():
    x = batch(0)[0].requires_grad_()
    rob_loss, intra_mse = surrogate().double()(x, torch.zeros(0, dtype=torch.long))
    (gradient,) = torch.autograd.grad(rob_loss, x)
    assert (rob_loss.item(), intra_mse.item(), gradient.shape) == (0.0, 0.0, (0, 6))


@pytest.mark.parametrize("options", [{"measure": "enhanced"}, {"num_slots": 2}, {"memory_bank": 4}])
def test_what_anchors_do_not_go_with_is_refused(options):
    message = "anchor needs measure='slots' and num_slots=1, and no memory_bank"
    with pytest.raises(ValueError, match=message):
        surrogate(**options)


def test_anchors_need_the_number_of_classes():
    with pytest.raises(ValueError, match="anchor needs num_classes"):
        surrogate(num_classes=None)


@pytest.mark.parametrize("options", [{"objective": "likelihood"}, {"reduce_dim": 3}])
def test_options_of_slots_are_refused_where_none_are_computed(options):
    with pytest.raises(ValueError, match="measure='slots' with num_slots=1 computes no slots"):
        surrogate(anchor=0.0, **options)
