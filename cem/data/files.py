"""What lies on disk: one reader for each data set, all giving the same thing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cem.data.idx import find_idx, read_idx
from cem.errors import DataError

if TYPE_CHECKING:
    from torchvision import datasets

# torchvision and scikit-learn are imported where they read: a command that only shows its help needs neither.

Labeled = tuple[Tensor, Tensor]
"""Images uint8 ``[N, C, H, W]`` and labels int64 ``[N]``, in the order of the file."""


class Files(NamedTuple):
    """A data set as it is published.

    Attributes:
        train: the training file, or everything if there is only one file.
        test: the test file, or None.
        class_names: name of each label.
        notes: sentences on what was read, if there is anything to say.
    """

    train: Labeled
    test: Labeled | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_digits() -> Files:
    """scikit-learn's 8x8 digits, 1797 images; their 17 gray levels are spread over 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    return Files((images, torch.from_numpy(digits.target).long()), None, tuple("0123456789"))


def read_mnist(name: str, root: Path, download: bool) -> Files:
    """MNIST or a data set of the same form, from idx files in ``root`` or where torchvision would put them.

    Raises:
        DataError: a file is missing or corrupt, cannot be fetched, or the files do not belong together.
    """
    from torchvision import datasets

    dataset: type[datasets.MNIST] = getattr(datasets, name)
    folders = (root, root / name / "raw")

    def find(name: str) -> Path:
        path = next(filter(None, (find_idx(folder, name) for folder in folders)), None)
        if path is None:
            raise DataError(
                f"{name}[.gz] is neither in {folders[0]} nor in {folders[1]}; "
                "put it there, or let it be fetched with download=True (--download)"
            )
        return path

    def read(prefix: str) -> Labeled:
        images_path, labels_path = find(f"{prefix}-images-idx3-ubyte"), find(f"{prefix}-labels-idx1-ubyte")
        images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
        if len(images) != len(labels):
            raise DataError(f"{images_path} has {len(images)} images, {labels_path} has {len(labels)} labels")
        if len(labels) == 0:
            raise DataError(f"{labels_path}: expected labels 0..{len(dataset.classes) - 1}, got none")
        if labels.max() >= len(dataset.classes):
            wrong = int((labels >= len(dataset.classes)).nonzero()[0])
            raise DataError(
                f"{labels_path}: expected labels 0..{len(dataset.classes) - 1}, got {labels[wrong]} for image {wrong}"
            )
        return images.unsqueeze(1), labels.long()

    if download:
        try:
            dataset(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise _missing(root, error) from error
    train, test = read("train"), read("t10k")
    if train[0].shape[1:] != test[0].shape[1:]:
        sizes = " and ".join("x".join(map(str, images.shape[2:])) for images, _ in (train, test))
        raise DataError(f"{root}: expected train-* and t10k-* to hold images of one size, got {sizes} pixels")
    return Files(train, test, tuple(dataset.classes))


def read_cifar(name: str, root: Path, download: bool) -> Files:
    """CIFAR-10 or CIFAR-100, as torchvision stores them.

    Raises:
        DataError: the data set is not in ``root``, or cannot be fetched.
    """
    from torchvision import datasets

    dataset: type[datasets.CIFAR10] = getattr(datasets, name)
    try:
        train, test = (dataset(str(root), train=train, download=download) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise _missing(root / dataset.base_folder, error if download else None) from error

    def labeled(part: Any) -> Labeled:
        return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)

    return Files(labeled(train), labeled(test), tuple(train.classes))


def read_svhn(root: Path, download: bool) -> Files:
    """Street View House Numbers, cropped digits, as torchvision stores them.

    Raises:
        DataError: the data set is not in ``root``, or cannot be fetched.
    """
    from torchvision import datasets

    try:
        train, test = (datasets.SVHN(str(root), split, download=download) for split in ("train", "test"))
    except (OSError, RuntimeError) as error:
        raise _missing(root / "{train,test}_32x32.mat", error if download else None) from error

    def labeled(part: Any) -> Labeled:
        return torch.from_numpy(part.data), torch.from_numpy(part.labels).long()

    return Files(labeled(train), labeled(test), tuple("0123456789"))


def _missing(path: Path, fetching: Exception | None) -> DataError:
    if fetching is not None:
        return DataError(f"cannot fetch {path}: {fetching}")
    return DataError(
        f"{path} not found or incomplete; put the data set there, or let it be fetched with download=True (--download)"
    )
