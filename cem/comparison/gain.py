"""How much more a method makes attackers err at equal accuracy, read from all runs together.

Points lost are the accuracy of the run without a penalty, of the same seed, noise and client, minus a run's own. Over
all runs with 0 to 2 points lost, by ordinary least squares::

    log MSE = method + b · points lost + seed          one b for all methods

A method's *gain at equal accuracy* over another one is the exponential of the difference of their two terms. A curve
read where it crosses some accuracy rests on two runs, and a single run scatters by some 7 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from cem.comparison.results import RunResult

MOST_POINTS = 2.0
"""Points lost beyond which a run does not count: nobody would pay them, and no common slope reaches so far."""
LEAST_DF = 12
"""Residual degrees of freedom of a claim; what rests on fewer is called a direction."""

_ROUNDING = 1e-9  # of a difference of percentages


def is_payable(points_lost: float) -> bool:
    """Whether somebody would pay so many points."""
    return points_lost <= MOST_POINTS + _ROUNDING


@dataclass(frozen=True)
class Observation:
    """One run.

    Attributes:
        method: its surrogate or variant, whatever its weight.
        seed: of the run.
        points_lost: accuracy of the control minus its own, in percentage points.
        mse: of the worst attack on unseen images.
    """

    method: str
    seed: int
    points_lost: float
    mse: float

    @property
    def counts(self) -> bool:
        """Whether the rule covers it."""
        return self.points_lost >= -_ROUNDING and is_payable(self.points_lost) and self.mse > 0


@dataclass(frozen=True)
class Gain:
    """How many times the error of another method one has at equal accuracy.

    Attributes:
        factor: above 1 where attackers err more; ``None`` where ``note`` says why nothing can be said.
        low: lower end of the 95 % interval, or ``None`` where no scatter is left to tell.
        high: upper end.
        df: residual degrees of freedom.
        is_claim: whether the runs carry it; otherwise it is a direction.
        note: why something is missing, else empty.
    """

    factor: float | None
    low: float | None = None
    high: float | None = None
    df: int = 0
    is_claim: bool = False
    note: str = ""

    @property
    def called(self) -> str:
        """``"claim"``, ``"direction"``, or empty without a factor."""
        return "" if self.factor is None else "claim" if self.is_claim else "direction"


class Fit:
    """The regression over the runs that count.

    Args:
        observations: at one noise, behind one client, runs that do not count among them.

    Attributes:
        runs: how many observations there were.
        counted: the runs that it rests on.
        methods: those of them, in the order of ``observations``.
        df: residual degrees of freedom.
        scatter: standard deviation of a single run's log error, or ``None`` without degrees of freedom.
        slope: ``b``, by which the log error grows with a point lost, or ``None`` where it cannot be told from the
            methods' own terms.
    """

    def __init__(self, observations: Sequence[Observation]) -> None:
        self.runs = len(observations)
        self.counted = [each for each in observations if each.counts]
        self.methods = list(dict.fromkeys(each.method for each in self.counted))
        seeds = list(dict.fromkeys(each.seed for each in self.counted))
        self._seeds = len(seeds)
        rows = [
            [each.points_lost, *(each.method == name for name in self.methods), *(each.seed == s for s in seeds[1:])]
            for each in self.counted
        ]
        design = np.array(rows, dtype=np.float64).reshape(len(rows), len(self.methods) + max(1, len(seeds)))
        errors = np.log([each.mse for each in self.counted])
        self._inverse = np.linalg.pinv(design, rcond=1e-9)
        self._identified = self._inverse @ design
        self._solution = self._inverse @ errors
        self.df = len(rows) - round(np.trace(self._identified))
        residual = errors - design @ self._solution
        self.scatter = math.sqrt(float(residual @ residual) / self.df) if self.df else None
        self.slope = float(self._solution[0]) if self._tells(np.eye(design.shape[1])[0]) else None

    def gain(self, method: str, over: str) -> Gain:
        """That of ``method`` over another one; where the runs cannot tell, its ``note`` says why."""
        for name in (method, over):
            if name not in self.methods:
                return Gain(None, note=f"no run of {name} has lost 0 to {MOST_POINTS:g} points")
        contrast = np.zeros(len(self._solution))
        contrast[1 + self.methods.index(method)] += 1.0
        contrast[1 + self.methods.index(over)] -= 1.0
        if not self._tells(contrast):
            return Gain(None, note="too few runs to tell the method from the price in accuracy: more seeds or weights")
        difference = float(contrast @ self._solution)
        if self.scatter is None:
            return Gain(math.exp(difference), note="as many unknowns as runs: no interval")
        reach = float(student.ppf(0.975, self.df)) * self.scatter * float(np.linalg.norm(contrast @ self._inverse))
        ends = math.exp(difference - reach), math.exp(difference + reach)
        note = "" if self._seeds > 1 else "one seed: how trainings scatter is not known"
        return Gain(math.exp(difference), *ends, self.df, self.df >= LEAST_DF and self._seeds > 1, note)

    def _tells(self, contrast: NDArray[np.float64]) -> bool:
        """Whether all solutions agree on it."""
        return np.allclose(contrast @ self._identified, contrast, atol=1e-6)


def fit_levels(results: Sequence[RunResult]) -> dict[str, Fit]:
    """A regression for every level, noise and client, that has a finished control, of the finished runs at that level.

    More noise, or a client that computes more, makes every attacker err more and accuracy cheaper to lose, so neither
    ``b`` nor a method's term needs be the same at two levels.
    """
    levels: dict[str, list[Observation]] = {}
    for result in results:
        lost, mse = result.figures["points_lost"], result.figures["worst_mse"]
        if result.status == "finished" and lost is not None and mse is not None:
            setting = result.run.setting
            level = levels.setdefault(setting.level, [])
            level.append(Observation(setting.method, result.run.seed, lost, mse))
    return {level: Fit(observations) for level, observations in levels.items()}
