"""Means and spreads over seeds, setting by setting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev

from cem.comparison.grid import Setting
from cem.comparison.results import FIGURES, RunResult


@dataclass(frozen=True)
class Spread:
    """A mean over ``n`` runs.

    Attributes:
        mean: arithmetic mean.
        std: sample standard deviation (divided by n − 1), ``None`` for a single run.
        n: runs that have the figure.
    """

    mean: float
    std: float | None
    n: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and sample standard deviation of the values that are there, or ``None`` if none is."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Spread(fmean(there), stdev(there) if len(there) > 1 else None, len(there))


@dataclass(frozen=True)
class Row:
    """All runs of one setting.

    Attributes:
        setting: what they have in common.
        planned: runs that the comparison asks for.
        finished: runs that were trained and attacked.
        failed: runs that were not, because a step of theirs failed.
        converged: finished runs whose strongest attacker had converged.
        figures: by the names in :data:`~cem.comparison.results.FIGURES`, over the finished runs, so that all are of the
            same ones; before there is any, over the runs that have them.
    """

    setting: Setting
    planned: int
    finished: int
    failed: int
    converged: int
    figures: dict[str, Spread | None]

    @property
    def accuracy(self) -> Spread | None:
        """Test accuracy, in [0, 1]."""
        return self.figures["test_accuracy"]

    @property
    def mse(self) -> Spread | None:
        """MSE of the strongest attacker on unseen images."""
        return self.figures["test_mse"]


def summarize(results: Sequence[RunResult]) -> list[Row]:
    """One row a setting, in the order of ``results``, where runs of a setting lie side by side."""
    rows = []
    for setting, group in groupby(results, key=lambda result: result.run.setting):
        runs = list(group)
        finished, failed = ([run for run in runs if run.status == status] for status in ("finished", "failed"))
        figures = {name: spread(run.figures[name] for run in finished or runs) for name in FIGURES}
        converged = sum(run.converged is True for run in runs)
        rows.append(Row(setting, len(runs), len(finished), len(failed), converged, figures))
    return rows


def dominated(rows: Sequence[Row]) -> dict[Setting, Setting]:
    """Settings for which another one has a higher mean attack MSE at no lower mean accuracy, and that other one.

    Where several do, the one with the highest MSE is named. Settings without both figures are left out.
    """
    points = {row.setting: (row.accuracy.mean, row.mse.mean) for row in rows if row.accuracy and row.mse}
    beaten = {}
    for setting, (accuracy, mse) in points.items():
        better = [other for other, point in points.items() if point[0] >= accuracy and point[1] > mse]
        if better:
            beaten[setting] = max(better, key=lambda other: points[other][1])
    return beaten
