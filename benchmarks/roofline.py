"""The pictures of ``docs/performance.md``: rooflines, and times as one size grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from cem.report.figure import COLORS, new_figure, plain, save_figure

STYLES = {"bf16": (COLORS[0], "s"), "fp32": (COLORS[1], "o")}  # by the roof that holds: color, marker
WIDTH = 9  # inches: a point of text is 1.4 pixels where the picture is 900 wide
SMALL = 8.5  # points


@dataclass(frozen=True)
class Point:
    """One case, forward and backward together.

    Attributes:
        operator: has a panel.
        label: beside the panel.
        roof: ``bf16`` or ``fp32``, the rate that its operations are held against.
        intensity: operations for every byte.
        attainable: operations a second at the time of its floor.
        reached: operations a second as measured, or ``None``.
    """

    operator: str
    label: str
    roof: str
    intensity: float
    attainable: float
    reached: float | None

    @property
    def shown(self) -> float:
        """Where the label's line ends."""
        return self.attainable if self.reached is None else self.reached


def draw_roofline(points: Sequence[Point], rates: Mapping[str, float], path: Path) -> None:
    """Draw a panel an operator: a hollow marker on the roof for every case, and a full one where it was measured.

    Args:
        points: panels come in the order of their operators.
        rates: ``copy`` in bytes a second, ``bf16`` and ``fp32`` in operations a second.
        path: the PNG to write.

    Raises:
        ValueError: if there are no points.
    """
    if not points:
        raise ValueError("there are no cases to draw")
    operators = list(dict.fromkeys(point.operator for point in points))
    figure = new_figure(WIDTH, 1.9 * len(operators) + 0.9)
    panels = figure.subplots(len(operators), 1, sharex=True, sharey=True, squeeze=False).flatten()
    roofs = [rates[name] for name in STYLES]
    panels[0].set(
        xscale="log", xlim=limits([*(p.intensity for p in points), *(roof / rates["copy"] for roof in roofs)]),
        yscale="log", ylim=limits([*(p.shown for p in points), *roofs]),
    )  # fmt: skip
    for axes, operator in zip(panels, operators, strict=True):
        mine = [point for point in points if point.operator == operator]
        draw_roofs(axes, rates)
        for point in mine:
            draw_point(axes, point)
        draw_labels(axes, mine)
        axes.set_title(operator, fontsize=10, loc="left", fontweight="bold")
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.tick_params(labelsize=SMALL)
        plain(axes)
    panels[-1].xaxis.set_major_formatter("{x:g}")
    panels[-1].set_xlabel("operations for every byte")
    figure.supylabel("operations a second", fontsize=10)
    entries = legend(any(point.reached is not None for point in points))
    figure.legend(handles=entries, frameon=False, loc="outside lower center", ncols=len(entries), fontsize=SMALL)
    save_figure(figure, path)


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Of a logarithmic axis, with some room on both sides."""
    return min(values) / 4, max(values) * 2


def draw_roofs(axes: Axes, rates: Mapping[str, float]) -> None:
    """Named above and to the left of them, where no point can be."""
    low, high = axes.get_xlim()
    ridges = {name: rates[name] / rates["copy"] for name in STYLES}
    common: dict[str, Any] = {"textcoords": "offset points", "fontsize": SMALL, "va": "center"}
    for name, (color, _) in STYLES.items():
        axes.plot([ridges[name], high], [rates[name]] * 2, color=color, lw=1.5, alpha=0.6, zorder=1)
        text = f"{name} {rates[name] / 1e12:.3g} T/s"
        axes.annotate(text, (ridges[name], rates[name]), (-8, 3), ha="right", color=color, **common)
    end = max(ridges.values())
    axes.plot([low, end], [low * rates["copy"], end * rates["copy"]], color="0.6", lw=1.5, zorder=1)
    middle = (low * min(ridges.values())) ** 0.5
    text = f"copy {rates['copy'] / 1e12:.3g} TB/s"
    axes.annotate(text, (middle, middle * rates["copy"]), (-6, 6), ha="right", color="0.35", **common)


def draw_point(axes: Axes, point: Point) -> None:
    color, marker = STYLES[point.roof]
    common: dict[str, Any] = {"color": color, "marker": marker, "ms": 7, "zorder": 3}
    axes.plot(point.intensity, point.attainable, mfc="white", mew=1.5, **common)
    if point.reached is not None:
        axes.plot([point.intensity] * 2, [point.attainable, point.reached], color=color, lw=1, ls=":", zorder=2)
        axes.plot(point.intensity, point.reached, mec="white", mew=0.5, **common)


def draw_labels(axes: Axes, points: Sequence[Point]) -> None:
    """A column at the right of the panel, evenly spaced from the highest point to the lowest, each with a line."""
    # Points on one roof are equally high, but for rounding: of those the rightmost comes first, so that no lines cross.
    ordered = sorted(points, key=lambda point: (-round(math.log10(point.shown), 3), -point.intensity))
    for place, point in enumerate(ordered):
        share = "" if point.reached is None else f": {100 * point.reached / point.attainable:.0f} %"
        axes.annotate(
            point.label + share, (point.intensity, point.shown), (1.03, 1 - (place + 0.5) / len(points)),
            textcoords="axes fraction", va="center", fontsize=SMALL,
            arrowprops={"arrowstyle": "-", "color": STYLES[point.roof][0], "lw": 0.6, "alpha": 0.7, "relpos": (0, 0.5)},
        )  # fmt: skip


def legend(measured: bool) -> list[Line2D]:
    entries = []
    for name, (color, marker) in STYLES.items():
        common: dict[str, Any] = {"color": color, "marker": marker, "lw": 0, "ms": 7}
        entries.append(Line2D([], [], mfc="white", mew=1.5, label=f"{name}, at the floor", **common))
        if measured:
            entries.append(Line2D([], [], label=f"{name}, measured (share of the roof)", **common))
    return entries
