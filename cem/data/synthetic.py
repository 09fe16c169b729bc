"""Small images for tests, drawn by formula; ``python -m cem.data.synthetic OUT`` writes a folder of them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cem.command import Parser, parse_options, run_command
from cem.errors import UsageError
from cem.options import Options, option
from cem.progress import over

_DIRECTIONS = ((1, 0), (0, 1), (1, 1), (1, -1))


def make_test_images(
    num_classes: int = 4, samples_per_class: int = 16, image_shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0
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
        UsageError: a size is below 1.
    """
    if min(num_classes, samples_per_class, *image_shape) < 1:
        raise UsageError(f"all sizes must be at least 1, got {num_classes=} {samples_per_class=} {image_shape=}")
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


@dataclass(frozen=True)
class Sizes(Options):
    """Of a folder of test images.

    Attributes:
        num_classes: How many classes.
        train_per_class: Training images of each.
        test_per_class: Test images of each.
        image_size: Height and width in pixels.
        seed: Another seed, other images.
    """

    num_classes: int = option(4, least=1, group="sizes")
    train_per_class: int = option(64, least=1, group="sizes")
    test_per_class: int = option(16, least=1, group="sizes")
    image_size: int = option(32, least=1, group="sizes")
    seed: int = option(0, group="sizes")


def write_test_images(out: Path, **sizes: int) -> None:
    """Write OUT/train/CLASS/*.png and OUT/test/CLASS/*.png, to be read with --data folder --data-root OUT.

    Args:
        out: folder to write to; it must not hold any images yet.
        sizes: see :class:`Sizes`.

    Raises:
        UsageError: ``out`` has a ``train`` or a ``test`` already, is a file or cannot be written to, or a size is below
            1.
    """
    from torchvision.transforms.v2.functional import to_pil_image

    size = Sizes(**sizes).checked()
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; expected a folder, or the name of a new one")
    if (out / "train").exists() or (out / "test").exists():
        raise UsageError(f"{out} has images already, and the new ones would mix with them")
    per_class = size.train_per_class + size.test_per_class
    images, labels = make_test_images(size.num_classes, per_class, (3, size.image_size, size.image_size), size.seed)
    pairs = list(zip(images, labels.tolist(), strict=True))
    for position, (image, label) in enumerate(over(pairs, "writing images")):
        number = position % per_class
        folder = out / ("train" if number < size.train_per_class else "test") / f"class{label:03d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(folder / f"{number:05d}.png")
        except OSError as error:
            raise UsageError(f"cannot write images to {out}: {error}") from error


def main(args: Sequence[str] | None = None) -> int:
    """Run the command, ``args`` standing in for ``sys.argv[1:]``; exit code 0, or 2 if it cannot be done."""

    def write() -> int:
        about = "Write a folder of small images, to be read with --data folder --data-root OUT."
        parser = Parser("python -m cem.data.synthetic", about, usage="OUT [options]")
        parser.add_argument_group("what is written").add_argument(
            "out", type=Path, metavar="OUT", help="Folder to write to; it must hold no images yet."
        )
        parser.add_options(Sizes())
        given = parse_options(parser, sys.argv[1:] if args is None else args)
        write_test_images(**given)
        where = shlex.quote(str(given["out"]))
        print(f"results   {where}: train/CLASS/*.png and test/CLASS/*.png")
        print(f"next      python -m cem.train --data folder --data-root {where}")
        return 0

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
