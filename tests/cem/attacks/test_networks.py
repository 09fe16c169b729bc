"""Decoders by name: any features to any image."""

import pytest
import torch

from cem.attacks.decoders import build_decoder

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
@pytest.mark.parametrize("name", ["res_normN1C4", "deconvC4"])
def test_any_features_become_any_image_at_full_resolution(name, features, image):
    decoder, z = build_decoder(name, features, image), torch.randn(3, *features)
    out = decoder(z)
    assert out.shape == (3, *image)
    assert out.min() >= 0
    assert out.max() <= 1
    before_resizing = decoder.layers(z)
    assert all(drawn >= wanted for drawn, wanted in zip(before_resizing.shape[2:], image[1:], strict=True))


def test_numbers_in_the_name_set_depth_and_width():
    names = ("res_normN8C64", "res_normN4C64", "res_normN8C32", "res_normN4C32")
    large, shallow, narrow, small = (
        sum(p.numel() for p in build_decoder(name, (8, 8, 8), (3, 32, 32)).parameters()) for name in names
    )
    assert large == pytest.approx(0.71e6, rel=0.05)  # "0.71M parameters" in arXiv:2503.00383
    assert large > 1.5 * shallow > 1.5 * small
    assert large > 1.5 * narrow > 1.5 * small


@pytest.mark.parametrize("name", ["res_normN8", "resnet", "", "res_normN8C0", "deconvC64x", "res_normN-1C8"])
def test_unknown_names_and_features_of_no_map_or_vector_are_refused(name):
    with pytest.raises(ValueError, match="decoder must be one of res_normN8C64"):
        build_decoder(name, (8, 7, 7), (1, 28, 28))
    with pytest.raises(ValueError, match=r"feature_shape must be \(C, H, W\) or \(D,\), .* got \(3, 4\)"):
        build_decoder("deconvC4", (3, 4), (1, 28, 28))
