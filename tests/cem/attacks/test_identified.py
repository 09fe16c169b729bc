"""Whether reconstructions point at their originals, and what is said of a set of them."""

import pytest
import torch

from cem.attacks.metrics import judged, ranks
from cem.data import ImageSet

CLASSES, EACH = 3, 20


def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (CLASSES * EACH, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(len(pixels)) % CLASSES, torch.arange(len(pixels)), "test")


def test_what_is_exact_is_identified_and_what_is_of_another_image_is_not():
    originals = images()
    exact = originals.images.float() / 255
    assert ranks(exact, originals)[0].tolist() == [1] * len(exact)
    swapped = exact.roll(CLASSES, 0)  # the image before it of the same class
    rank, number = ranks(swapped, originals)
    assert (rank > 1).all()
    assert number.tolist() == [EACH] * len(exact)


def test_ranks_count_the_images_of_the_class_that_lie_nearer():
    originals = images()
    guess = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    rank, _ = ranks(guess, originals)
    for position, each in enumerate(guess.double()):
        error = (originals.images.double() / 255 - each).square().flatten(1).sum(1)
        same = originals.labels == originals.labels[position]
        assert rank[position] == 1 + (error[same] < error[position]).sum()


def test_the_class_and_a_constant_help_nobody():
    """A guess that knows the class and nothing else is right as often as chance."""
    originals = images()
    pixels = originals.images.float() / 255
    means = torch.stack([pixels[originals.labels == label].mean(0) for label in range(CLASSES)])
    scores = judged(means[originals.labels], originals)
    assert scores["identified"] == pytest.approx(scores["chance"]) == pytest.approx(1 / EACH)
    assert scores["candidates"] == EACH
    assert scores["median_rank"] == pytest.approx(EACH / 2, abs=1)


def test_an_image_that_is_there_twice_is_identified_by_either():
    originals = images()
    originals.images[CLASSES] = originals.images[0]
    rank, _ = ranks(originals.images.float() / 255, originals)
    assert rank[0] == rank[CLASSES] == 1


def test_scores_are_of_the_first_images_and_the_worst_protected_are_told():
    originals = images()
    exact = originals.images.float() / 255
    guess = exact[:40] + torch.linspace(0, 0.2, 40)[:, None, None, None]
    scores = judged(guess, originals)
    errors = torch.linspace(0, 0.2, 40, dtype=torch.float64).square()
    assert scores["images"] == 40
    assert scores["mse"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert scores["mse_p05"] == pytest.approx(errors.quantile(0.05).item(), rel=1e-3)
