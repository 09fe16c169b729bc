"""Means and spreads over seeds, setting by setting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev

from cem.comparison.grid import Setting
from cem.comparison.results import RunResult, names_of


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
        converged: finished runs whose attacks had all the time they needed.
        figures: by their names, over the finished runs, so that all are of the same ones; before there is any, over the
            runs that have them.
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
    def points_lost(self) -> Spread | None:
        """Against the control of the same noise, client and seed."""
        return self.figures["points_lost"]

    @property
    def mse(self) -> Spread | None:
        """MSE of the worst attack on unseen images."""
        return self.figures["worst_mse"]


def summarize(results: Sequence[RunResult]) -> list[Row]:
    """One row a setting, in the order of ``results``, where runs of a setting lie side by side."""
    rows, names = [], names_of(results)
    for setting, group in groupby(results, key=lambda result: result.run.setting):
        runs = list(group)
        finished, failed = ([run for run in runs if run.status == status] for status in ("finished", "failed"))
        figures = {name: spread(run.figures.get(name) for run in finished or runs) for name in names}
        converged = sum(not run.restless for run in finished)
        rows.append(Row(setting, len(runs), len(finished), len(failed), converged, figures))
    return rows
