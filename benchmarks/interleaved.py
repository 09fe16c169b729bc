"""Ratios that survive a noisy machine: two callables timed turn by turn, so that a slow minute slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def seconds(call: Callable[[], object], iterations: int) -> float:
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    return (time.perf_counter() - start) / iterations


def times_slower(
    peer: Callable[[], object], call: Callable[[], object], iterations: int, rounds: int = 9
) -> dict[str, float]:
    """How many times the seconds of ``call`` the ``peer`` takes: quartiles of the ratios of neighbouring rounds."""
    peer(), call()
    ratios = [seconds(peer, iterations) / seconds(call, iterations) for _ in range(rounds)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"q1": round(low, 3), "median": round(median, 3), "q3": round(high, 3)}
