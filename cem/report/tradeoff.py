"""What a defense costs in accuracy, and what it buys against the attacker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from matplotlib.lines import Line2D

from cem.report.figure import COLORS, add_legend, drawn, logarithmic, new_figure, plain, save_figure

ROOM = 1.25
"""Times the smallest and the largest error, where the axis ends."""
_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        method: has a color.
        lambd: weight λ of its penalty.
        noise_std: σ of the noise: has a marker.
        mse: of the worst attack on unseen images.
        accuracy: on the test set, in [0, 1].
        client: what computes the features, in words; empty where all have the same.
    """

    method: str
    lambd: float
    noise_std: float
    mse: float
    accuracy: float
    client: str = ""


def draw_tradeoff(points: Sequence[Point], controls: Mapping[str, float], path: Path) -> None:
    """Draw accuracy over the error of the worst attack; up and to the right is better.

    Every run has a full marker, every setting a hollow one at its mean. Solid lines join the settings of one
    method, client and λ by their noise: that of the control is what noise alone buys. Dashed lines join those of one
    method, client and noise by λ. The axes follow the runs: a control that lies beyond them is named, and not drawn.

    Args:
        points: one a run; methods are colored in the order in which they come, and numbered where there are
            more of them than colors.
        controls: errors of answers that need no features, by name; vertical lines.
        path: the PNG to write.

    Raises:
        ValueError: if there are no points.
    """
    if not points:
        raise ValueError("there are no runs to draw")
    figure = new_figure(7, 5.8)
    axes = figure.subplots()
    noises = sorted({point.noise_std for point in points})
    markers = {noise: _MARKERS[index % len(_MARKERS)] for index, noise in enumerate(noises)}
    entries: list[tuple[str, Line2D]] = []
    dashed = False
    methods = list(dict.fromkeys(point.method for point in points))
    for index, method in enumerate(methods):
        color = COLORS[index % len(COLORS)]
        # Where colors do not suffice, numbers tell methods apart.
        number = f"{index + 1} " if len(methods) > len(COLORS) else ""
        settings: dict[tuple[str, float, float], list[Point]] = {}
        for point in points:
            if point.method == method:
                settings.setdefault((point.client, point.lambd, point.noise_std), []).append(point)
        clients, lambds = dict.fromkeys(key[0] for key in settings), sorted({key[1] for key in settings})
        means = {}
        for (client, lambd, noise), runs in settings.items():
            x, y = [run.mse for run in runs], [100 * run.accuracy for run in runs]
            mean = means[client, lambd, noise] = fmean(x), fmean(y)
            axes.scatter(*mean, marker=markers[noise], s=130, facecolors="white", edgecolors=color, lw=1.5, zorder=3)
            axes.scatter(x, y, marker=markers[noise], s=20, color=color, alpha=0.7, linewidths=0, zorder=4)
            text = number + ", ".join(filter(None, (f"λ {lambd:g}" if len(lambds) > 1 else "", drawn(client))))
            axes.annotate(text, mean, (8, 6), textcoords="offset points", fontsize=8, color=color, zorder=5)
        for client, lambd in product(clients, lambds):
            joined = [means[client, lambd, noise] for noise in noises if (client, lambd, noise) in means]
            axes.plot(*zip(*joined, strict=True), color=color, lw=1.5, zorder=2)
        for client, noise in product(clients, noises):
            joined = [means[client, lambd, noise] for lambd in lambds if (client, lambd, noise) in means]
            if len(joined) > 1:
                dashed = True
                axes.plot(*zip(*joined, strict=True), color=color, lw=1.2, ls=(0, (4, 3)), zorder=2)
        weight = f" λ {lambds[0]:g}" if len(lambds) == 1 and lambds[0] > 0 else ""
        entries.append((number + drawn(method) + weight, Line2D([], [], color=color, lw=3)))
    for noise in noises:
        marker = markers[noise]
        entries.append((f"noise σ {noise:g}", Line2D([], [], color="0.4", lw=0, marker=marker, ms=7, mfc="white")))
    entries += [
        ("a run", Line2D([], [], color="0.4", lw=0, marker="o", ms=5)),
        ("mean of a setting", Line2D([], [], color="0.4", lw=0, marker="o", ms=11, mfc="white")),
    ]
    if len(noises) > 1:
        entries.append(("the same λ, more noise", Line2D([], [], color="0.4", lw=1.5)))
    if dashed:
        entries.append(("the same noise, larger λ", Line2D([], [], color="0.4", lw=1.2, ls=(0, (4, 3)))))
    low, high = min(point.mse for point in points) / ROOM, max(point.mse for point in points) * ROOM
    for (name, mse), style in zip(controls.items(), (":", "--", "-."), strict=False):
        if low <= mse <= high:
            axes.axvline(mse, color="0.45", ls=style, lw=1.2, zorder=1)
            entries.append((f"{name}: {mse:.3g}", Line2D([], [], color="0.45", ls=style, lw=1.2)))
        else:
            entries.append((f"{name}: {mse:.3g}, beyond", Line2D([], [], color="0.45", lw=0, marker=">", ms=5)))
    logarithmic(axes, low, high)
    axes.set_xlabel("MSE of the worst attack on unseen images, logarithmic (higher: more private)")
    axes.set_ylabel("test accuracy [%]")
    plain(axes)
    long = max(len(name) for name, _ in entries) > 28  # three columns of such would be wider than the figure
    add_legend(figure, entries, loc="outside lower center", ncols=1 if long else 3)
    save_figure(figure, path)
