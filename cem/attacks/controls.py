"""Attackers that look at no features: what an attack must beat to be one."""

from __future__ import annotations

import torch
from torch import Tensor

from cem.attacks.metrics import ImageScores, mean_scores, score_images
from cem.data import ImageSet


def control_scores(known: ImageSet, judged: ImageSet, num_classes: int) -> dict[str, dict[str, float | None]]:
    """Scores of guessing a mean of the attacker's own images.

    Args:
        known: the attacker's images.
        judged: the images to guess.
        num_classes: labels are below this.

    Returns:
        ``mean_image``: the same guess for all. ``class_mean``: the mean of the true class, which is what
        features that tell the class and nothing else would give away; a class that the attacker has no image
        of gets the mean image. Each with ``mse``, ``psnr`` and ``ssim``.
    """
    pixels = known.images.double() / 255
    mean = pixels.mean(0)
    counts = known.labels.bincount(minlength=num_classes)
    sums = torch.zeros(num_classes, *mean.shape, dtype=torch.float64).index_add_(0, known.labels, pixels)
    of_class = torch.where(counts.view(-1, 1, 1, 1) > 0, sums / counts.clamp(min=1).view(-1, 1, 1, 1), mean)
    return {
        "mean_image": _scores(mean.expand_as(of_class).float(), judged),
        "class_mean": _scores(of_class.float(), judged),
    }


def _scores(guess: Tensor, judged: ImageSet) -> dict[str, float | None]:
    """Score guessing ``guess[label]``, in pieces: all of them at once are as large as the data set in floats."""
    parts = [
        score_images(guess[labels], images.float() / 255)
        for images, labels in zip(judged.images.split(1000), judged.labels.split(1000), strict=True)
    ]
    return mean_scores(ImageScores.concatenate(parts))
