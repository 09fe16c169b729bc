"""``python -m benchmarks.studies``: what studies in ``results/`` need besides ``cem.compare``.

``correlations TABLE...`` ranks encoders by what each surrogate says of them and by the strongest attacker's error.
Tables have a line a run with ``seed``, ``test_mse`` and columns ``value_NAME``: those of ``results/``, or the
``table.csv`` of ``python -m cem.compare``, where the error is that of the worst attack, ``worst_mse``. Spearman's ρ is
-1 where a value falls exactly as errors grow. Intervals draw settings, each with all of its seeds; runs that differ in
nothing but the seed are one setting.

``garment-pairs`` makes a data set of 100 classes of Fashion-MNIST: two garments side by side, each half as wide as it
was; the class says which is left and which is right. ``cem.train --data folder --data-root FOLDER --image-size 28``
reads it. With 100 classes a batch of 128 holds 1.3 samples of a class.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from cem.comparison.correlation import RESAMPLES, interval, rank_correlation, spearman
from cem.data.files import read_mnist
from cem.errors import DataError
from cem.surrogates import RECOMMENDED

SEED = 0
SETTING = (("setting",), ("method", "lambd", "noise_std"))  # columns that name one: of results/, of cem.compare
Row = dict[str, str]


def read_table(path: Path) -> list[Row]:
    """The lines of a table, in the order in which resamples draw them; what begins with ``#`` says where it is from."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return sorted(rows, key=lambda row: (setting_of(row), row["seed"]))


def setting_of(row: Row) -> tuple[str, ...]:
    columns = next(names for names in SETTING if names[0] in row)
    return tuple(row[name] for name in columns)


def resamples(settings: Sequence[Hashable], seed: int = 0) -> list[NDArray[np.int64]]:
    """Indices ``[R, m]`` of resamples, one array for each size ``m`` that they have; 10 000 in all.

    Settings are drawn with replacement, each with all of its pairs: pairs of one setting, such as one a seed, are not
    independent.

    Args:
        settings: of every pair.
        seed: of the resampling.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, setting in enumerate(settings):
        members[setting].append(index)
    of_setting = [np.array(indices) for indices in members.values()]
    by_size: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
    for resample in np.random.default_rng(seed).integers(len(of_setting), size=(RESAMPLES, len(of_setting))):
        indices = np.concatenate([of_setting[setting] for setting in resample])
        by_size[len(indices)].append(indices)
    return [np.stack(alike) for alike in by_size.values()]


def difference(
    x: Sequence[float], other: Sequence[float], y: Sequence[float], drawn: Sequence[NDArray[np.int64]]
) -> tuple[float, float, float]:
    """``ρ(x, y) − ρ(other, y)`` with both ends of its 95 % interval, both from the same resamples.

    Intervals of two correlations with the same ``y`` may overlap where one is the larger in nearly every resample: what
    spoils one spoils the other.
    """
    a, b, c = (np.asarray(values, dtype=np.float64) for values in (x, other, y))
    found = [rank_correlation(a[index], c[index]) - rank_correlation(b[index], c[index]) for index in drawn]
    whole = rank_correlation(a[None], c[None]) - rank_correlation(b[None], c[None])
    return float(whole[0]), *interval(found)


def correlations(rows: Sequence[Row], against: str) -> list[dict[str, Any]]:
    """A line for each value that the rows have, best first: ρ, how far that of ``against`` is from it, intervals."""
    found = []
    for name in dict.fromkeys(column.removeprefix("value_") for column in rows[0] if column.startswith("value_")):
        error = "worst_mse" if "worst_mse" in rows[0] else "test_mse"
        columns = (f"value_{against}", f"value_{name}", error)
        known = [row for row in rows if all(row.get(column) for column in columns)]
        best, values, errors = ([float(row[column]) for row in known] for column in columns)
        drawn = resamples([setting_of(row) for row in known])
        rho, low, high, _ = spearman(values, errors, drawn=drawn)
        line: dict[str, Any] = {"value": name, "runs": len(known), "rho": rho, "low": low, "high": high}
        if name != against and rho is not None:
            ends = difference(best, values, errors, drawn)
            line |= dict(zip((f"{against}_minus_this", "difference_low", "difference_high"), ends, strict=True))
        found.append(line)
    return sorted(found, key=lambda line: line["rho"] or 0)


def make_pairs(images: Tensor, labels: Tensor, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Pair images at random, each used once; one that is left over is dropped.

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


def main(arguments: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.studies", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ranks = commands.add_parser("correlations", help="whose value ranks encoders as attackers do, as CSV")
    ranks.add_argument("tables", nargs="+", metavar="TABLE", type=Path, help="CSV with a line a run")
    ranks.add_argument("--against", default=RECOMMENDED, metavar="NAME", help="compare others with (%(default)s)")
    pairs = commands.add_parser("garment-pairs", help="a data set of 100 classes, made of Fashion-MNIST")
    pairs.add_argument("--data-root", type=Path, default=Path("data/fashion-mnist"), help="default: %(default)s")
    pairs.add_argument("--download", action="store_true", help="fetch Fashion-MNIST if it is not there yet")
    pairs.add_argument("--out", type=Path, required=True, help="folder to write, which must not exist yet")
    options = parser.parse_args(arguments)
    if options.command == "correlations":
        lines = correlations([row for path in options.tables for row in read_table(path)], options.against)
        table = csv.DictWriter(sys.stdout, max((list(line) for line in lines), key=len))
        table.writeheader()
        table.writerows(lines)
        return
    if options.out.exists():
        parser.error(f"{options.out} exists already")
    try:
        files = read_mnist("FashionMNIST", options.data_root, options.download)
    except DataError as error:
        parser.error(str(error))
    assert files.test is not None
    for name, (images, labels) in {"train": files.train, "test": files.test}.items():
        write_pairs(*make_pairs(images, labels), options.out / name)


if __name__ == "__main__":
    main()
