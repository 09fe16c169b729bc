"""What the attention surrogate attends to: flat features, the positions of a map, or a reduction of either."""

import pytest
import torch
from attention_surrogates import batch, gradient_of, surrogate
from torch import nn

import cem

REDUCED = [
    (8, {}, lambda: cem.linear_reduction(16, 8)),
    (8, {}, lambda: cem.conv_reduction((4, 2, 2), 2)),
    (2, {"num_heads": 2, "spatial": True}, lambda: cem.conv_reduction((4, 2, 2), 2)),
]
reductions = pytest.mark.parametrize(("width", "options", "make"), REDUCED, ids=["linear", "conv", "spatial conv"])


# positions of a map


def test_spatial_tokens_are_the_positions_of_a_map_whatever_their_order():
    maps, labels = batch(width=4 * 6)
    maps = maps.view(24, 4, 2, 3)
    module = surrogate(4, spatial=True).eval()
    assert module.slot_attention.slot_dim == 4
    torch.testing.assert_close(module(maps.transpose(2, 3).contiguous(), labels), module(maps, labels))


def test_spatial_tokens_of_one_position_are_flat_ones():
    features, labels = batch()
    spatial = surrogate(spatial=True).eval()
    spatial.load_state_dict(surrogate().state_dict(), strict=True)
    assert spatial(features.view(24, 16, 1, 1), labels) == surrogate().eval()(features, labels)


@pytest.mark.parametrize("shape", [(3, 16), (3, 2, 2, 4)])
def test_spatial_tokens_need_a_map_of_as_many_channels(shape):
    with pytest.raises(ValueError, match=r"spatial tokens need a map \[B, C, H, W\] with C = feature_dim = 4, got"):
        surrogate(4, spatial=True)(torch.randn(shape), torch.zeros(3, dtype=torch.long))


# reductions


def test_a_linear_reduction_is_a_matrix_times_the_flattened_features():
    reduction, maps = cem.linear_reduction(16, 3), torch.randn(5, 4, 2, 2)
    (weight,) = reduction.parameters()
    assert weight.shape == (3, 16)
    torch.testing.assert_close(reduction(maps), maps.flatten(1) @ weight.T)
    assert torch.equal(reduction(maps.flatten(1)), reduction(maps))


def test_a_conv_reduction_is_a_matrix_times_the_channels_at_every_position():
    reduction, maps = cem.conv_reduction((4, 2, 3), 2), torch.randn(5, 4, 2, 3)
    (weight,) = reduction.parameters()
    assert weight.shape == (2, 4, 1, 1)
    torch.testing.assert_close(reduction(maps), torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], maps))
    assert torch.equal(reduction(maps.flatten(1)), reduction(maps))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cem.linear_reduction(0, 8), "feature_dim must be at least 1, got 0"),
        (lambda: cem.linear_reduction(8, 0), "width must be at least 1, got 0"),
        (lambda: cem.conv_reduction((0, 2, 2), 2), "C must be at least 1, got 0"),
        (lambda: cem.conv_reduction((4, 2, 2), 0), "channels must be at least 1, got 0"),
    ],
)
def test_a_reduction_of_nothing_or_to_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@reductions
def test_a_reduced_surrogate_is_one_of_reduced_features(width, options, make):
    features, labels = batch()
    module = surrogate(width, reduction=make(), **options).eval()
    plain = surrogate(width, **options).eval()
    plain.load_state_dict({n: t for n, t in module.state_dict().items() if not n.startswith("reduction.")})
    assert module.slot_attention.slot_dim == width
    torch.testing.assert_close(module(features, labels), plain(module.reduction(features), labels))
    assert module(features.view(24, 4, 2, 2), labels) == module(features, labels)


@reductions
def test_a_reduction_adds_one_weight_that_is_trained_and_nothing_else(width, options, make):
    features, labels = batch()
    module = surrogate(width, reduction=make(), **options)
    (added,) = set(module.state_dict()) - set(surrogate(width, **options).state_dict())
    assert added.startswith("reduction.")
    module(features, labels)[0].backward()
    assert module.get_parameter(added).grad.any()


@reductions
def test_the_loss_reaches_features_through_a_reduction(width, options, make):
    _, gradient = gradient_of(surrogate(width, reduction=make(), **options), *batch())
    assert gradient.any()


@reductions
def test_autocast_does_not_change_a_reduction(width, options, make):
    features, labels = batch()
    module = surrogate(width, reduction=make(), **options).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(features, labels)
    assert found == module(features, labels)


def test_bf16_features_keep_their_spread_in_a_reduction():
    features, labels = batch(200)
    center = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    narrow = (center[labels] + 0.05 * features).bfloat16()  # what is left inside a class when training succeeds
    module = surrogate(8, reduction=cem.linear_reduction(16, 8), threshold=1e-5, eps_var=1e-6).eval()
    found, want = (gradient_of(module, narrow.to(dtype), labels)[1].float() for dtype in (torch.bfloat16, torch.float))
    assert want.any()
    assert float((found - want).norm() / want.norm()) < 0.005  # bf16 rounds by 0.4 %


def test_any_module_reduces():
    features, labels = batch()
    halves = nn.Sequential(nn.Unflatten(1, (8, 2)), nn.AvgPool1d(2), nn.Flatten())
    found = surrogate(8, reduction=halves).eval()(features, labels)
    torch.testing.assert_close(found, surrogate(8).eval()(features.view(24, 8, 2).mean(2), labels))


def test_a_reduction_to_another_width_than_that_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"a sample must have feature_dim=16 features, got \[24, 8\]"):
        surrogate(16, reduction=cem.linear_reduction(16, 8))(*batch())
