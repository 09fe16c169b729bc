"""Training curves: what was minimized, what came of it, and under which weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator, PercentFormatter

from cem.report.figure import COLORS, new_figure, plain, save_figure


def draw_curves(history: Sequence[Mapping[str, float]], path: Path, *, best_epoch: int | None = None) -> None:
    """Draw a run's history as three panels over its epochs: loss terms, accuracies, schedules.

    Args:
        history: rows with the columns of ``metrics.csv``, one per epoch.
        path: the PNG to write.
        best_epoch: marked in every panel.

    Raises:
        ValueError: if ``history`` is empty.
    """
    if not history:
        raise ValueError("there are no epochs to draw")
    epochs = [row["epoch"] for row in history]

    def column(name: str) -> list[float]:
        return [row[name] for row in history]

    figure = new_figure(8, 8)
    loss, accuracy, schedule = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    marker = "." if len(history) <= 40 else ""

    weighted = [row["lambda_eff"] * row["rob_loss"] for row in history]
    terms = {"cross-entropy": (column("cross_entropy"), COLORS[0], "-")}
    if any(weighted):
        terms["sum"] = (column("train_loss"), "0.2", "-")
        terms[r"$\lambda_{\mathrm{eff}}\cdot$penalty"] = (weighted, COLORS[1], "-")
        terms["penalty"] = (column("rob_loss"), COLORS[1], ":")
    for name, (values, color, style) in terms.items():
        # Terms fall by orders of magnitude; a penalty that has reached 0 leaves a log axis, and its line
        # ends.
        shown = [value if value > 0 else math.nan for value in values]
        loss.plot(epochs, shown, color=color, linestyle=style, marker=marker, label=name)
    loss.set_ylabel("training loss")
    loss.set_yscale("log")

    accuracy.plot(epochs, column("train_accuracy"), color=COLORS[0], marker=marker, label="training")
    accuracy.plot(epochs, column("val_accuracy"), color=COLORS[2], marker=marker, label="validation")
    accuracy.set_ylabel("accuracy")
    accuracy.set_ylim(0, 1.02)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))

    # Steps, because both are constant within an epoch.
    schedule.step(epochs, column("lr"), where="mid", color="0.2", label="learning rate")
    schedule.set_ylabel("learning rate")
    schedule.set_yscale("log")
    weight = schedule.twinx()
    weight.step(epochs, column("lambda_eff"), where="mid", color=COLORS[1], label=r"$\lambda_{\mathrm{eff}}$")
    weight.set_ylabel(r"$\lambda_{\mathrm{eff}}$", color=COLORS[1])
    weight.tick_params(axis="y", colors=COLORS[1])
    weight.set_ylim(bottom=0)
    weight.spines[["top", "left"]].set_visible(False)
    schedule.set_xlabel("epoch")
    schedule.xaxis.set_major_locator(MaxNLocator(integer=True))

    for axes in (loss, accuracy, schedule):
        plain(axes)
        if best_epoch is not None:
            axes.axvline(best_epoch, color="0.5", ls="--", lw=1, label=f"best epoch ({best_epoch})", zorder=1)
    for axes in (loss, accuracy):
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
