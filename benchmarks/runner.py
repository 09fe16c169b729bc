"""One case: variants built and checked once, then timed side by side. What is wrong gets no time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from benchmarks.cases import ON_DEVICE, rivals_of
from benchmarks.gpu.timing import cache_bytes, copies_for
from benchmarks.interleaved import in_turns, ratio
from benchmarks.operators import CASES, Call, Spec
from benchmarks.steps import Step, keep_buffers, steps_of

ROUNDS = 9
ROUND_SECONDS = 10e-3  # or the scheduler's noise shows


class Runner:
    """One batch, on the device where there is one."""

    def __init__(self, spec: Spec) -> None:
        torch.compiler.reset()
        keep_buffers()
        torch.backends.cuda.matmul.allow_tf32 = False
        self.case = CASES[spec.operator](spec, "cuda" if ON_DEVICE else "cpu")
        self.calls: dict[str, Call] = {}

    def checked(self, variant: str) -> Call:
        """The variant, which computes what it should.

        Raises:
            AssertionError: it does not; says where and by how much.
        """
        if variant not in self.calls:
            call = self.case.build(variant)
            verdict = self.case.check(variant, call)
            assert verdict.passed, f"{variant} is wrong: {verdict}"
            self.calls[variant] = call
        return self.calls[variant]

    def run(self, benchmark: Any, own: str, direction: str) -> None:
        """Time ``own`` for pytest-benchmark, and beside its rivals for the row in ``extra_info``."""
        spec = self.case.spec
        plays = {name: self.play(name, direction) for name in (own, *rivals_of(spec, own))}
        benchmark.group = spec.name
        benchmark.pedantic(plays[own], rounds=5, iterations=1, warmup_rounds=1)
        if benchmark.enabled:
            times = in_turns(plays, ROUNDS, ROUND_SECONDS)
            benchmark.extra_info |= {"case": spec.name, "direction": direction, **compared(times, own)}

    def play(self, variant: str, direction: str) -> Callable[[], object]:
        copies = 1
        if ON_DEVICE:
            copies = copies_for(self.case.cost(self.case.spec, direction).bytes, cache_bytes())
        return played(steps_of(self.checked(variant), self.case, direction, copies))


@lru_cache(maxsize=1)
def runner_of(spec: Spec) -> Runner:
    """The case's runner, kept until the next case comes."""
    return Runner(spec)


def compared(times: dict[str, list[float]], own: str) -> dict[str, Any]:
    """A row: seconds of all, the quickest that is not this library, and how many times as long it takes."""
    medians = {name: float(f"{statistics.median(taken):.4g}") for name, taken in times.items()}
    peers = {name: taken for name, taken in medians.items() if name != own}
    strongest = min(peers, key=lambda name: peers[name])
    row = {"own": own, "seconds": medians, "strongest": strongest, "times": ratio(times[strongest], times[own])}
    return row | ({"times_loop": ratio(times["loop"], times[own])} if "loop" in times else {})


def played(steps: Sequence[Step]) -> Callable[[], object]:
    """All steps one after the other, and the device awaited."""

    def play() -> object:
        for step in steps:
            result = step()
        if ON_DEVICE:
            torch.cuda.synchronize()
        return result

    return play
