"""One picture of several attacked runs: the same images, and what each attack made of them.

    python examples/side_by_side.py picture.png "noise alone=runs/a" "noise and centroid=runs/b"

Every run was attacked with the same options and seed, so that the images are the same. Under each name stand the
run's test accuracy and the smallest error of any attack; the pictures are that attack's.
"""

import json
import sys
from pathlib import Path

import numpy as np

from cem.report.reconstructions import draw_reconstructions


def main(picture: str, *named: str) -> None:
    rows, originals = {}, None
    for each in named:
        name, _, run = each.partition("=")
        images = np.load(Path(run) / "attack" / "images.npz")
        originals = images["originals"] if originals is None else originals
        if not np.array_equal(originals, images["originals"]):
            raise SystemExit(f"{run}: attacked on other images than the runs before it")
        accuracy = json.loads((Path(run) / "summary.json").read_text())["test_accuracy"]
        worst = json.loads((Path(run) / "attack" / "attack.json").read_text())["worst"]["mse"]
        shown = [*images["attacks"]].index(worst["attack"])
        pictures = images["guesses"][shown], images["ssim"][shown], images["mse"][shown]
        rows[f"{name}\n{accuracy:.1%}, MSE {worst['value']:.4f}"] = pictures
    draw_reconstructions(originals, rows, Path(picture))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
