"""Small images for tests, drawn by formula; ``python -m cem.data.synthetic OUT`` writes a folder of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

_DIRECTIONS = ((1, 0), (0, 1), (1, 1), (1, -1))


def make_test_images(
    num_classes: int = 4,
    samples_per_class: int = 16,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draw stripes whose direction, width and color tell the class, at random places and under noise.

    All arithmetic is on integers, so that the same arguments give the same bits everywhere.

    Args:
        num_classes: how many classes.
        samples_per_class: images of each.
        image_shape: ``(C, H, W)``.
        seed: seed of places and noise; direction, width and color depend on the class alone.

    Returns:
        Images uint8 ``[num_classes * samples_per_class, C, H, W]`` and labels int64, sorted by label.

    Raises:
        ValueError: a size is below 1.
    """
    if min(num_classes, samples_per_class, *image_shape) < 1:
        raise ValueError(f"all sizes must be at least 1, got {num_classes=} {samples_per_class=} {image_shape=}")
    channels, height, width = image_shape
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat_interleave(samples_per_class)

    direction = torch.tensor(_DIRECTIONS)[labels % len(_DIRECTIONS)]
    period = (4 + 2 * (labels // len(_DIRECTIONS))).view(-1, 1, 1)
    start = torch.randint(1 << 16, labels.shape, generator=generator).view(-1, 1, 1)
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
    along = direction[:, 0, None, None] * rows + direction[:, 1, None, None] * columns + start
    stripe = (along % period < period // 2).long().unsqueeze(1)  # [N, 1, H, W], 1 on a stripe

    # 37 and 101 are prime to 128: neighboring classes and channels get colors far apart.
    color = 64 + (labels.view(-1, 1) * 37 + torch.arange(channels) * 101) % 128
    noise = torch.randint(-32, 33, (len(labels), *image_shape), generator=generator)
    images = stripe * color[:, :, None, None] + 32 + noise
    return images.clamp(0, 255).to(torch.uint8), labels


def write_test_images(
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    num_classes: int = 4,
    train_per_class: int = 64,
    test_per_class: int = 16,
    image_size: int = 32,
    seed: int = 0,
) -> None:
    """Write OUT/train/CLASS/*.png and OUT/test/CLASS/*.png, to be read with --data folder --data-root OUT.

    Args:
        out: folder to write to; it must not hold any images yet.
        num_classes: how many classes.
        train_per_class: training images of each.
        test_per_class: test images of each.
        image_size: height and width in pixels.
        seed: another seed, other images.

    Raises:
        FileExistsError: ``out`` has a ``train`` or a ``test`` already, or is a file.
        OSError: ``out`` cannot be written to.
        ValueError: a size is below 1.
    """
    sizes = {
        "num_classes": num_classes,
        "train_per_class": train_per_class,
        "test_per_class": test_per_class,
        "image_size": image_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; expected a folder, or the name of a new one")
    per_class = train_per_class + test_per_class
    images, labels = make_test_images(num_classes, per_class, (3, image_size, image_size), seed)
    if (out / "train").exists() or (out / "test").exists():
        raise FileExistsError(f"{out} has images already, and the new ones would mix with them")
    for position, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        number = position % per_class
        folder = out / ("train" if number < train_per_class else "test") / f"class{label:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder / f"{number:05d}.png")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command, ``args`` standing in for ``sys.argv[1:]``; exit code 0, or 2 if it cannot be done."""
    try:
        tyro.cli(write_test_images, prog="python -m cem.data.synthetic", args=args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
