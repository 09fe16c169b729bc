"""Decoders by name: any features to any image."""

import pytest
import torch

from cem.attacks.networks import build_network

SHAPES = [
    ((8, 7, 7), (1, 28, 28)),
    ((64,), (3, 32, 32)),
    ((64,), (1, 100, 100)),
    ((1,), (1, 1, 1)),
    ((3, 40, 40), (3, 32, 32)),
    ((4, 13, 13), (1, 50, 50)),
    ((5, 3, 7), (1, 30, 20)),
]


@pytest.mark.parametrize(("features", "image"), SHAPES)
@pytest.mark.parametrize("name", ["preactN1C4", "res_normN1C4", "deconvC4"])
def test_any_features_become_any_image_at_full_resolution(name, features, image):
    decoder, z = build_network(name, features, image), torch.randn(3, *features)
    out = decoder(z)
    assert out.shape == (3, *image)
    assert out.min() >= 0
    assert out.max() <= 1
    before_resizing = decoder.layers(z)
    assert all(drawn >= wanted for drawn, wanted in zip(before_resizing.shape[2:], image[1:], strict=True))


def parameters(name, *shapes):
    return sum(each.numel() for each in build_network(name, *shapes).parameters())


def test_numbers_in_the_name_set_depth_and_width():
    large, shallow, narrow, small = (
        parameters(f"preact{size}", (8, 8, 8), (3, 32, 32)) for size in ("N8C64", "N4C64", "N8C32", "N4C32")
    )
    assert large > 1.5 * shallow > 1.5 * small
    assert large > 1.5 * narrow > 1.5 * small


def test_the_published_name_means_the_published_network_layer_for_layer():
    """``res_normN_AE`` of the code behind arXiv:2503.00383, with 8 blocks of 64 channels."""
    assert parameters("res_normN8C64", (8, 8, 8), (3, 32, 32)) == 711_539  # "0.71M"
    blocks = ["ResidualBlock", "ReLU"]
    doublings = ["ConvTranspose2d", "BatchNorm2d", "ReLU"]
    names = [type(each).__name__ for each in build_network("res_normN8C64", (8, 8, 8), (3, 32, 32)).layers]
    assert names == [*blocks * 9, *doublings * 2, "ResidualBlock"]
    names = [type(each).__name__ for each in build_network("res_normN2C64", (8, 16, 16), (3, 32, 32)).layers]
    assert names == [*blocks * 3, *doublings, *blocks, "ResidualBlock"]


@pytest.mark.parametrize("name", ["preactN8", "resnet", "", "res_normN8C0", "deconvC64x", "preactN-1C8"])
def test_unknown_names_and_features_of_no_map_or_vector_are_refused(name):
    with pytest.raises(ValueError, match="a network must be one of preactN8C64"):
        build_network(name, (8, 7, 7), (1, 28, 28))
    with pytest.raises(ValueError, match=r"feature_shape must be \(C, H, W\) or \(D,\), .* got \(3, 4\)"):
        build_network("deconvC4", (3, 4), (1, 28, 28))
