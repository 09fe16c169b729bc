"""Clocks for a CUDA device.

GPU time is that of CUDA-graph replays: one graph holds one call for each copy of the inputs, so that a call finds none
of its inputs in the L2 cache, and a sample is as many replays as take two milliseconds or more, behind a replay that
keeps the device busy while the host enqueues them. What cannot be captured is timed by events around as many calls.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.report import describe
from benchmarks.interleaved import in_turns
from benchmarks.steps import Step

SAMPLES = 20  # of a figure
SAMPLE_SECONDS = 2e-3
MOST_SECONDS = 1.0  # for all samples of one figure, but never fewer than three samples
WARM_SECONDS = 0.05  # of work before the first sample: an idle device raises its clocks only then
MOST_COPIES = 64

# Of an H200, for predictions before anything is measured: a large copy's bytes a second, read and written; operations
# a second of large products; seconds from one small kernel of a graph to the next; seconds for which a load waits,
# somewhere between the L2 cache and memory.
ASSUMED = {"copy": 4.3e12, "bf16": 780e12, "fp32": 50e12, "gap": 2.0e-6, "latency": 0.5e-6}


class Play(NamedTuple):
    """All steps as one call, and ``how`` they are played: ``graph``, or ``events: `` and why there is no graph.

    ``written`` is what a graph writes: results that share an address would stay in the cache.
    """

    call: Callable[[], object]
    steps: Sequence[Step]
    how: str
    written: object = None


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Median of seconds (or of anything else), and the quantiles at 20 and 80 %."""
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else [*samples] * 2
    found = {"q20": low, "median": statistics.median(samples), "q80": high}
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def copies_for(call_bytes: float, cache_bytes: float) -> int:
    """How many copies of a call's inputs make a round of calls move three times the cache, from 2 to 64."""
    return min(max(math.ceil(3 * cache_bytes / call_bytes), 2), MOST_COPIES)


def cache_bytes() -> int:
    """Bytes of the L2 cache; an H200's where this PyTorch does not tell."""
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 60 * 2**20


class Timer:
    """Times on one side stream, on which inputs and graphs of autograd are made too: a capture allows no other."""

    def __init__(self) -> None:
        self.stream: Any = torch.cuda.Stream()
        self.cache: float = cache_bytes()

    def play(self, steps: Sequence[Step], uncapturable: str | None = None) -> Play:
        """Steps made ready, each run once, so that nothing is compiled or allocated for the first time in a capture.

        Args:
            steps: of equal work.
            uncapturable: why no capture is tried.
        """
        for step in steps:
            step()
        torch.cuda.synchronize()
        if uncapturable is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    written = [step() for step in steps]
                return Play(graph.replay, steps, "graph", written)
            except Exception as error:
                torch.cuda.synchronize()
                uncapturable = describe(error)
        return Play(lambda: [step() for step in steps], steps, f"events: {uncapturable}")

    def samples(self, play: Play, calls: int | None = None) -> list[float]:
        """Seconds of device time of a step, or of one of so many ``calls``: enough of them in a sample."""
        once = self.elapsed(play, 1)
        for _ in range(math.ceil(WARM_SECONDS / max(once, 1e-6)) - 2):
            play.call()
        repeats = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
        count = max(3, min(SAMPLES, int(MOST_SECONDS / (once * (repeats + 1)))))
        return [self.elapsed(play, repeats) / (repeats * (calls or len(play.steps))) for _ in range(count)]

    def elapsed(self, play: Play, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        play.call()  # keeps the device busy while the rest is enqueued
        start.record()
        for _ in range(repeats):
            play.call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def wall(self, play: Play) -> list[float]:
        """Seconds of a call on the host's clock, launches included: a round of all, and the device awaited."""

        def launched() -> None:
            for step in play.steps:
                step()
            torch.cuda.synchronize()

        return [each / len(play.steps) for each in in_turns({"": launched}, 5, 10e-3)[""]]

    def peak(self, step: Step) -> int:
        """Most bytes that a step holds above what was allocated before it, its results included."""
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        written = step()
        torch.cuda.synchronize()
        del written
        return int(torch.cuda.max_memory_allocated()) - before


def rates_of(timer: Timer, device: str, size: int = 8192, chain: int = 200) -> dict[str, float]:
    """``copy``, the matrix rates ``bf16``, ``fp32`` (TF32 off) and ``tf32``, and the ``gap`` between small kernels.

    Args:
        size: of the square random matrices; copied are sixteen of them, 4 GiB.
        chain: kernels in the graph whose every kernel needs the one before.
    """

    def seconds(step: Step, calls: int = 1) -> float:
        return statistics.median(timer.samples(timer.play([step]), calls))

    def product(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        return (left @ right,)

    source = torch.randn(16 * size, size, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.nbytes / seconds(lambda: (target.copy_(source),))}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("tf32", torch.float32)):
        pair = source[:size].to(dtype), source[size : 2 * size].to(dtype)
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        found[name] = 2 * size**3 / seconds(partial(product, *pair))
    torch.backends.cuda.matmul.allow_tf32 = False
    small = torch.randn(1024, device=device)
    found["gap"] = seconds(lambda: tuple(small.mul_(1.0) for _ in range(chain)), chain)
    return {name: float(f"{value:.4g}") for name, value in found.items()}
