"""Ratios that survive a noisy machine: callables timed turn by turn, so that a slow minute slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def seconds(call: Callable[[], object], iterations: int) -> float:
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    return (time.perf_counter() - start) / iterations


def in_turns(calls: Mapping[str, Callable[[], object]], iterations: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one untimed call of each."""
    for call in calls.values():
        call()
    timed = [{name: seconds(call, iterations) for name, call in calls.items()} for _ in range(rounds)]
    return {name: [found[name] for found in timed] for name in calls}


def quartiles(samples: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4)
    return {"q1": round(low, 3), "median": round(median, 3), "q3": round(high, 3)}


def times_slower(
    peer: Callable[[], object], call: Callable[[], object], iterations: int, rounds: int = 9
) -> dict[str, float]:
    """How many times the seconds of ``call`` the ``peer`` takes: quartiles of the ratios of neighboring rounds."""
    found = in_turns({"peer": peer, "call": call}, iterations, rounds)
    return quartiles([slow / fast for slow, fast in zip(found["peer"], found["call"], strict=True)])
