"""Guesses that need no attack: what an attack must beat to be one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cem.attacks.base import VAL, Exposed, Guesses, Own
from cem.attacks.observe import clean_features, defended
from cem.data import ImageSet
from cem.training.evaluation import isolated_random

PIECE = 1000  # images; all of them at once are several times as large as the data set

CLASS_MEAN = "class_mean"


def control_guesses(target: Exposed, own: Own, labels: dict[str, Tensor]) -> dict[str, Guesses]:
    """By name of the control, its guesses for every set but the attacker's own.

    ``mean_image``: the mean of the attacker's images for all. ``class_mean``: the mean of the true class, which is what
    features that tell the class and nothing else would give away; a class that the attacker has no image of gets the
    mean image. ``nearest_neighbor``: of the attacker's images the one whose features, sent once more, are nearest to
    those seen.

    Args:
        target: what lies open.
        own: the attacker's images.
        labels: by set, of the images to guess.
    """
    means = class_means(own.train, target.num_classes)
    mean = class_means(replace(own.train, labels=torch.zeros_like(own.train.labels)), 1)[0]
    guesses: dict[str, Guesses] = {"mean_image": {}, CLASS_MEAN: {}, "nearest_neighbor": {}}
    with torch.no_grad(), isolated_random(target.seed, target.device):
        clean = clean_features(target.model, own.train)
        known = None if clean is None else defended(target.model, clean, target.queries).flatten(1)
    for name, sent in target.sent.items():
        if name == VAL:
            continue
        guesses["mean_image"][name] = mean.expand(len(sent), *target.image_shape)
        guesses[CLASS_MEAN][name] = means[labels[name]]
        if known is not None:
            parts = sent.flatten(1).to(known.device).split(PIECE)
            nearest = torch.cat([torch.cdist(part, known).argmin(1).cpu() for part in parts])
            guesses["nearest_neighbor"][name] = own.train.images[nearest].float() / 255
    return {name: each for name, each in guesses.items() if each}


def class_means(images: ImageSet, num_classes: int) -> Tensor:
    """``[K, C, H, W]``: the mean of each class, and the mean of all for classes without an image."""
    counts = images.labels.bincount(minlength=num_classes)
    sums = torch.zeros(num_classes, *images.images.shape[1:], dtype=torch.float64)
    for pixels, labels in zip(images.images.split(PIECE), images.labels.split(PIECE), strict=True):
        sums.index_add_(0, labels, pixels.double())
    sizes = counts.view(-1, 1, 1, 1)
    return torch.where(sizes > 0, sums / (255 * sizes.clamp(min=1)), sums.sum(0) / (255 * len(images))).float()
