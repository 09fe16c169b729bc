"""How the attention surrogate is built for a run, what trains its parameters, and where its penalty begins."""

import math

import pytest
import torch
from small_surrogates import attention, batch, build

import cem
from cem.errors import UsageError
from cem.surrogates.threshold import coupled_threshold
from cem.training.weighted import gradients_of

Options = cem.SlotCrossAttentionCEM.Options


def built(feature_shape=(8, 2, 2), backend="auto", **options):
    return build("attention", options, feature_shape=feature_shape, backend=backend)


@pytest.mark.parametrize(
    ("option", "value", "where"),
    [
        ("num_slots", 3, lambda module: module.slot_attention.num_slots),
        ("spatial", True, lambda module: module.spatial),
        ("threshold", 0.25, lambda module: module.threshold),
        ("eps_var", 1e-3, lambda module: module.penalty.floor),
        ("gamma", 0.01, lambda module: module.penalty.gamma),
        ("hinge", "softplus", lambda module: module.penalty.hinge),
        ("dropout", 0.25, lambda module: module.cross_attention.dropout),
        ("trained", "shared", lambda module: module.trained),
    ],
)
def test_build_hands_an_option_through(option, value, where):
    assert where(built(**{option: value})) == value != where(built())


def test_build_takes_classes_noise_and_backend_from_the_run():
    module = built(backend="reference", var_threshold=0.2)
    assert (module.num_classes, module.threshold) == (5, pytest.approx(0.2 * 0.5**2))
    assert module.backend == module.slot_attention.backend == module.cross_attention.backend == "reference"


def test_build_without_options_is_the_original():
    original = cem.SlotCrossAttentionCEM(32, num_classes=5, reg_strength=0.5)
    module = built()
    module.load_state_dict(original.state_dict(), strict=True)
    features, labels = batch(width=32)
    assert module.eval()(features, labels) == original.eval()(features, labels)
    assert (module.schedule, Options.weight) == ("constant", 0.05)


@pytest.mark.parametrize(
    ("options", "start", "end"),
    [
        ({"ramp_from": 0.2}, 0.2, 0.025),
        ({"ramp_from": 0.2, "threshold": 0.1}, 0.2, 0.1),
        ({"ramp_from": 0.2, "var_threshold": 0.4}, 0.2, 0.1),
    ],
)
def test_build_makes_a_ramp_to_the_threshold_that_there_would_be(options, start, end):
    ramp = built(**options).threshold
    assert isinstance(ramp, cem.Ramp)
    assert (ramp.start, ramp.end) == pytest.approx((start, end))


@pytest.mark.parametrize(
    ("feature_shape", "reduction", "spatial", "width", "weight"),
    [
        ((512,), "auto", False, 512, None),
        ((513,), "auto", False, 128, [128, 513]),
        ((8, 8, 8), "auto", False, 512, None),
        ((16, 8, 8), "auto", False, 128, [128, 1024]),
        ((16, 8, 8), "auto", True, 16, None),
        ((16, 8, 8), "none", False, 1024, None),
        ((64,), "linear16", False, 16, [16, 64]),
        ((8, 2, 2), "conv6", False, 24, [6, 8]),
        ((8, 2, 2), "conv6", True, 6, [6, 8]),
    ],
)
def test_build_makes_tokens_of_a_width(feature_shape, reduction, spatial, width, weight):
    module = built(feature_shape, reduction=reduction, spatial=spatial)
    assert module.feature_dim == module.slot_attention.slot_dim == width
    found = [list(p.shape[:2]) for name, p in module.named_parameters() if name.startswith("reduction.")]
    assert found == ([weight] if weight else [])


@pytest.mark.parametrize(("width", "heads"), [(9, 1), (10, 2), (12, 4), (16, 4)])
def test_build_takes_as_many_heads_as_a_token_allows(width, heads):
    assert built((width,)).cross_attention.num_heads == heads


@pytest.mark.parametrize(
    ("feature_shape", "options", "message"),
    [
        ((64,), {"spatial": True}, r"spatial tokens and conv reductions need features \(C, H, W\), got \(64,\)"),
        ((64,), {"reduction": "conv4"}, r"need features \(C, H, W\), got \(64,\)"),
        ((8, 2, 2), {"spatial": True, "reduction": "linear4"}, "needs a map, which --attention.reduction linear4 is"),
    ],
)
def test_build_refuses_positions_of_what_is_no_map(feature_shape, options, message):
    with pytest.raises(UsageError, match=message):
        built(feature_shape, **options)


