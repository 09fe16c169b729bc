"""How time grows with sizes, drawn from the points of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cem.report.figure import COLORS, new_figure, plain, save_figure


def draw_sweep(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw time over tokens, classes and widths, each beside the line on which twice the size takes twice the time.

    Args:
        points: entries of the report's ``sweep``.
        path: the PNG to write.

    Raises:
        ValueError: if there are no points.
    """
    if not points:
        raise ValueError("there is no sweep to draw")
    axes_names = list(dict.fromkeys(point["axis"] for point in points))
    figure = new_figure(4.5 * len(axes_names), 3.6)
    for panel, axis in zip(figure.subplots(1, len(axes_names), squeeze=False).flat, axes_names, strict=True):
        chosen = [point for point in points if point["axis"] == axis]
        for color, variant in zip(COLORS, dict.fromkeys(point["variant"] for point in chosen), strict=False):
            line = sorted((size_of(point), 1e6 * point["seconds"]) for point in chosen if point["variant"] == variant)
            panel.plot(*zip(*line, strict=True), color=color, marker="o", ms=5, label=variant)
        ends = sorted((size_of(point), 1e6 * point["seconds"]) for point in chosen)
        (first, _), (last, longest) = ends[0], ends[-1]
        panel.plot([first, last], [longest * first / last, longest], color="0.5", ls="--", lw=1, label="slope 1")
        letters = {"tokens": "B·T", "classes": "K", "width": "D"}
        fixed = [
            f"{letter} = {size_of(chosen[0] | {'axis': other})}" for other, letter in letters.items() if other != axis
        ]
        panel.set(xscale="log", yscale="log", xlabel=f"{axis}, {letters[axis]}", ylabel="forward and backward, µs")
        panel.set_title(", ".join(fixed), fontsize=10, loc="left")
        panel.legend(frameon=False)
        plain(panel)
    save_figure(figure, path)


def size_of(point: Mapping[str, Any]) -> int:
    """What the point's axis counts."""
    size: int = {"tokens": point["B"] * point["T"], "classes": point["K"], "width": point["D"]}[point["axis"]]
    return size
