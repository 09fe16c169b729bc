"""Bootstrap intervals of rank correlations over settings, each with all of its seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from cem.comparison.correlation import RESAMPLES, interval, rank_correlation


def resamples(settings: Sequence[Hashable], seed: int = 0) -> list[NDArray[np.int64]]:
    """Indices ``[R, m]`` of resamples, one array for each size ``m`` that they have; 10 000 in all.

    Settings are drawn with replacement, each with all of its pairs: pairs of one setting, such as one a seed, are not
    independent.

    Args:
        settings: of every pair.
        seed: of the resampling.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, setting in enumerate(settings):
        members[setting].append(index)
    of_setting = [np.array(indices) for indices in members.values()]
    by_size: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
    for resample in np.random.default_rng(seed).integers(len(of_setting), size=(RESAMPLES, len(of_setting))):
        indices = np.concatenate([of_setting[setting] for setting in resample])
        by_size[len(indices)].append(indices)
    return [np.stack(alike) for alike in by_size.values()]


def spearman_difference(
    x: Sequence[float], other: Sequence[float], y: Sequence[float], drawn: Sequence[NDArray[np.int64]]
) -> tuple[float, float, float]:
    """``ρ(x, y) − ρ(other, y)`` with a 95 % percentile bootstrap interval over the triples.

    Intervals of two correlations with the same ``y`` may overlap where one is the larger in nearly every resample: what
    spoils one spoils the other. So both are taken from the same resamples.

    Args:
        x, other, y: finite numbers, equally many, each not all the same.
        drawn: see :func:`resamples`.

    Returns:
        The difference and both ends of its interval.
    """
    a, b, c = (np.asarray(values, dtype=np.float64) for values in (x, other, y))
    found = [rank_correlation(a[index], c[index]) - rank_correlation(b[index], c[index]) for index in drawn]
    whole = rank_correlation(a[None], c[None]) - rank_correlation(b[None], c[None])
    return float(whole[0]), *interval(found)
