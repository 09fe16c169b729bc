"""Decoders by name: any features to any image."""

from __future__ import annotations

import pytest
import torch

from cem.attacks.decoders import build_decoder

SHAPES = [
    ((8, 7, 7), (1, 28, 28)),
    ((64,), (3, 32, 32)),
    ((1,), (1, 1, 1)),
    ((8, 4, 4), (3, 48, 48)),
    ((3, 40, 40), (3, 32, 32)),
    ((5, 3, 7), (1, 30, 20)),
]


@pytest.mark.parametrize(("features", "image"), SHAPES)
@pytest.mark.parametrize("name", ["res_normN1C4", "deconvC4"])
def test_any_features_become_any_image(name: str, features: tuple[int, ...], image: tuple[int, int, int]) -> None:
    decoder = build_decoder(name, features, image)
    out = decoder(torch.randn(3, *features))
    assert out.shape == (3, *image)
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize(
    ("features", "image"),
    [
        ((8, 8, 8), (1, 30, 30)),
        ((4, 13, 13), (1, 50, 50)),
        ((64,), (1, 100, 100)),
        ((9, 1, 1), (1, 28, 28)),
        ((5, 3, 7), (1, 30, 20)),
        ((8, 7, 7), (1, 28, 28)),
        ((8, 8, 8), (1, 8, 8)),
    ],
)
def test_images_are_drawn_at_full_resolution(features: tuple[int, ...], image: tuple[int, int, int]) -> None:
    decoder = build_decoder("deconvC4", features, image).eval()
    before_resizing = decoder.layers(torch.randn(1, *features))
    assert all(drawn >= wanted for drawn, wanted in zip(before_resizing.shape[2:], image[1:], strict=True))


def test_a_size_that_no_doubling_hits_works_in_mixed_precision() -> None:
    decoder = build_decoder("deconvC4", (8, 8, 8), (1, 30, 30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoder(torch.randn(2, 8, 8, 8)).shape == (2, 1, 30, 30)


def test_res_norm_n8_c64_is_as_large_as_the_original() -> None:
    parameters = sum(p.numel() for p in build_decoder("res_normN8C64", (8, 8, 8), (3, 32, 32)).parameters())
    assert parameters == pytest.approx(0.71e6, rel=0.05)  # "0.71M parameters" in arXiv:2503.00383


@pytest.mark.parametrize(("small", "large"), [("res_normN4C32", "res_normN4C64"), ("res_normN4C32", "res_normN8C32")])
def test_numbers_in_the_name_set_depth_and_width(small: str, large: str) -> None:
    sizes = [sum(p.numel() for p in build_decoder(n, (8, 7, 7), (1, 28, 28)).parameters()) for n in (small, large)]
    assert sizes[0] < sizes[1] / 1.5


def test_every_parameter_takes_part() -> None:
    decoder = build_decoder("res_normN2C4", (6,), (1, 28, 28))
    decoder(torch.randn(4, 6)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", ["res_normN8", "resnet", "", "res_normN8C0", "deconvC64x", "res_normN-1C8"])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="decoder must be one of res_normN8C64"):
        build_decoder(name, (8, 7, 7), (1, 28, 28))


def test_features_that_are_neither_map_nor_vector_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features \(C, H, W\) or \(D,\), got \(3, 4\)"):
        build_decoder("deconvC4", (3, 4), (1, 28, 28))
