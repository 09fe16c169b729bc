"""What the attention surrogate attends to: flat features, the positions of a map, or a reduction of either."""

import pytest
import torch
from small_surrogates import attention, batch

import cem

REDUCED = [
    (8, {}, lambda: cem.linear_reduction(16, 8)),
    (8, {}, lambda: cem.conv_reduction((4, 2, 2), 2)),
    (2, {"num_heads": 2, "spatial": True}, lambda: cem.conv_reduction((4, 2, 2), 2)),
]


def test_spatial_tokens_are_the_positions_of_a_map_whatever_their_order():
    maps, labels = batch(width=4 * 6)
    maps = maps.view(24, 4, 2, 3)
    module = attention(4, spatial=True).eval()
    assert module.slot_attention.slot_dim == 4
    torch.testing.assert_close(module(maps.transpose(2, 3).contiguous(), labels), module(maps, labels))


def test_spatial_tokens_of_one_position_are_flat_ones():
    features, labels = batch()
    spatial = attention(spatial=True).eval()
    spatial.load_state_dict(attention().state_dict(), strict=True)
    assert spatial(features.view(24, 16, 1, 1), labels) == attention().eval()(features, labels)


@pytest.mark.parametrize("shape", [(3, 16), (3, 2, 2, 4)])
def test_spatial_tokens_need_a_map_of_as_many_channels(shape):
    with pytest.raises(ValueError, match=r"spatial tokens need a map \[B, C, H, W\] with C = feature_dim = 4, got"):
        attention(4, spatial=True)(torch.randn(shape), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    ("make", "product"),
    [
        (lambda: cem.linear_reduction(24, 3), lambda w, maps: maps.flatten(1) @ w.T),
        (lambda: cem.conv_reduction((4, 2, 3), 2), lambda w, maps: torch.einsum("ocij,bchw->bohw", w, maps)),
    ],
    ids=["linear", "conv"],
)
def test_a_reduction_is_a_matrix_times_the_features_or_the_channels_at_every_position(make, product):
    reduction, maps = make(), torch.randn(5, 4, 2, 3)
    torch.testing.assert_close(reduction(maps), product(*reduction.parameters(), maps))
    assert torch.equal(reduction(maps.flatten(1)), reduction(maps))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cem.linear_reduction(0, 8), "feature_dim must be at least 1, got 0"),
        (lambda: cem.linear_reduction(8, 0), "width must be at least 1, got 0"),
        (lambda: cem.conv_reduction((0, 2, 2), 2), r"feature_shape must be \(C, H, W\), .* got \(0, 2, 2\)"),
        (lambda: cem.conv_reduction((4, 2, 2), 0), "channels must be at least 1, got 0"),
    ],
)
def test_a_reduction_of_nothing_or_to_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("width", "options", "make"), REDUCED, ids=["linear", "conv", "spatial conv"])
def test_a_reduced_surrogate_is_one_of_reduced_features_with_one_weight_more(width, options, make):
    features, labels = batch()
    module = attention(width, reduction=make(), **options).eval()
    plain = attention(width, **options).eval()
    (added,) = set(module.state_dict()) - set(plain.state_dict())
    plain.load_state_dict({name: tensor for name, tensor in module.state_dict().items() if name != added})
    torch.testing.assert_close(module(features, labels), plain(module.reduction(features), labels))
    module(features, labels)[0].backward()
    assert module.get_parameter(added).grad.any()


def test_a_reduction_to_another_width_than_that_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"a sample must have feature_dim=16 features, got \[24, 8\]"):
        attention(16, reduction=cem.linear_reduction(16, 8))(*batch())
