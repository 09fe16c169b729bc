"""Where the penalty of a log-variance begins, and a ramp that moves this place over epochs."""

import itertools
import math

import pytest
import torch
from attention_surrogates import batch, surrogate

import cem
from cem.surrogates.threshold import coupled_threshold


def moved(ramp, epoch, epochs=5):
    ramp.before_epoch(epoch, epochs)
    return ramp().item()


@pytest.mark.parametrize(("tau", "sigma"), [(0.1, 0.5), (2.0, 3.0), (0.1, 0.0), (0.0, 0.5), (0.1, 1e-5)])
@pytest.mark.filterwarnings("ignore:.*above the variance threshold")
def test_a_threshold_is_the_share_of_the_noise_and_at_least_its_floor(tau, sigma):
    expected = max(tau * sigma**2, 1e-8)
    assert coupled_threshold(tau, sigma) == expected
    assert surrogate(var_threshold=tau, reg_strength=sigma).threshold == expected


@pytest.mark.parametrize("sigma", [0.1, 0.5, 10.0])
def test_a_threshold_that_is_given_ignores_the_noise(sigma):
    assert surrogate(threshold=0.3, reg_strength=sigma).threshold == 0.3


def test_a_threshold_that_is_given_penalizes_as_the_noise_does_at_the_same_place():
    features, labels = batch()
    given = surrogate(threshold=0.8 * 0.5**2, reg_strength=7.0).eval()
    assert given(features, labels) == surrogate(var_threshold=0.8).eval()(features, labels)


def test_only_a_threshold_that_moves_is_in_the_state_dict():
    fixed, ramp = surrogate(threshold=0.3).state_dict(), surrogate(threshold=cem.Ramp(0.3, 0.1)).state_dict()
    assert set(fixed) == set(surrogate().state_dict())
    assert set(ramp) - set(fixed) == {"threshold.level"}


# ramp


def test_a_ramp_stands_at_its_start_until_there_is_a_penalty():
    ramp = cem.Ramp(0.2, 1e-3)
    assert ramp().item() == moved(ramp, -3) == moved(ramp, 0) == pytest.approx(0.2)


def test_a_ramp_ends_in_the_last_epoch():
    assert moved(cem.Ramp(0.2, 1e-3), 4) == pytest.approx(1e-3)


def test_a_ramp_of_a_single_epoch_is_at_its_end():
    assert moved(cem.Ramp(0.2, 1e-3), 0, epochs=1) == pytest.approx(1e-3)


@pytest.mark.parametrize(("start", "end"), [(0.1, 1e-3), (1e-3, 0.1), (1, 2)])
def test_a_ramp_moves_by_equal_factors(start, end):
    ramp = cem.Ramp(start, end)
    levels = [moved(ramp, epoch) for epoch in range(5)]
    factors = [later / earlier for earlier, later in itertools.pairwise(levels)]
    assert factors == pytest.approx([(end / start) ** (1 / 4)] * 4)


def test_a_ramp_follows_the_epoch_and_not_the_number_of_calls():
    often, once = cem.Ramp(0.2, 1e-3), cem.Ramp(0.2, 1e-3)
    for epoch in (0, 4, 3, 2, 2):
        moved(often, epoch)
    assert moved(once, 2) == often().item()


def test_a_ramp_moves_in_place_for_whoever_holds_on_to_its_level():
    ramp = cem.Ramp(0.2, 1e-3)
    held = ramp()
    ramp.before_epoch(4, 5)
    assert held.item() == pytest.approx(1e-3)


def test_a_ramp_penalizes_more_the_further_it_has_come_and_as_its_end_does():
    features, labels = batch(200)
    module = surrogate(threshold=cem.Ramp(0.05, 0.025)).eval()
    losses = []
    for epoch in range(3):
        module.before_epoch(epoch, 3)
        losses.append(module(features, labels)[0].item())
    assert losses == sorted(losses)
    # All variances are above both.
    assert losses[2] - losses[0] == pytest.approx(math.log((0.05 + 1e-6) / (0.025 + 1e-6)), abs=1e-5)
    assert losses[2] == pytest.approx(surrogate(threshold=0.025).eval()(features, labels)[0].item(), abs=1e-6)


def test_a_ramp_continues_from_a_state_dict():
    module, other = (surrogate(threshold=cem.Ramp(0.05, 0.01)).eval() for _ in range(2))
    module.before_epoch(1, 3)
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other.threshold(), module.threshold())
    assert other.threshold().item() != pytest.approx(0.05)
    assert other(*batch()) == module(*batch())


def test_epochs_move_no_other_threshold():
    module = surrogate()
    module.before_epoch(2, 3)
    assert module.threshold == 0.025


def test_a_ramp_prints_where_it_begins_and_ends():
    assert repr(cem.Ramp(0.04, 1e-4)) == "Ramp(0.04, 0.0001)"
    assert "(threshold): Ramp(0.04, 0.01)" in repr(surrogate(threshold=cem.Ramp(0.04, 0.01)))


def test_the_level_of_a_ramp_is_in_single_precision():
    assert cem.Ramp(1, 2)().dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
def test_a_ramp_from_or_to_what_is_no_variance_is_refused(value):
    for name, ends in {"start": (value, 0.1), "end": (0.1, value)}.items():
        with pytest.raises(ValueError, match=f"{name} must be finite and positive, got {value}"):
            cem.Ramp(*ends)
