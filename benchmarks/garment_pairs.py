"""``python -m benchmarks.garment_pairs --out FOLDER``: a data set of 100 classes, made of Fashion-MNIST.

Two garments side by side, each half as wide as it was; the class says which garment is left and which is right. With
100 classes a batch of 128 holds 1.3 samples of a class: what surrogates do then is what this is for. Garments are used
once each, in an order that a fixed seed gives, and training and test garments stay apart.

``cem.train --data folder --data-root FOLDER --image-size 28`` reads what this writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from cem.data.files import read_mnist
from cem.errors import DataError

SEED = 0


def make_pairs(images: Tensor, labels: Tensor, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Pair images at random; one that is left over is dropped.

    Args:
        images: uint8 ``[N, 1, H, W]``, ``W`` even.
        labels: ``[N]``, in 0..9.
        seed: of the order.

    Returns:
        uint8 ``[N // 2, 1, H, W]``, of columns averaged two by two, and labels ``10 · left + right``.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: len(images) // 2 * 2]
    narrow = images[order].float().unflatten(3, (-1, 2)).mean(dim=4).round().to(torch.uint8)
    left, right = labels[order].unflatten(0, (-1, 2)).unbind(dim=1)
    return torch.cat((narrow[0::2], narrow[1::2]), dim=3), 10 * left + right


def write_pairs(images: Tensor, labels: Tensor, folder: Path) -> None:
    """Write ``folder/LEFT-RIGHT/NUMBER.png``."""
    for number, (image, label) in enumerate(zip(tqdm(images, folder.name, disable=None), labels.tolist(), strict=True)):
        of_class = folder / f"{label // 10}-{label % 10}"
        of_class.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(of_class / f"{number:05d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data/fashion-mnist"), help="default: %(default)s")
    parser.add_argument("--download", action="store_true", help="fetch Fashion-MNIST if it is not there yet")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not exist yet")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already")
    try:
        files = read_mnist("FashionMNIST", arguments.data_root, arguments.download)
    except DataError as error:
        parser.error(str(error))
    assert files.test is not None
    for name, (images, labels) in {"train": files.train, "test": files.test}.items():
        write_pairs(*make_pairs(images, labels), arguments.out / name)


if __name__ == "__main__":
    main()
