"""Scores of reconstructions, image by image, on [0, 1]."""

import pytest
import torch
from torch.nn import functional as F

from cem.attacks.metrics import best, score_images, ssim, ssim_window


def pair(*shape, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(*shape, generator=generator)
    return (originals + noise * torch.randn(*shape, generator=generator)).clamp(0, 1), originals


def test_mse_and_psnr_are_those_of_each_image():
    guess, truth = pair(5, 3, 16, 12)
    scores = score_images(guess, truth)
    expected = (guess - truth).square().mean((1, 2, 3))
    torch.testing.assert_close(scores.mse, expected)
    torch.testing.assert_close(scores.psnr, -10 * expected.log10())
    exact = score_images(truth, truth)
    assert exact.mse.tolist() == [0.0] * 5
    torch.testing.assert_close(exact.psnr, torch.full((5,), 100.0))
    torch.testing.assert_close(exact.ssim, torch.ones(5))


def test_ssim_is_wang_et_al_with_mirrored_borders():
    guess, truth = (image.double() for image in pair(2, 1, 28, 28))
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (5, 5, 5, 5), mode="reflect"), window)

    mu_x, mu_y = mean(guess), mean(truth)
    var_x, var_y = mean(guess**2) - mu_x**2, mean(truth**2) - mu_y**2
    covariance = mean(guess * truth) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    top, bottom = (2 * mu_x * mu_y + c1) * (2 * covariance + c2), (mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2)
    torch.testing.assert_close(ssim(guess, truth), (top / bottom).mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(28, 28, 11), (11, 40, 11), (10, 28, 9), (8, 8, 7), (3, 3, 3), (2, 9, None), (1, 1, None)],
)
def test_small_images_get_the_largest_window_that_fits(height, width, window):
    assert ssim_window(height, width) == window
    scores = score_images(*pair(4, 1, height, width))
    assert (scores.ssim is None) == (window is None)


def test_shapes_that_differ_and_images_without_a_window_are_refused():
    with pytest.raises(ValueError, match="must have one shape"):
        score_images(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 9))
    with pytest.raises(ValueError, match="3x3 pixels or more"):
        ssim(torch.rand(2, 1, 2, 2), torch.rand(2, 1, 2, 2))


def test_the_worst_case_is_the_smallest_error_and_the_largest_likeness_and_what_has_no_value_never_is_it():
    scores = {"a": {"mse": 0.2, "ssim": 0.9}, "b": {"mse": 0.1, "ssim": 0.8}, "c": {"mse": None, "ssim": None}}
    assert [best(metric, scores) for metric in ("mse", "ssim")] == ["b", "a"]
    assert best("mse", {name: {"mse": None} for name in "ab"}) == "a"
