"""What each surrogate adds to a training step of VGG-11: 28×28 gray images, batch 128. See ``training_step.py``."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.interleaved import in_turns
from benchmarks.runner import compared
from benchmarks.training_step import training_step

step_of = partial(training_step, batch=128, image_shape=(1, 28, 28))


@pytest.mark.parametrize("surrogate", ["slots", "centroid", "attention", "mixture"])
def test_training_step_of_vgg11(benchmark, surrogate):
    step = step_of(surrogate)
    assert not step(), "the penalty is not finite"
    benchmark.group = "training step"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    if benchmark.enabled:
        times = in_turns({surrogate: step, "none": step_of("none")}, rounds=9)
        name = "training step vgg11_bn C8S1 B128"
        benchmark.extra_info |= {"case": name, "direction": "step", **compared(times, surrogate)}
