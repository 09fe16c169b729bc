"""What lies on disk: one reader for each data set, all giving the same thing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cem.data.idx import find_idx, read_idx
from cem.errors import DataError
from cem.progress import over

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
    """

    train: Labeled
    test: Labeled | None
    class_names: tuple[str, ...]


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
        if len(labels) == 0 or labels.max() >= len(dataset.classes):
            raise DataError(f"{labels_path}: expected labels 0..{len(dataset.classes) - 1}, got {labels.unique()}")
        return images.unsqueeze(1), labels.long()

    if download:
        try:
            dataset(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise _missing(root, error) from error
    return Files(read("train"), read("t10k"), tuple(dataset.classes))


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


def read_folder(root: Path, image_size: int) -> Files:
    """One folder of images per class, as RGB of ``image_size`` x ``image_size`` pixels (stretched if needed).

    Either ``root/train/CLASS/*`` with the same classes in ``root/test`` or ``root/val``, or ``root/CLASS/*``. In
    place of class folders, ``root/val`` may hold ``images/*`` and ``val_annotations.txt``, as TinyImageNet has it.

    Raises:
        DataError: no such folder, no class folder, a class without an image, an image that cannot be read, or a line of
            the annotations that cannot be used.
    """
    if not _classes(root / "train"):
        if not _classes(root):
            raise DataError(
                f"no class folders at {root}: expected {root}/train/CLASS/* and {root}/test/CLASS/*, or {root}/CLASS/*"
            )
        return Files(_read_images(_class_folders(root), image_size), None, _classes(root))

    classes = _classes(root / "train")
    annotations = root / "val" / "val_annotations.txt"
    test = next((root / name for name in ("test", "val") if _classes(root / name) == classes), None)
    if test is not None:
        samples = _class_folders(test)
    elif annotations.is_file():
        samples = _read_annotations(annotations, classes)
    else:
        raise DataError(
            f"{root}/train has {len(classes)} class folders, but neither {root}/test nor {root}/val has the same ones, "
            f"and there is no {annotations}"
        )
    train = _read_images(_class_folders(root / "train"), image_size)
    return Files(train, _read_images(samples, image_size), classes)


def _read_annotations(path: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """Image files and their labels, from lines of file name, class and whatever else, separated by tabs."""
    numbers = {name: number for number, name in enumerate(classes)}
    samples = []
    for count, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0]
        if label not in numbers:
            raise DataError(
                f"{path}, line {count}: expected the name of an image, a tab and the name of one of the "
                f"{len(classes)} class folders of train, got {line!r}"
            )
        image = path.parent / "images" / name
        if not image.is_file():
            raise DataError(f"{path}, line {count}: there is no image {image}")
        samples.append((str(image), numbers[label]))
    if not samples:
        raise DataError(f"{path}: expected a line for each image, got an empty file")
    return samples


def _class_folders(directory: Path) -> list[tuple[str, int]]:
    """Image files and their labels, from ``directory/CLASS/*`` at any depth."""
    from torchvision import datasets

    try:
        return datasets.ImageFolder(str(directory)).samples
    except FileNotFoundError as error:
        raise DataError(f"{directory}: {error}") from error


def _read_images(samples: list[tuple[str, int]], image_size: int) -> Labeled:
    """Read ``(path, label)`` pairs, in their order."""
    from torchvision import datasets
    from torchvision.transforms import v2

    to_tensor = v2.Compose([v2.PILToTensor(), v2.Resize((image_size, image_size), antialias=True)])
    images = torch.empty(len(samples), 3, image_size, image_size, dtype=torch.uint8)
    for position, (path, _) in enumerate(over(samples, "reading images")):
        try:
            images[position] = to_tensor(datasets.folder.default_loader(path))
        except (OSError, SyntaxError) as error:  # Pillow raises either for broken files
            raise DataError(f"{path} is not a readable image: {error}") from error
    return images, torch.tensor([label for _, label in samples])


def _classes(directory: Path) -> tuple[str, ...]:
    """Names of the sub-folders in the order in which torchvision's ImageFolder numbers them."""
    if not directory.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in directory.iterdir() if entry.is_dir()))


def _missing(path: Path, fetching: Exception | None) -> DataError:
    if fetching is not None:
        return DataError(f"cannot fetch {path}: {fetching}")
    return DataError(
        f"{path} not found or incomplete; put the data set there, or let it be fetched with download=True (--download)"
    )
