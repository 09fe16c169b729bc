"""One grid of the same images: as they are, and what attackers make of them without and with a defense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cem.attacks.pictures import read_pictures
from cem.comparison.definitions import TEXTS
from cem.comparison.results import MOST, RunResult
from cem.comparison.statistics import Row
from cem.report.document import Picture
from cem.report.reconstructions import Images, Scores, draw_reconstructions

RECONSTRUCTIONS = "reconstructions.png"


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
        found = [(run, pictures) for run in runs if (pictures := read_pictures(run.attack_dir, MOST))]
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
