"""Data sets by name, split into training, validation and test images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cem.data.files import Files, Labeled, read_cifar, read_digits, read_mnist, read_svhn
from cem.data.images import ImageSet
from cem.errors import DataError, UsageError

VAL_FRACTION = 0.1  # of the training file
TEST_FRACTION = 0.2  # of everything, where the data set has no test file
SPLIT_SEED = 0  # a constant: runs with different seeds must be compared on the same images


def _read_folder(root: Path, download: bool, image_size: int | None) -> Files:
    from cem.data.folder import read_folder  # which needs Pillow, and no other data set does

    return read_folder(root, image_size)


@dataclass(frozen=True)
class DataSet:
    """How a data set is read, and what ``augment`` does to it.

    Attributes:
        read: its folder, whether to download, and the image size if one is asked for → its files.
        crop: whether training images may be shifted at random.
        mirror: whether a mirror image is still of the same class.
    """

    read: Callable[[Path, bool, int | None], Files]
    crop: bool = False
    mirror: bool = False


DATASETS: dict[str, DataSet] = {
    "digits": DataSet(lambda root, download, size: read_digits()),
    "fashion-mnist": DataSet(lambda root, download, size: read_mnist("FashionMNIST", root, download)),
    "mnist": DataSet(lambda root, download, size: read_mnist("MNIST", root, download)),
    "cifar10": DataSet(lambda root, download, size: read_cifar("CIFAR10", root, download), crop=True, mirror=True),
    "cifar100": DataSet(lambda root, download, size: read_cifar("CIFAR100", root, download), crop=True, mirror=True),
    "svhn": DataSet(lambda root, download, size: read_svhn(root, download), crop=True),
    "folder": DataSet(_read_folder, crop=True, mirror=True),
}
"""The data sets by the name that ``--data`` takes."""


@dataclass(frozen=True)
class DataSplits:
    """Three disjoint sets of images of the same shape and classes.

    Attributes:
        train, val, test: see :class:`ImageSet`.
        class_names: name of each label.
        mean, std: per channel, of pixels in [0, 1], over the training images.
        notes: sentences on what was read, converted and left out, and on images that are in two of the sets.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load_data(
    name: str,
    root: str | Path | None = None,
    *,
    train_size: int | None = None,
    image_size: int | None = None,
    augment: bool = False,
    download: bool = False,
) -> DataSplits:
    """Read a data set and split it, always in the same way.

    A tenth of the training file, stratified by class, is set apart for validation; a data set that comes as
    one file gives a fifth for testing first. The split depends on nothing but the data: neither on a seed nor
    on ``train_size``. ``mean`` and ``std`` do not depend on ``train_size`` either.

    Args:
        name: one of :data:`DATASETS`. ``digits`` needs no files; ``folder`` reads ``root/train/CLASS/*`` and
            ``root/test/CLASS/*`` (or ``root/val``, which may also have TinyImageNet's form: ``images/*`` and
            ``val_annotations.txt``), or ``root/CLASS/*``.
        root: folder of this data set; ``data/NAME`` if left out.
        train_size: keep this many training images, stratified by class.
        image_size: resize to this height and width in pixels. If left out, images of a ``folder`` keep the size that
            all of them have, and get 64×64 if they have several.
        augment: shift training images at random, for ``cifar10``, ``cifar100``, ``svhn`` and ``folder``, and
            mirror them, but for ``svhn``.
        download: fetch missing files (torchvision's data sets).

    Raises:
        DataError: files are missing (the message says which, and where they were looked for) or corrupt.
        UsageError: an argument cannot be used.
    """
    if name not in DATASETS:
        raise UsageError(f"data must be one of {', '.join(DATASETS)}, got {name!r}")
    if augment and not DATASETS[name].crop:
        cropped = ", ".join(each for each, kind in DATASETS.items() if kind.crop)
        raise UsageError(f"augmentation is defined for {cropped} only, got {name!r}")
    if image_size is not None and image_size < 1:
        raise UsageError(f"image_size must be at least 1, got {image_size}")

    where = Path("data", name) if root is None else Path(root).expanduser()
    files = DATASETS[name].read(where, download, image_size)
    try:
        if files.test is None:
            train, test = _split(_image_set(files.train, "all", image_size), TEST_FRACTION)
        else:
            train = _image_set(files.train, "train", image_size)
            test = _image_set(files.test, "test", image_size)
        train, val = _split(train, VAL_FRACTION)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error

    notes = files.notes + _twins(train, val, test)
    mean, std = _channel_statistics(train.images)
    if train_size is not None:
        if not 1 <= train_size <= len(train):
            raise UsageError(f"train_size must be in 1..{len(train)} for {name}, got {train_size}")
        train = train.subset(_draw(train.labels, train_size))
    if augment:
        train = replace(train, augment=_augmentation(train.images.shape[-2:], DATASETS[name].mirror))
    return DataSplits(train, val, test, files.class_names, mean, std, notes)


def _image_set(labeled: Labeled, origin: str, image_size: int | None) -> ImageSet:
    images, labels = labeled
    if image_size is not None:
        from torchvision.transforms import v2

        images = v2.functional.resize(images, [image_size, image_size], antialias=True)
    return ImageSet(images, labels, torch.arange(len(images)), origin)


def _split(whole: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Set ``fraction`` of the images apart: ``(the rest, the fraction)``, both in their original order."""
    count = round(fraction * len(whole))
    if count == 0:
        raise DataError(f"{len(whole)} images are too few to set {fraction:.0%} of them apart")
    apart = _draw(whole.labels, count)
    rest = np.setdiff1d(np.arange(len(whole)), apart)
    return whole.subset(torch.from_numpy(rest)), whole.subset(apart)


def _draw(labels: Tensor, count: int) -> Tensor:
    """Ascending positions of ``count`` samples, every class in proportion, the same in every call."""
    from sklearn.utils import resample

    # Unlike train_test_split, resample does not insist on leaving one sample of each class behind.
    positions = np.arange(len(labels))
    drawn = resample(positions, replace=False, n_samples=count, stratify=labels.numpy(), random_state=SPLIT_SEED)
    return torch.from_numpy(np.sort(drawn))


def _twins(train: ImageSet, val: ImageSet, test: ImageSet) -> tuple[str, ...]:
    """A sentence on images that are, to the pixel, in two of the sets; none if there are no such images."""
    ones, others, last = ([hash(image.tobytes()) for image in each.images.numpy()] for each in (train, val, test))
    trained, known = set(ones), {*ones, *others}
    in_val, in_test = sum(each in trained for each in others), sum(each in known for each in last)
    said = [f"{in_val} of {len(val)} validation images are training images too"] * (in_val > 0)
    said += [f"{in_test} of {len(test)} test images are training or validation images too"] * (in_test > 0)
    return ("identical images: " + ", ".join(said),) if said else ()


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 ``[N, C, H, W]``, on the scale [0, 1]."""
    # By histogram: exact, and without a float copy of the whole data set.
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * levels).sum()
        variance = (share * (levels - mean) ** 2).sum()
        means.append(mean.item())
        stds.append(max(variance.sqrt().item(), 1 / 255))  # a constant channel must not be divided by zero
    return tuple(means), tuple(stds)


def _augmentation(size: torch.Size, mirror: bool) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    crop = v2.RandomCrop(list(size), padding=max(size[0] // 8, 1))
    return v2.Compose([crop, v2.RandomHorizontalFlip()]) if mirror else crop
