"""A device that is none: CPU tensors, interpreted kernels, a clock that only proves that every step runs."""

import time

import torch

from benchmarks.gpu.cases import Plan
from benchmarks.gpu.commands import Script
from benchmarks.gpu.jobs import Setting
from benchmarks.gpu.timing import Play, Timer
from benchmarks.operators import Spec

TINY = Spec("class_variance", B=12, K=3, T=1, D=16, labels="holes")
CENTROID = Spec("centroid_variance", B=12, K=3, T=1, D=16)


class FakeTimer(Timer):
    def __init__(self):
        self.stream, self.cache = None, 1

    def play(self, steps, uncapturable=None):
        for step in steps:
            assert all(isinstance(tensor, torch.Tensor) for tensor in step())
        return Play(steps[0], steps, "graph" if uncapturable is None else f"events: {uncapturable}")

    def samples(self, play, calls=1):
        start = time.perf_counter()
        play.call()
        return [time.perf_counter() - start + 1e-9] * 3

    def wall(self, play):
        return self.samples(play)

    def peak(self, step):
        return 1 << 20


def fake_step(surrogate, **options):
    return lambda: torch.tensor(False)


def setting(**others):
    small = {
        "device": "cpu",
        "timer": FakeTimer,
        "plans": [Plan(TINY, judged=True), Plan(CENTROID)],
        "checks": [TINY],
        "sweep": {"tokens: tiny": TINY},
        "scripts": [
            Script("a command", 1, "$PYTHON -c 'print(1)'"),
            Script("a tool", 1, "no-such-tool", "no-such-tool"),
        ],
        "repeats": 2,
        "smaller": {"rates": {"size": 16, "chain": 2}, "training": {"rounds": 2, "steps": 1, "make": fake_step}},
    }
    return Setting(**{**small, **others})
