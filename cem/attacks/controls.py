"""Attackers that look at no features: what an attack must beat to be one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cem.attacks.metrics import ImageScores, mean_scores, score_images
from cem.data import ImageSet
from cem.progress import over

PIECE = 1000  # images; all of them at once are several times as large as the data set


def control_scores(
    known: ImageSet, judged: Mapping[str, ImageSet], num_classes: int
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Scores of guessing a mean of the attacker's own images.

    Args:
        known: the attacker's images.
        judged: the images to guess, by name of the set.
        num_classes: labels are below this.

    Returns:
        ``mean_image``: the same guess for all. ``class_mean``: the mean of the true class, which is what
        features that tell the class and nothing else would give away; a class that the attacker has no image
        of gets the mean image. Each by set: ``mse``, ``psnr`` and ``ssim``.
    """
    counts = known.labels.bincount(minlength=num_classes)
    sums = torch.zeros(num_classes, *known.images.shape[1:], dtype=torch.float64)
    for images, labels in zip(known.images.split(PIECE), known.labels.split(PIECE), strict=True):
        sums.index_add_(0, labels, images.double())
    mean = sums.sum(0) / (255 * len(known))
    sizes = counts.view(-1, 1, 1, 1)
    of_class = torch.where(sizes > 0, sums / (255 * sizes.clamp(min=1)), mean)
    guesses = {"mean_image": mean.expand_as(of_class).float(), "class_mean": of_class.float()}
    return {
        control: {name: _scores(guess, images) for name, images in judged.items()} for control, guess in guesses.items()
    }


def _scores(guess: Tensor, judged: ImageSet) -> dict[str, float | None]:
    """Score guessing ``guess[label]``."""
    pieces = list(zip(judged.images.split(PIECE), judged.labels.split(PIECE), strict=True))
    parts = [score_images(guess[labels], images.float() / 255) for images, labels in over(pieces, "controls")]
    return mean_scores(ImageScores.concatenate(parts))
