"""What a client buys against the attacker for what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D

from cem.report.figure import COLORS, add_legend, drawn, logarithmic, new_figure, plain, raise_until_apart, save_figure

ROOM = 1.25
"""Times the smallest and the largest client, where the axis ends."""


@dataclass(frozen=True)
class Priced:
    """One setting: means over its runs.

    Attributes:
        method: has a color.
        client: what computes the features, in words.
        multiply_adds: of the client, an image.
        mse: of the worst attack on unseen images.
        accuracy: on the test set, in [0, 1].
    """

    method: str
    client: str
    multiply_adds: float
    mse: float
    accuracy: float


def draw_frontier(settings: Sequence[Priced], least: float, path: Path) -> None:
    """Draw the error of the worst attack over the client's multiply-adds; up and to the left is better.

    Settings that are accurate enough have full marks, the others faint ones. A method's line joins the largest errors
    among the former, client by client; a client is named at the largest of its own.

    Args:
        settings: methods are colored in the order in which they come.
        least: accuracy that is enough, in [0, 1].
        path: the PNG to write.

    Raises:
        ValueError: if there are no settings.
    """
    if not settings:
        raise ValueError("there are no settings to draw")
    figure = new_figure(7, 5)
    axes = figure.subplots()
    entries: list[tuple[str, Line2D]] = []
    enough = sorted((each for each in settings if each.accuracy >= least), key=lambda each: each.mse)
    for index, method in enumerate(dict.fromkeys(each.method for each in settings)):
        color = COLORS[index % len(COLORS)]
        own = [each for each in settings if each.method == method]
        colors = [to_rgba(color, 1.0 if each.accuracy >= least else 0.25) for each in own]
        axes.scatter([each.multiply_adds / 1e6 for each in own], [each.mse for each in own], s=35, c=colors, zorder=3)
        best = {each.multiply_adds / 1e6: each.mse for each in enough if each.method == method}  # the last of each wins
        axes.plot(sorted(best), [best[x] for x in sorted(best)], color=color, lw=1.5, zorder=2)
        entries.append((method, Line2D([], [], color=color, lw=3)))
    labels = [
        axes.annotate(
            drawn(client), (each.multiply_adds / 1e6, each.mse), (0, 7), textcoords="offset points", ha="center",
            fontsize=8, zorder=5, arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.6, "shrinkA": 0, "shrinkB": 3},
        )
        for client, each in {each.client: each for each in enough}.items()
    ]  # fmt: skip
    entries.append((f"at least {100 * least:.1f} % accurate", Line2D([], [], color="0.4", lw=0, marker="o", ms=6)))
    if len(enough) < len(settings):
        entries.append(("less", Line2D([], [], color="0.4", lw=0, marker="o", ms=6, alpha=0.25)))
    costs = [each.multiply_adds / 1e6 for each in settings]
    logarithmic(axes, min(costs) / ROOM, max(costs) * ROOM)
    axes.margins(y=0.15)
    axes.set_xlabel("multiply-adds of the client for an image, in millions, logarithmic")
    axes.set_ylabel("MSE of the worst attack on unseen images")
    plain(axes)
    add_legend(figure, entries, loc="outside lower center", ncols=2)
    raise_until_apart(figure, labels)
    save_figure(figure, path)
