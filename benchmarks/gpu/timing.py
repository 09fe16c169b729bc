"""Clocks for a CUDA device.

GPU time is that of CUDA-graph replays: one graph holds one call for each copy of the inputs, so that a call finds none
of its inputs in the L2 cache, and a sample is as many replays as take two milliseconds or more, behind a replay that
keeps the device busy while the host enqueues them. What cannot be captured is timed by events around as many calls.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from benchmarks.gpu.errors import describe
from benchmarks.steps import Step

SAMPLE_SECONDS = 2e-3
MOST_SECONDS = 1.5  # for all samples of one figure, but never fewer than five samples
MOST_COPIES = 64


class Timer(Protocol):
    """What the runner needs of a clock; the tests bring one that needs no device."""

    def device_time(self, steps: Sequence[Step], uncapturable: str | None) -> dict[str, Any]: ...

    def wall_time(self, steps: Sequence[Step]) -> dict[str, Any]: ...

    def peak_bytes(self, step: Step) -> int: ...


def quantiles(samples: list[float]) -> dict[str, Any]:
    """Seconds of a call: the samples, their median, and the quantiles at 20 and 80 %."""
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 2
    rounded = [float(f"{sample:.5g}") for sample in samples]
    return {"q20": low, "median": statistics.median(samples), "q80": high, "samples": rounded}


def copies_for(call_bytes: float, cache_bytes: float) -> int:
    """How many copies of a call's inputs make a round of calls move three times the cache, from 2 to 64."""
    return min(max(math.ceil(3 * cache_bytes / call_bytes), 2), MOST_COPIES)


def cache_bytes() -> int:
    """Bytes of the L2 cache; an H200's where this PyTorch does not tell."""
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 60 * 2**20


class DeviceTimer:
    """Times on one side stream, on which inputs are made and graphs of autograd built too: a capture allows no other.

    Args:
        samples: of each figure.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.stream = torch.cuda.Stream()

    def device_time(self, steps: Sequence[Step], uncapturable: str | None) -> dict[str, Any]:
        """Seconds of device time of one step; ``uncapturable`` says why no capture is tried."""
        for step in steps:
            step()
        torch.cuda.synchronize()
        if uncapturable is None:
            try:
                return {"how": "graph replay", **self.replays(steps)}
            except Exception as error:
                torch.cuda.synchronize()
                uncapturable = describe(error)
        return {"how": "events", "why_no_graph": uncapturable, **self.events(steps)}

    def replays(self, steps: Sequence[Step]) -> dict[str, Any]:
        graph = torch.cuda.CUDAGraph()
        written = []  # kept until the end: results that share an address would stay in the cache
        with torch.cuda.graph(graph, stream=self.stream):
            for step in steps:
                written.append(step())
        with torch.cuda.stream(self.stream):
            return self.sampled(graph.replay, len(steps))

    def events(self, steps: Sequence[Step]) -> dict[str, Any]:
        def round_of_calls() -> None:
            for step in steps:
                step()

        return self.sampled(round_of_calls, len(steps))

    def sampled(self, play: Callable[[], object], calls: int) -> dict[str, Any]:
        """Times ``play``, which makes ``calls`` calls: enough of it in a sample, and as many samples as fit."""
        self.elapsed(play, 1)
        once = self.elapsed(play, 1)
        repeats = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
        samples = max(5, min(self.samples, int(MOST_SECONDS / (once * repeats))))
        times = [self.elapsed(play, repeats) / (repeats * calls) for _ in range(samples)]
        return {"calls_per_sample": repeats * calls, **quantiles(times)}

    def elapsed(self, play: Callable[[], object], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        play()  # keeps the device busy while the rest is enqueued
        start.record()
        for _ in range(repeats):
            play()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def wall_time(self, steps: Sequence[Step]) -> dict[str, Any]:
        """Seconds of a call on the host's clock, launches included: many calls between two synchronizations."""
        torch.cuda.synchronize()

        def elapsed(rounds: int) -> float:
            start = time.perf_counter()
            for _ in range(rounds):
                for step in steps:
                    step()
            torch.cuda.synchronize()
            return time.perf_counter() - start

        rounds = max(1, math.ceil(10e-3 / max(elapsed(1), 1e-6)))
        return quantiles([elapsed(rounds) / (rounds * len(steps)) for _ in range(5)])

    def peak_bytes(self, step: Step) -> int:
        """Most bytes that a step holds above what was allocated before it, its results included."""
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        written = step()
        torch.cuda.synchronize()
        del written
        return int(torch.cuda.max_memory_allocated()) - before
