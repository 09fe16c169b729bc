"""A folder of images, one folder in it for each class: which layouts there are, and what is said of what was read."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from cem.data.decode import DEEP_GRAY, SUFFIXES
from cem.data.files import Files
from cem.data.listing import Listing
from cem.data.pixels import Read, read_images
from cem.errors import DataError

Sample = tuple[str, int]
"""An image file and its label."""

_EXPECTED = "train/CLASS/* and test/CLASS/* (or val/CLASS/*), or CLASS/*, or TinyImageNet as it is published"
_OF_A_SET = r"([ _-]?(set|data|images?))?"
_TRAIN = re.compile(rf"(train|training){_OF_A_SET}", re.IGNORECASE)
_OTHER = re.compile(rf"(test|testing|val|valid|validation|dev|eval){_OF_A_SET}", re.IGNORECASE)
_FEW = 5  # of many names or kinds, so many are named


class Samples(NamedTuple):
    """What a data set consists of; ``test`` is ``None`` where nothing was set apart for it."""

    classes: tuple[str, ...]
    train: list[Sample]
    test: list[Sample] | None


def read_folder(root: Path, image_size: int | None = None) -> Files:
    """One folder of images per class, as RGB.

    Either ``root/train/CLASS/*`` with the same classes in ``root/test`` or ``root/val``, or ``root/CLASS/*``, at any
    depth below CLASS. In place of class folders, ``root/val`` may hold ``images/*`` and ``val_annotations.txt``, as
    TinyImageNet has it. What is hidden or no image is left out. ``notes`` say what was found, converted and left out.

    Args:
        root: the folder.
        image_size: height and width, stretched if needed; see :func:`~cem.data.pixels.read_images`.

    Raises:
        DataError: the layout is another, there are fewer than two classes, a class is without an image, an image cannot
            be read, or a line of the annotations cannot be used.
    """
    listing = Listing()
    classes, train, test = _samples(root, listing)
    samples = train + (test or [])
    read = read_images([path for path, _ in samples], root.absolute(), image_size)
    if DEEP_GRAY in read.facts["done"] and read.facts["brightest"] <= 16:
        warnings.warn(
            f"no 16-bit image in {root} has a level above 4095 of 65535, so all are almost black: if they hold 12 bits "
            "or fewer, multiply their levels to fill 16",
            stacklevel=2,
        )
    images, labels = torch.from_numpy(read.images), torch.tensor([label for _, label in samples])
    count = len(train)
    # A view would keep all images alive.
    apart = None if test is None else (images[count:].clone(), labels[count:])
    return Files((images[:count], labels[:count]), apart, classes, (_note(root, classes, samples, read, listing),))


def _samples(root: Path, listing: Listing) -> Samples:
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: expected one with {_EXPECTED}")
    outside = listing.outside(root)
    classes = listing.folders(root / "train")
    if not classes:
        names = listing.folders(root)
        if not names:
            raise DataError(f"{root} has no class folders, but {len(outside)} images: expected {_EXPECTED}")
        if _is_divided(names):
            raise DataError(f"{root} has {_some(names)}, and no class folders in train: expected {_EXPECTED}")
        found = Samples(names, _in_classes(root, names, listing), None)
    else:
        others = {name: listing.folders(root / name) for name in ("test", "val")}
        annotations = root / "val" / "val_annotations.txt"
        test = next((name for name, names in others.items() if names == classes), None)
        if test is None and not annotations.is_file():
            differences = "; ".join(_difference(root / name, names, classes) for name, names in others.items())
            raise DataError(
                f"{root / 'train'} has {len(classes)} class folders, which test images need too, but {differences}; "
                f"there is no {annotations} either. If there are no test images, --data-root is {root / 'train'}"
            )
        train = _in_classes(root / "train", classes, listing)
        if test is None:
            found = Samples(classes, train, _read_annotations(annotations, classes))
        else:
            outside += listing.outside(root / test)
            found = Samples(classes, train, _in_classes(root / test, classes, listing))
        outside += listing.outside(root / "train")
        unused = sorted({*listing.folders(root)} - {"train", test or "val"})
        listing.left_out.update(f"the folder {name}" for name in unused)
    listing.left_out.update(["in no class folder"] * len(outside))
    return found


def _in_classes(directory: Path, classes: Iterable[str], listing: Listing) -> list[Sample]:
    """Image files and their labels, from ``directory/CLASS/*`` at any depth."""
    classes = tuple(classes)
    for name in classes:
        inside = listing.folders(directory / name)
        if _is_divided(inside):
            raise DataError(
                f"{directory / name} is no class but a data set of its own, with {_some(inside)}; "
                f"--data-root takes one data set: expected {_EXPECTED}"
            )
    if len(classes) < 2:
        raise DataError(
            f"{directory} has one class folder only, {classes[0]}: expected two or more; if they lie below it, "
            f"--data-root is {directory / classes[0]}"
        )
    found = [[(path, label) for path in listing.images(str(directory / name))] for label, name in enumerate(classes)]
    empty = [name for name, images in zip(classes, found, strict=True) if not images]
    if empty:
        raise DataError(
            f"no images in the class folders {_some(empty)} of {directory}: expected at least one in each, with the "
            f"suffix {', '.join(SUFFIXES)}"
        )
    return [sample for images in found for sample in images]


def _read_annotations(path: Path, classes: tuple[str, ...]) -> list[Sample]:
    """Image files and their labels, from lines of file name, class and whatever else, separated by tabs."""
    numbers = {name: number for number, name in enumerate(classes)}
    samples = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    for count, line in enumerate(lines, start=1):
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


def _is_divided(names: Iterable[str]) -> bool:
    """Whether folders of these names are parts of a data set; either name alone may well be a class."""
    return all(any(part.fullmatch(name) for name in names) for part in (_TRAIN, _OTHER))


def _difference(directory: Path, names: Iterable[str], classes: Iterable[str]) -> str:
    if not directory.is_dir():
        return f"there is no {directory}"
    lacks, more = sorted({*classes} - {*names}), sorted({*names} - {*classes})
    return f"{directory} lacks {_some(lacks) or 'none'} and has {_some(more) or 'none'} besides"


def _note(root: Path, classes: tuple[str, ...], samples: list[Sample], read: Read, listing: Listing) -> str:
    """One line on what was used, converted, resized and left out."""
    suffixes = Counter(os.path.splitext(path)[1].lower() for path, _ in samples)
    done, sizes, (height, width) = read.facts["done"], read.facts["sizes"], read.images.shape[2:]
    parts = [f"{root}: {len(samples)} images ({_counts(suffixes)}) of {len(classes)} classes, {width}×{height} pixels"]
    if sizes != [[height, width]]:
        was = f"{sizes[0][1]}×{sizes[0][0]}" if len(sizes) == 1 else f"{len(sizes)} sizes"
        parts[0] += f", resized from {was}"
    parts += [f"converted: {_counts(Counter(done))}"] * bool(done)
    parts += [f"left out: {_counts(listing.left_out)}"] * bool(listing.left_out)
    parts += [f"kept since an earlier run in {read.kept}"] * (read.kept is not None)
    return "; ".join(parts)


def _counts(found: Counter[str]) -> str:
    """``"3 .txt, 1 hidden"``, the most frequent first."""
    most = [name if name.startswith("the folder") else f"{count} {name}" for name, count in found.most_common(_FEW)]
    rest = sum(count for _, count in found.most_common()[_FEW:])
    return ", ".join(most + [f"{rest} of other kinds"] * bool(rest))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_FEW]) + f" and {len(names) - _FEW} more" * (len(names) > _FEW)
