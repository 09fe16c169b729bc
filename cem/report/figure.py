"""Figures without pyplot: no global backend is chosen, no window opens, nothing stays in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from cem.files import replacing

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette: told apart under every kind of color blindness."""


def new_figure(width: float, height: float, *, layout: str | None = "constrained") -> Figure:
    """An empty figure of ``width`` × ``height`` inches, drawn by Agg whatever backend the program uses."""
    figure = Figure(figsize=(width, height), layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure


LONGEST_NAME = 32
"""Characters; more of a name leave no room for the picture."""


def drawn(name: str, *, longest: int = LONGEST_NAME) -> str:
    """``name`` as pictures show it: on one line, and shortened in its middle."""
    name = " ".join("".join(each if each.isprintable() else " " for each in name).split())
    half = longest // 2
    return name if len(name) <= longest else f"{name[: half - 1]}…{name[-half:]}"


def add_legend(owner: Axes | Figure, entries: Iterable[tuple[str, Artist]], **options: Any) -> None:
    """A legend that calls every artist by its name, be it ``_background_`` or ``$5_bill$``."""
    names, artists = zip(*entries, strict=True)
    # Texts that are made inside know no mathematics.
    with matplotlib.rc_context({"text.parse_math": False}):
        owner.legend(artists, [drawn(name) for name in names], frameon=False, **options)


def raise_until_apart(figure: Figure, labels: Sequence[Annotation]) -> None:
    """Lift those of ``labels``, offset in points, that stand on earlier ones, until each can be read."""
    figure.draw_without_rendering()
    taken: list[Bbox] = []
    for label in labels:
        own = Text.get_window_extent(label)  # an annotation's own would count its arrow
        x, y = label.xyann
        step = figure.dpi / 72
        lifted = next(n for n in count() if not any(own.translated(0, n * step).overlaps(other) for other in taken))
        label.xyann = (x, float(y) + lifted)
        taken.append(own.translated(0, lifted * step))


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG to ``path``, at 150 dots per inch; a file that exists is complete."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def logarithmic(axes: Axes, low: float, high: float) -> None:
    """Let the horizontal axis, from ``low`` to ``high``, be logarithmic, with ticks that say what they stand for."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    subs = (1, 2, 5) if high / low > 30 else (1, 1.5, 2, 3, 5, 7)
    axes.xaxis.set_major_locator(LogLocator(subs=subs) if high / low > 4 else MaxNLocator(6))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def plain(axes: Axes, *, grid: bool = True) -> None:
    """Take the box off a plot and leave light guide lines."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
