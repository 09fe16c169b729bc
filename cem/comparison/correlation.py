"""Whether a surrogate's value says anything about what an attacker reconstructs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from cem.comparison.results import RunResult

RESAMPLES = 10_000
LEAST_RUNS = 4


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation between a surrogate's value and the worst attack's MSE on unseen images.

    Values are penalties, so a good surrogate has a strongly *negative* one: the lower its value, the larger the
    attacker's error.

    Attributes:
        value: whose value it is.
        level: noise and client that the runs share, or ``None`` for all runs.
        n: runs that have both figures.
        rho: in [−1, 1], or ``None`` where ``note`` says why there is none.
        low: lower end of the 95 % interval, or ``None``.
        high: upper end.
        note: why something is missing, else empty.
    """

    value: str
    level: str | None
    n: int
    rho: float | None
    low: float | None
    high: float | None
    note: str = ""


def correlate(results: Sequence[RunResult]) -> list[Correlation]:
    """Correlations of every value, over all runs and, if there are several, within every level."""
    names = dict.fromkeys(name for result in results for name in result.values)
    levels = dict.fromkeys(result.run.setting.level for result in results)
    found = []
    for name in names:
        for level in (None, *(levels if len(levels) > 1 else ())):
            pairs = [
                (value, mse)
                for result in results
                if level in (None, result.run.setting.level)
                if (value := result.values.get(name)) is not None
                if (mse := result.figures["worst_mse"]) is not None
            ]
            rho, low, high, note = spearman([value for value, _ in pairs], [mse for _, mse in pairs])
            found.append(Correlation(name, level, len(pairs), rho, low, high, note))
    return found


def spearman(
    x: Sequence[float], y: Sequence[float], *, drawn: Sequence[NDArray[np.int64]] | None = None
) -> tuple[float | None, float | None, float | None, str]:
    """Spearman's ρ with a 95 % percentile bootstrap interval over the pairs.

    A resample in which one of both is constant has no correlation and is left out; the interval is the 2.5th to the
    97.5th percentile of the others.

    Args:
        x: finite numbers.
        y: as many.
        drawn: indices ``[R, m]`` of resamples; by default 10 000 of the pairs, with replacement and a fixed seed.

    Returns:
        ρ, both ends of the interval, and a note. With fewer than 4 pairs, or where one of both is constant, the
        three are ``None`` and the note says why.
    """
    n = len(x)
    if n < LEAST_RUNS:
        return None, None, None, f"fewer than {LEAST_RUNS} runs"
    pairs = np.array([x, y], dtype=np.float64)
    for values, name in zip(pairs, ("the value", "the attack MSE"), strict=True):
        if np.ptp(values) == 0:
            return None, None, None, f"{name} is the same in all runs"
    if drawn is None:
        drawn = [np.random.default_rng(0).integers(n, size=(RESAMPLES, n))]
    low, high = interval([rank_correlation(pairs[0][index], pairs[1][index]) for index in drawn])
    return float(rank_correlation(pairs[0][None], pairs[1][None])[0]), low, high, ""


def interval(resampled: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """From the 2.5th to the 97.5th percentile of what is finite."""
    found = np.concatenate(resampled)
    low, high = np.percentile(found[np.isfinite(found)], [2.5, 97.5])
    return float(low), float(high)


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's ρ of every row ``[R, n]``, by its definition: Pearson's of the ranks, ties sharing theirs."""
    a, b = (rankdata(values, axis=1) for values in (x, y))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    norm = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    with np.errstate(invalid="ignore"):
        return np.clip((a * b).sum(axis=1) / norm, -1.0, 1.0)
