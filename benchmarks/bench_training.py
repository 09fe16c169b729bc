"""What each surrogate adds to a training step of VGG-11: 28×28 gray images, batch 128. See ``training_step.py``."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.interleaved import times_slower
from benchmarks.training_step import training_step

step_of = partial(training_step, batch=128, image_shape=(1, 28, 28))


@pytest.mark.parametrize("surrogate", ["none", "attention", "centroid", "mixture"])
def test_training_step_of_vgg11(benchmark, surrogate):
    step = step_of(surrogate)
    assert not step()
    benchmark.group = "training step vgg11_bn C8S1 B128"
    benchmark.pedantic(step, rounds=15, warmup_rounds=2)
    if benchmark.enabled and surrogate != "none":
        benchmark.extra_info["times_slower_than_none"] = times_slower(step, step_of("none"), 2, rounds=11)
