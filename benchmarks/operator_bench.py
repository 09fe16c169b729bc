"""What benchmarks of single operators share: the check, pytest-benchmark's clock, and ratios measured turn by turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.gpu.timing import DeviceTimer, cache_bytes, copies_for
from benchmarks.interleaved import seconds, times_slower
from benchmarks.operators import CASES, OWN, Call, Case, Spec
from benchmarks.steps import Step, keep_buffers, steps_of

ON_DEVICE = torch.cuda.is_available()
DEVICE_ONLY = ("triton", "flex-compiled")
ROUND_SECONDS = 10e-3  # or the scheduler's noise shows


def variants_of(operator: str) -> list[Any]:
    """The operator's variants that this machine can run; whatever compiles is slow."""
    names = [name for name in CASES[operator].variants if ON_DEVICE or name not in DEVICE_ONLY]
    return [pytest.param(n, marks=pytest.mark.slow) if n.endswith("-compiled") else n for n in names]


class Bench:
    """One batch, and its variants, each built and checked once."""

    def __init__(self, spec: Spec) -> None:
        torch.compiler.reset()
        keep_buffers()
        torch.backends.cuda.matmul.allow_tf32 = False
        self.timer = DeviceTimer(samples=30) if ON_DEVICE else None
        with torch.cuda.stream(self.timer.stream if self.timer else None):
            self.case: Case = CASES[spec.operator](spec, "cuda" if ON_DEVICE else "cpu")
        self.calls: dict[str, Call] = {}

    def checked(self, variant: str) -> Call:
        if variant not in self.calls:
            call = self.case.build(variant)
            verdict = self.case.check(variant, call)
            assert verdict.passed, verdict
            self.calls[variant] = call
        return self.calls[variant]

    def run(self, benchmark: Any, variant: str, direction: str) -> None:
        """Check, time, and put into ``extra_info`` what the table has no column for."""
        with torch.cuda.stream(self.timer.stream if self.timer else None):
            steps = self.steps(variant, direction)
            benchmark.group = f"{self.case.spec.name} {direction}"
            play = played(steps)
            play()
            iterations = max(1, math.ceil(ROUND_SECONDS / seconds(play, 1))) if benchmark.enabled else 1
            benchmark.pedantic(play, rounds=15, iterations=iterations, warmup_rounds=2)
            benchmark.extra_info["calls_per_iteration"] = len(steps)
            if not benchmark.enabled:
                return
            if self.timer is not None:
                benchmark.extra_info["device_seconds"] = self.timer.device_time(
                    steps, self.case.uncapturable.get(variant)
                )
                benchmark.extra_info["peak_bytes"] = self.timer.peak_bytes(steps[0])
            for peer in self.rivals(variant):
                other = played(self.steps(peer, direction))
                other()
                affordable = math.ceil(10 * ROUND_SECONDS / seconds(other, 1))
                ratio = times_slower(other, play, min(iterations, affordable))
                benchmark.extra_info[f"times_faster_than_{peer}"] = ratio

    def steps(self, variant: str, direction: str) -> Sequence[Step]:
        copies = 1
        if ON_DEVICE:
            copies = copies_for(self.case.cost(self.case.spec, direction).bytes, cache_bytes())
        return steps_of(self.checked(variant), self.case, direction, copies)

    def rivals(self, variant: str) -> list[str]:
        """Whom one of this library's variants is compared with: the loop, and peers that compile if it may."""
        if variant not in OWN:
            return []
        names = [n for n in self.case.variants if n not in OWN and (ON_DEVICE or n not in DEVICE_ONLY)]
        compiled = variant != "eager"
        return [n for n in names if n == "loop" or n.endswith("-compiled") == compiled]


def played(steps: Sequence[Step]) -> Step:
    """All steps one after the other, and the device awaited."""

    def play() -> tuple[torch.Tensor, ...]:
        for step in steps:
            result = step()
        if ON_DEVICE:
            torch.cuda.synchronize()
        return result

    return play
