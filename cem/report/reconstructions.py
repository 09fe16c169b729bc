"""Originals over what an attacker makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from cem.report.figure import drawn, new_figure, save_figure

Images = npt.NDArray[np.uint8]


def draw_reconstructions(
    originals: Images,
    rows: Mapping[str, tuple[Images, npt.NDArray[np.floating] | None, npt.NDArray[np.floating] | None]],
    path: Path,
) -> None:
    """Draw a grid: the originals, and under them a row of reconstructions for every name.

    Args:
        originals: uint8 ``[n, C, H, W]``, C 1 (gray) or 3 (RGB); of more channels the first is shown.
        rows: name → reconstructions of the same shape and their SSIM ``[n]``, written under each; ``None``
            where SSIM is not defined.
        path: the PNG to write.
    """
    count = len(originals)
    figure = new_figure(1.6 + 0.85 * count, 0.95 * (1 + len(rows)) + 0.1)
    grid = figure.subplots(1 + len(rows), count, squeeze=False)
    for axes, image in zip(grid[0], originals, strict=True):
        _show(axes, image)
    _name(grid[0, 0], "original")
    for line, (name, (images, ssim, _)) in zip(grid[1:], rows.items(), strict=True):
        for number, axes in enumerate(line):
            _show(axes, images[number])
            if ssim is not None:
                axes.set_xlabel(f"{ssim[number]:.2f}", fontsize=8, labelpad=2)
        _name(line[0], name)
    save_figure(figure, path)


def _show(axes: Axes, image: Images) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if len(image) == 3:
        axes.imshow(np.moveaxis(image, 0, -1), interpolation="nearest")
    else:
        axes.imshow(image[0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _name(axes: Axes, name: str) -> None:
    axes.set_ylabel(drawn(name), rotation=0, ha="right", va="center", fontsize=9, labelpad=6, parse_math=False)
