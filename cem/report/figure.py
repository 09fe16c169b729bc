"""Figures without pyplot: no global backend is chosen, no window opens, nothing stays in memory."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cem.files import replacing

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette: told apart under every kind of color blindness."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of ``width`` × ``height`` inches, drawn by Agg whatever backend the program uses."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG to ``path``, at 150 dots per inch; a file that exists is complete."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def plain(axes: Axes, *, grid: bool = True) -> None:
    """Take the box off a plot and leave light guide lines."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
