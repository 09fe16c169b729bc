"""Ratios that survive a noisy machine: callables timed turn by turn, so that a slow minute slows all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm


def seconds(call: Callable[[], object], iterations: int) -> float:
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    return (time.perf_counter() - start) / iterations


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, at_least: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one untimed call of each.

    Args:
        calls: by name.
        rounds: in each of which all have their turn.
        at_least: seconds of a turn, filled with as many calls as it takes.
    """
    for call in calls.values():
        call()
    iterations = dict.fromkeys(calls, 1)
    if at_least > 0:
        iterations = {name: max(1, math.ceil(at_least / seconds(call, 1))) for name, call in calls.items()}
    turns = tqdm(range(rounds), unit="round", leave=False, disable=None)
    timed = [{name: seconds(call, iterations[name]) for name, call in calls.items()} for _ in turns]
    return {name: [found[name] for found in timed] for name in calls}


def quartiles(samples: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4)
    return {"q1": round(low, 3), "median": round(median, 3), "q3": round(high, 3)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times the seconds of ``fast`` the ``slow`` one takes: quartiles of the ratios of neighboring rounds."""
    return quartiles([one / other for one, other in zip(slow, fast, strict=True)])
