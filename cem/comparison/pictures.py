"""One grid of the same images: as they are, and what attackers make of them without and with a defense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cem.comparison.definitions import TEXTS
from cem.errors import CheckpointError
from cem.report.document import Picture
from cem.report.reconstructions import Images, Scores, draw_reconstructions

if TYPE_CHECKING:
    from cem.comparison.results import RunResult
    from cem.comparison.statistics import Row

IMAGES = "images.npz"
RECONSTRUCTIONS = "reconstructions.png"
MOST = 8
"""Images in a row; more would be too small to see."""


@dataclass(frozen=True)
class Pictures:
    """What an attack keeps of a few unseen images.

    Attributes:
        originals: uint8 ``[n, C, H, W]``.
        guesses: by attack or control: uint8 ``[n, C, H, W]``, and SSIM and MSE ``[n]``; NaN where not defined.
        worst: the attack with the smallest MSE.
    """

    originals: Images
    guesses: dict[str, tuple[Images, Scores, Scores]]
    worst: str


def read_pictures(attack_dir: Path) -> Pictures | None:
    """The images in an attack's directory, or ``None`` if there are none.

    Raises:
        CheckpointError: they cannot be read.
    """
    path = attack_dir / IMAGES
    try:
        with np.load(path) as content:
            originals, guesses, ssim, mse = (content[name] for name in ("originals", "guesses", "ssim", "mse"))
            names, worst = content["attacks"].tolist(), str(content["worst"])
        originals, guesses, ssim, mse = originals[:MOST], guesses[:, :MOST], ssim[:, :MOST], mse[:, :MOST]
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, zlib and NumPy raise whatever they stumble over in a damaged file
        reason = error.strerror if isinstance(error, OSError) else None
        raise CheckpointError(f"cannot read {path}: {reason or 'it is damaged'}") from error
    expected = {(len(names), *originals.shape): [guesses], (len(names), len(originals)): [ssim, mse]}
    fits = all(each.shape == shape for shape, arrays in expected.items() for each in arrays)
    pixels = originals.ndim == 4 and originals.size and originals.dtype == guesses.dtype == np.uint8
    if not (fits and pixels and worst in names):
        raise CheckpointError(f"{path} is damaged: expected the same images of every attack")
    return Pictures(originals, dict(zip(names, zip(guesses, ssim, mse, strict=True), strict=True)), worst)


def draw_pictures(shown: Sequence[Row], results: Sequence[RunResult], out: Path) -> Picture | None:
    """Draw ``reconstructions.png``: a control under the worst attack, another setting under all, and blind guesses.

    Args:
        shown: a control and a defended setting, or one of both.
        results: their runs among others; those of the first seed whose images are there and the same are shown.
        out: the folder to draw into.

    Returns:
        The picture and its caption, or ``None`` where no run has images.
    """
    for seed in dict.fromkeys(result.run.seed for result in results):
        of_seed = {each.run.setting: each for each in results if each.run.seed == seed and each.status == "finished"}
        runs = [of_seed[row.setting] for row in shown if row.setting in of_seed]
        found = [(run, pictures) for run in runs if (pictures := read_pictures(run.attack_dir))]
        if (
            found
            and len(found) == len(shown)
            and all(np.array_equal(pictures.originals, found[0][1].originals) for _, pictures in found)
        ):
            break
    else:
        return None
    rows: dict[str, tuple[Images, Scores, Scores]] = {}
    words = []
    for run, pictures in found:
        setting, worst = str(run.run.setting), pictures.worst
        names = [name for name in pictures.guesses if name in run.attacks]
        if len(found) > 1 and run is found[0][0]:
            names = [worst]
            words.append(f"of {setting} the worst attack")
        else:
            words.append(f"of {setting} every attack")
        for name in names:
            rows[f"{setting}: {name}" + (", the worst attack" if name == worst else "")] = pictures.guesses[name]
    last_run, last = found[-1]
    controls = {name.replace("_", " "): own for name, own in last.guesses.items() if name not in last_run.attacks}
    words += [f"the {name}" for name in controls]
    draw_reconstructions(last.originals, rows | controls, out / RECONSTRUCTIONS)
    return Picture(Path(RECONSTRUCTIONS), TEXTS["reconstructions"].format(seed=seed, rows=", ".join(words)))
