"""How the attention surrogate is built from options."""

import pytest
from attention_surrogates import batch

import cem
from cem.surrogates.build import ORIGINAL, build_surrogate

COMMON = {"num_classes": 5, "noise_std": 0.5, "var_threshold": 0.1}


@pytest.mark.parametrize(
    ("option", "value", "where"),
    [
        ("measure", "slots", lambda module: module.measure),
        ("penalty", "entropy", lambda module: module.penalty),
        ("hinge", "softplus", lambda module: module.hinge),
        ("threshold", "quantile", lambda module: module.threshold.policy),
        ("threshold_value", 0.25, lambda module: module.threshold.value),
        ("threshold_quantile", 0.75, lambda module: module.threshold.quantile),
        ("eps_var", 1e-3, lambda module: module.eps_var),
        ("gamma", 0.01, lambda module: module.gamma),
        ("objective", "likelihood", lambda module: module.objective),
        ("memory_bank", 3, lambda module: module.bank.size),
        ("num_slots", 3, lambda module: module.slot_attention.num_slots),
        ("tokens", "spatial", lambda module: "spatial" if module.slot_attention.slot_dim == 8 else "flat"),
        ("reduce_dim", 5, lambda module: module.reduction.out_features),
        ("backend", "reference", lambda module: module.slot_attention.backend),
    ],
)
def test_build_hands_an_option_through(option, value, where):
    module = build_surrogate("attention", feature_shape=(8, 2, 2), **COMMON, **(ORIGINAL | {option: value}))
    assert where(module) == value


def test_build_hands_an_anchor_through():
    options = {"measure": "slots", "num_slots": 1, "anchor": 0.9}
    assert (
        build_surrogate("attention", feature_shape=(8, 2, 2), **COMMON, **(ORIGINAL | options)).anchors.momentum == 0.9
    )


def test_build_hands_conv1x1_through():
    options = {"reduce": "conv1x1", "reduce_dim": 6, "tokens": "spatial"}
    module = build_surrogate("attention", feature_shape=(8, 2, 2), **COMMON, **(ORIGINAL | options))
    assert module.reduction.weight.shape == (6, 8, 1, 1)
    assert module.slot_attention.slot_dim == 6


@pytest.mark.parametrize(
    ("option", "value", "plain"),
    [
        ("threshold", "fixed", 0.025),
        ("threshold_value", 0.25, 0.05),
    ],
)
def test_build_makes_a_threshold_that_is_used(option, value, plain):
    chosen = {"threshold": "fixed", "threshold_value": 0.05, **{option: value}}
    assert build_surrogate("attention", feature_shape=(8,), **COMMON, **(ORIGINAL | chosen)).threshold() != plain


def test_build_without_options_is_what_is_recommended():
    module = build_surrogate("attention", feature_shape=(16,), **COMMON)
    assert (module.measure, module.gamma, module.eps_var, module.anchors.momentum) == ("slots", 0.01, 1e-8, 0.99)
    assert list(module.parameters()) == []


def test_build_can_make_the_original():
    plain = build_surrogate("attention", feature_shape=(16,), **COMMON, **ORIGINAL)
    assert set(plain.state_dict()) == set(cem.SlotCrossAttentionCEM(16, reg_strength=0.5).state_dict())
    plain.load_state_dict(cem.SlotCrossAttentionCEM(16, reg_strength=0.5).state_dict(), strict=True)
    assert plain.threshold() == pytest.approx(0.025)
    assert plain.own_loss(*batch()) is None


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({"tokens": "spatial"}, 2),  # 6 channels
        ({"reduce": "conv1x1", "reduce_dim": 3}, 4),  # 3 channels at 4 positions
        ({"reduce": "conv1x1", "reduce_dim": 3, "tokens": "spatial"}, 1),
    ],
)
def test_build_takes_as_many_heads_as_a_token_allows(options, heads):
    module = build_surrogate("attention", feature_shape=(6, 2, 2), **COMMON, **(ORIGINAL | options))
    assert module.cross_attention.num_heads == heads


def test_build_reduces_no_spatial_tokens_of_its_own_accord():
    module = build_surrogate("attention", feature_shape=(16, 8, 8), **COMMON, **ORIGINAL, tokens="spatial")
    assert module.reduction is None


def test_build_refuses_spatial_tokens_of_flat_features():
    with pytest.raises(ValueError, match=r"spatial tokens need features of shape \(C, H, W\), got \(64,\)"):
        build_surrogate("attention", feature_shape=(64,), **COMMON, **ORIGINAL, tokens="spatial")


def test_build_refuses_to_reduce_spatial_tokens_linearly():
    with pytest.raises(ValueError, match=r"tokens='spatial' .* reduces with reduce='conv1x1' if at all"):
        build_surrogate("attention", feature_shape=(8, 2, 2), **COMMON, **ORIGINAL, tokens="spatial", reduce_dim=4)


@pytest.mark.parametrize(
    "options", [{"feature_shape": (8, 2, 2)}, {"feature_shape": (32,), "reduce_dim": 4}], ids=["to what", "of what"]
)
def test_build_refuses_conv1x1_without_channels(options):
    with pytest.raises(ValueError, match=r"reduce='conv1x1' needs reduce_dim and feature_shape=\(C, H, W\)"):
        build_surrogate("attention", **options, **COMMON, **ORIGINAL, reduce="conv1x1")


@pytest.mark.parametrize("option", ["measure", "penalty", "hinge", "threshold", "objective", "tokens", "reduce"])
def test_build_refuses_an_unknown_name(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'other'"):
        build_surrogate("attention", feature_shape=(8, 2, 2), **COMMON, **(ORIGINAL | {option: "other"}))
