"""How the attention surrogate is built for a run, and what trains its parameters."""

import pytest
import torch
from attention_surrogates import batch

import cem
from cem.errors import UsageError
from cem.training.weighted import gradients_of

Options = cem.SlotCrossAttentionCEM.Options


def built(feature_shape=(8, 2, 2), backend="auto", **options):
    context = cem.Context(feature_shape, (3, 32, 32), num_classes=5, noise_std=0.5, backend=backend)
    return cem.SURROGATES.build("attention", context, Options(**options).checked("attention."))


def weight_of(reduction):
    (weight,) = reduction.parameters()
    return list(weight.shape[:2])


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
    assert (module.schedule, Options.weight) == ("rising", 16.0)


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


# width of a token


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
    assert (None if module.reduction is None else weight_of(module.reduction)) == weight


@pytest.mark.parametrize("options", [{"reduction": "linear8"}, {"reduction": "conv2"}, {"spatial": True}])
def test_what_is_built_measures_features_of_the_run(options):
    rob_loss, _ = built(**options)(torch.randn(24, 8, 2, 2), batch()[1])
    assert rob_loss.item() > 0


@pytest.mark.parametrize(("width", "heads"), [(9, 1), (10, 2), (12, 4), (16, 4)])
def test_build_takes_as_many_heads_as_a_token_allows(width, heads):
    assert built((width,)).cross_attention.num_heads == heads


@pytest.mark.parametrize("options", [{"spatial": True}, {"reduction": "conv4"}])
def test_build_refuses_positions_of_flat_features(options):
    message = r"spatial tokens and conv reductions need features \(C, H, W\), got \(64,\)"
    with pytest.raises(UsageError, match=message):
        built((64,), **options)


def test_build_refuses_positions_of_a_linear_reduction():
    message = "--attention.spatial needs a map, which --attention.reduction linear4 is not"
    with pytest.raises(UsageError, match=message):
        built(spatial=True, reduction="linear4")


@pytest.mark.parametrize("reduction", ["linear", "linear0", "conv-4", "pool4", "128", "none4", "Linear8", "linear8 "])
def test_a_reduction_that_cannot_be_read_is_refused(reduction):
    message = f"--attention.reduction takes auto, none, linearN or convN, got '{reduction}'"
    with pytest.raises(UsageError, match=message):
        built(reduction=reduction)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_slots", 0),
        ("var_threshold", -0.1),
        ("threshold", 0.0),
        ("ramp_from", 0.0),
        ("eps_var", 0.0),
        ("gamma", 0.0),
        ("hinge", "identity"),
        ("dropout", 1.0),
        ("trained", 0.0),
        ("trained", "slowly"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option, value):
    with pytest.raises(UsageError, match=f"--attention.{option.replace('_', '-')} .* got '?{value}"):
        built(**{option: value})


# what trains its parameters


def asked(module):
    """What the module says of its parameters, and how many of them a step has gradients for."""
    features, labels = batch(width=32)
    answer = gradients_of(module, cem.Batch(None, labels, features, features))
    assert answer.features_grad.any()
    return module.optimizers(), module.shared_parameters(), len(answer.own_grads)


def test_frozen_parameters_are_trained_by_nothing():
    assert asked(built()) == ({}, [], 0)
    assert not any(each.requires_grad for each in built().parameters())


def test_shared_parameters_are_trained_by_the_optimizer_of_the_network():
    module = built(trained="shared", reduction="linear8")
    optimizers, shared, own = asked(module)
    assert optimizers == {}
    assert list(map(id, shared)) == list(map(id, module.parameters()))
    assert own == len(shared)


def test_a_learning_rate_trains_all_parameters_by_an_adam_of_their_own():
    module = built(trained=1e-4, reduction="linear8")
    optimizers, shared, own = asked(module)
    (group,) = optimizers["adam"].param_groups
    assert (list(optimizers), group["lr"], shared) == (["adam"], 1e-4, [])
    assert list(map(id, group["params"])) == list(map(id, module.parameters()))
    assert own == len(group["params"])


def test_the_other_surrogates_have_nothing_to_train():
    context = cem.Context((8,), (3, 32, 32), num_classes=5, noise_std=0.5)
    for name in set(cem.SURROGATES) - {"attention"}:
        module = cem.SURROGATES.build(name, context)
        assert (list(module.parameters()), module.optimizers(), module.shared_parameters()) == ([], {}, [])