@pytest.mark.parametrize("reduction", ["linear", "linear0", "conv-4", "pool4", "128", "none4", "Linear8", "linear8 "])
def test_a_reduction_that_cannot_be_read_is_refused(reduction):
    message = f"--attention.reduction takes auto, none, linearN or convN, got '{reduction}'"
    with pytest.raises(UsageError, match=message):
        built(reduction=reduction)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, 0) for option in ("num_slots", "threshold", "ramp_from", "eps_var", "gamma", "trained")),
        *[("var_threshold", -0.1), ("hinge", "identity"), ("dropout", 1.0), ("trained", "slowly")],
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option, value):
    with pytest.raises(UsageError, match=f"--attention.{option.replace('_', '-')} .* got '?{value}"):
        built(**{option: value})


# what trains its parameters


@pytest.mark.parametrize("trained", ["frozen", "shared", 1e-4])
def test_parameters_are_trained_by_nothing_by_the_network_s_optimizer_or_by_an_adam_of_their_own(trained):
    module, (features, labels) = built(trained=trained, reduction="linear8"), batch(width=32)
    answer = gradients_of(module, cem.Batch(None, labels, features, features))
    assert answer.features_grad.any()
    parameters = [id(each) for each in module.parameters()]
    assert len(answer.own_grads) == sum(each.requires_grad for each in module.parameters())
    assert len(answer.own_grads) == (0 if trained == "frozen" else len(parameters))
    assert [id(each) for each in module.shared_parameters()] == (parameters if trained == "shared" else [])
    groups = {name: adam.param_groups[0] for name, adam in module.optimizers().items()}
    found = {name: (group["lr"], [id(each) for each in group["params"]]) for name, group in groups.items()}
    assert found == ({"adam": (1e-4, parameters)} if trained == 1e-4 else {})


# where the penalty begins


def moved(ramp, epoch, epochs=5):
    ramp.before_epoch(epoch, epochs)
    return ramp().item()


@pytest.mark.parametrize(("tau", "sigma"), [(0.1, 0.5), (2.0, 3.0), (0.1, 0.0), (0.0, 0.5), (0.1, 1e-5)])
@pytest.mark.filterwarnings("ignore:.*above the variance threshold")
def test_a_threshold_is_the_share_of_the_noise_and_at_least_its_floor(tau, sigma):
    expected = max(tau * sigma**2, 1e-8)
    assert coupled_threshold(tau, sigma) == expected
    assert attention(var_threshold=tau, reg_strength=sigma).threshold == expected


def test_a_threshold_that_is_given_penalizes_as_the_noise_does_at_the_same_place():
    features, labels = batch()
    given = attention(threshold=0.8 * 0.5**2, reg_strength=7.0).eval()
    assert given(features, labels) == attention(var_threshold=0.8).eval()(features, labels)


def test_a_ramp_stands_at_its_start_until_there_is_a_penalty_and_at_its_end_if_there_is_one_epoch():
    ramp = cem.Ramp(0.2, 1e-3)
    assert ramp().item() == moved(ramp, -3) == moved(ramp, 0) == pytest.approx(0.2)
    assert moved(ramp, 0, epochs=1) == pytest.approx(1e-3)


@pytest.mark.parametrize(("start", "end"), [(0.1, 1e-3), (1e-3, 0.1), (1, 2)])
def test_a_ramp_moves_in_place_by_equal_factors(start, end):
    ramp = cem.Ramp(start, end)
    held, levels = ramp(), []
    for epoch in range(5):
        ramp.before_epoch(epoch, 5)
        levels.append(held.item())
    assert levels == pytest.approx([start * (end / start) ** (epoch / 4) for epoch in range(5)])
    assert (list(ramp.state_dict()), held.dtype) == (["level"], torch.float32)


def test_a_ramp_penalizes_more_the_further_it_has_come_and_as_its_end_does():
    features, labels = batch(200)
    module = attention(threshold=cem.Ramp(0.05, 0.025)).eval()
    losses = []
    for epoch in range(3):
        module.before_epoch(epoch, 3)
        losses.append(module(features, labels)[0].item())
    assert losses == sorted(losses)
    # All variances are above both.
    assert losses[2] - losses[0] == pytest.approx(math.log((0.05 + 1e-6) / (0.025 + 1e-6)), abs=1e-5)
    assert losses[2] == pytest.approx(attention(threshold=0.025).eval()(features, labels)[0].item(), abs=1e-6)


def test_a_ramp_prints_where_it_begins_and_ends():
    assert "(threshold): Ramp(0.04, 0.0001)" in repr(attention(threshold=cem.Ramp(0.04, 1e-4), eps_var=1e-5))


@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
def test_a_ramp_from_or_to_what_is_no_variance_is_refused(value):
    for name, ends in {"start": (value, 0.1), "end": (0.1, value)}.items():
        with pytest.raises(ValueError, match=f"{name} must be finite and positive, got {value}"):
            cem.Ramp(*ends)
