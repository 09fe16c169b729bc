"""How the error of each network fell while it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.ticker import MaxNLocator

from cem.report.figure import COLORS, add_legend, new_figure, plain, save_figure


def draw_attack_curves(attackers: Sequence[Mapping[str, Any]], controls: Mapping[str, float], path: Path) -> None:
    """Draw the validation MSE of every decoder over its epochs.

    Args:
        attackers: as in ``attack.json``: ``name``, ``curve``, ``best_epoch``, ``converged``. A filled dot marks
            the best epoch, a hollow one that of a decoder that had not converged.
        controls: name → MSE of attackers who look at no features, as horizontal lines.
        path: the PNG to write.

    Raises:
        ValueError: if there are no attackers.
    """
    if not attackers:
        raise ValueError("there are no attackers to draw")
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    entries: list[tuple[str, Artist]] = []
    for number, attacker in enumerate(attackers):
        color = COLORS[number % len(COLORS)]
        style = ("-", "--", ":", "-.")[number // len(COLORS) % 4]
        epochs = [row["epoch"] for row in attacker["curve"]]
        errors = [row["val_mse"] for row in attacker["curve"]]
        best = epochs.index(attacker["best_epoch"])  # an attack that starts from another has an epoch 0
        ended = attacker["converged"] is not False  # None: nobody can say
        label = attacker["name"] + ("" if ended else " (not converged)")
        entries.append((label, *axes.plot(epochs, errors, style, color=color, lw=1.3)))
        fill = color if ended else "white"
        axes.plot(epochs[best], errors[best], "o", color=color, markerfacecolor=fill)
    for style, (name, mse) in zip(("--", ":", "-."), controls.items(), strict=False):
        entries.append((name, axes.axhline(mse, color="0.5", linestyle=style, lw=1)))
    axes.set_yscale("log")
    axes.set_xlabel("epoch of the network's training")
    axes.set_ylabel("MSE on the attacker's validation images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes)
    add_legend(axes, entries, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
