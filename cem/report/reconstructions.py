"""Originals over what attackers make of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cem.report.figure import drawn, new_figure, save_figure
from cem.report.numbers import figure as text_of

Images = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.floating] | None

_TILE, _GAP, _NAME, _LINE = 0.9, 0.06, 0.3, 0.14  # inches: width of an image, between two, names of rows, a score
_FEWEST = 4  # images that are as wide as a name


def draw_reconstructions(originals: Images, rows: Mapping[str, tuple[Images, Scores, Scores]], path: Path) -> None:
    """Draw a grid: the originals, and under them a row of reconstructions for every name.

    Args:
        originals: uint8 ``[n, C, H, W]``, C 1 (gray) or 3 (RGB); of more channels the first is shown.
        rows: name → reconstructions of the same shape, their SSIM ``[n]`` and their MSE ``[n]``, written under each;
            ``None``, or not a number, where one is not defined.
        path: the PNG to write.
    """
    tile = _TILE * originals.shape[2] / originals.shape[3]
    width = max(_FEWEST, len(originals)) * (_TILE + _GAP) + _GAP
    lines = {"original": (originals, {}), **{name: (row[0], _captions(*row[1:])) for name, row in rows.items()}}
    total = sum(_NAME + tile + _GAP + _LINE * len(captions) for _, captions in lines.values())
    figure, top = new_figure(width, total, layout=None), total
    for name, (images, captions) in lines.items():
        heading = drawn(name, longest=int(12 * width))
        figure.text(_GAP / width, (top - 0.8 * _NAME) / total, heading, fontsize=9.5, weight="bold", parse_math=False)
        top -= _NAME + tile
        for number, image in enumerate(images):
            left = _GAP + number * (_TILE + _GAP)
            axes = figure.add_axes((left / width, top / total, _TILE / width, tile / total), xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if len(image) == 3:
                axes.imshow(np.moveaxis(image, 0, -1), interpolation="nearest", aspect="auto")
            else:
                axes.imshow(image[0], cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
            axes.set_xlabel("\n".join(each[number] for each in captions.values()), fontsize=7.5, labelpad=2)
        top -= _GAP + _LINE * len(captions)
    save_figure(figure, path)


def _captions(ssim: Scores, mse: Scores) -> dict[str, list[str]]:
    """What stands under the images of a row, line by line."""
    scores = {"SSIM": (ssim, 2), "MSE": (mse, None)}
    return {
        name: [f"{name} {text_of(float(value), decimals=decimals)}" for value in values]
        for name, (values, decimals) in scores.items()
        if values is not None and np.isfinite(values).all()
    }
