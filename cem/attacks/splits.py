"""Which images an attacker has, and which the attack is judged on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from cem.data import DataSplits, ImageSet
from cem.errors import UsageError

SPLIT_SEED = 0  # a constant: every run on a data set is attacked with the same images
MAX_VAL = 1000  # images; enough to tell decoders apart, and validated on after every epoch
VAL_SHARE = 5  # a fifth of what the attacker has, if that is less


@dataclass(frozen=True)
class AttackSplits:
    """Disjoint sets of images.

    Attributes:
        attacker_train: the attacker's own images, to learn from.
        attacker_val: the attacker's own as well; everything inside an attack is chosen on them.
        test: neither target nor attacker ever sees these; reconstructions of the first ones are scored, once, and all
            are candidates for whose reconstruction one is.
        trained: images that the target was trained on and the attacker never sees, scored apart; none where the
            attacker learns from such images itself.
        intercepted: images of which an attacker sees the features and nothing else.

    Raises:
        ValueError: two of the sets share an image.
    """

    attacker_train: ImageSet
    attacker_val: ImageSet
    test: ImageSet
    trained: ImageSet
    intercepted: ImageSet

    def __post_init__(self) -> None:
        for (first, ones), (second, others) in combinations(vars(self).items(), 2):
            shared = identities(ones) & identities(others)
            if shared:
                raise ValueError(f"{first} and {second} share {len(shared)} images, for example {min(shared)}")

    def sizes(self) -> dict[str, int]:
        """Number of images in each set, by name."""
        return {name: len(images) for name, images in vars(self).items()}


def identities(images: ImageSet) -> set[tuple[str, int]]:
    """Which file each image came from, and its place there: equal for equal images only."""
    return {(images.origin, index) for index in images.indices.tolist()}


def attack_splits(
    target: DataSplits,
    everything: DataSplits,
    *,
    knowledge: str = "auxiliary",
    aux_size: int | None = None,
    trained_size: int = 0,
) -> AttackSplits:
    """Share out a data set between target, attacker and judge.

    What the target did not train on is the attacker's: training images that ``train_size`` left unused, and the
    target's validation images, which chose its epoch and touched no weight. A fifth of them, but no more than
    1000, is for the attacker's validation. With ``knowledge="training"`` it learns from the target's training images
    instead of the rest, as published tables assume.

    Args:
        target: the data as the target saw it, ``train_size`` applied.
        everything: the same data without ``train_size``.
        knowledge: ``"auxiliary"`` or ``"training"``.
        aux_size: learn from this many images; all there are if left out.
        trained_size: images that the target was trained on to score; fewer if it had fewer.

    Raises:
        UsageError: the attacker is left with fewer than ten images, or with fewer than ``aux_size``.
    """
    unused = everything.train.subset((~torch.isin(everything.train.indices, target.train.indices)).nonzero().flatten())
    pool = _joined(unused, target.val)
    if len(pool) < 10:
        raise UsageError(
            f"the target left {len(pool)} images for an attacker; train it on fewer (--train-size) to leave more"
        )
    mixed = pick(pool, len(pool))
    val_size = min(MAX_VAL, len(pool) // VAL_SHARE)
    rest = mixed.subset(range(val_size, len(mixed)))
    trained = pick(replace(target.train, augment=None), len(target.train))
    own, others = (rest, trained) if knowledge == "auxiliary" else (trained, rest)
    if aux_size is not None and not 1 <= aux_size <= len(own):
        raise UsageError(f"--aux-size must be in 1..{len(own)} for this run, got {aux_size}")
    scored = min(trained_size, len(trained) - 1) if knowledge == "auxiliary" else 0
    return AttackSplits(
        attacker_train=own.subset(range(len(own) if aux_size is None else aux_size)),
        attacker_val=mixed.subset(range(val_size)),
        test=pick(target.test, len(target.test)),
        trained=others.subset(range(scored)),
        intercepted=others.subset(range(scored, len(others))),
    )


def pick(images: ImageSet, count: int) -> ImageSet:
    """``count`` images, the same in every call, in an order that has nothing to do with the file's."""
    return images.subset(_shuffled(len(images))[:count])


def varied(images: ImageSet, count: int) -> ImageSet:
    """``count`` images of as many classes as possible, the same in every call, sorted by class."""
    mixed = pick(images, len(images))
    # The how-manieth of its class each image is: the first of every class come before any second.
    one_hot = mixed.labels[:, None] == mixed.labels.unique()
    rank = (one_hot.cumsum(0) * one_hot).sum(1)
    chosen = mixed.subset(rank.argsort(stable=True)[:count])
    return chosen.subset(chosen.labels.argsort(stable=True))


def _shuffled(count: int) -> Tensor:
    """The positions ``0..count-1`` in an order that is always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))


def _joined(*sets: ImageSet) -> ImageSet:
    """One set of all images; they must come from one file, or their indices would mean nothing."""
    origins = {images.origin for images in sets}
    assert len(origins) == 1, f"images of several files: {origins}"
    return ImageSet(
        images=torch.cat([each.images for each in sets]),
        labels=torch.cat([each.labels for each in sets]),
        indices=torch.cat([each.indices for each in sets]),
        origin=origins.pop(),
    )
