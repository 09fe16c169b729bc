"""Surrogates at equal accuracy: what the attacker errs by on the curve that the weight λ draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cem.comparison.statistics import Row

LOSSES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Points of test accuracy below none at which curves are read."""


@dataclass(frozen=True)
class Curve:
    """All settings of a surrogate at one noise.

    Attributes:
        surrogate, noise_std: what they have in common.
        points: mean test accuracy, in [0, 1], and mean attack MSE of none, then of every weight, in rising order.
    """

    surrogate: str
    noise_std: float
    points: tuple[tuple[float, float], ...]

    def mse_at(self, loss: float) -> float | None:
        """Attack MSE where ``loss`` points of accuracy are paid, or ``None`` if the curve does not come down there.

        Between two settings the curve is straight in accuracy and log MSE. Where it passes the accuracy several times,
        the last time counts: by then the most privacy is had at this price.
        """
        accuracy = self.points[0][0] - loss / 100
        found = None
        for (above, less), (below, more) in zip(self.points, self.points[1:], strict=False):
            if above >= accuracy >= below - 1e-9 and above > below:  # rounding must not lose a setting that lies there
                share = min(1.0, (above - accuracy) / (above - below))
                found = math.exp((1 - share) * math.log(less) + share * math.log(more))
        return found

    def times(self, row: Row) -> float | None:
        """Attack MSE of a setting over that of this curve at the setting's accuracy: above 1, it is the better buy.

        ``None`` for a setting of the curve itself, at another noise, or where the curve does not come down to it.
        """
        setting = row.setting
        if setting.noise_std != self.noise_std or setting.surrogate in ("none", self.surrogate):
            return None
        if not row.accuracy or not row.mse:
            return None
        here = self.mse_at(100 * (self.points[0][0] - row.accuracy.mean))
        return None if here is None else row.mse.mean / here


def curves(rows: Sequence[Row]) -> list[Curve]:
    """The curve of every surrogate at every noise at which there is a none to begin it, in the order of ``rows``."""
    found = []
    for none in rows:
        if none.setting.surrogate != "none":
            continue
        noise_std = none.setting.noise_std
        others = [row for row in rows if row.setting.noise_std == noise_std and row is not none]
        for surrogate in dict.fromkeys(row.setting.surrogate for row in others):
            own = sorted(
                (row for row in others if row.setting.surrogate == surrogate), key=lambda row: row.setting.lambd
            )
            points = [(row.accuracy.mean, row.mse.mean) for row in (none, *own) if row.accuracy and row.mse]
            if none.accuracy and none.mse and len(points) > 1:
                found.append(Curve(surrogate, noise_std, tuple(points)))
    return found
