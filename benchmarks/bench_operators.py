"""Every operator and the whole surrogate against the ways to do the same without this library.

``pytest benchmarks/ --benchmark-only`` times them side by side, forward, backward and both in one go, each checked in
that very case first, outputs and every gradient against the reference in fp64. Where each stands is in the table at
the end: against the loop over classes, as first published, a class-padded batch, two-pass ``index_add``,
``torch.segment_reduce``, fused attention; eager against what is not compiled, and compiled against compiled.
``-m "not slow"`` leaves out what compiles. On a device ``python -m benchmarks.gpu`` measures more, and better.
"""

from __future__ import annotations

import pytest

from benchmarks.cases import ON_DEVICE, SPECS
from benchmarks.operators import DIRECTIONS
from benchmarks.runner import Runner

COMPILED = pytest.param("eager-compiled", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name.replace(" ", "-"))
def runner(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("own", ["eager", COMPILED, *(["triton"] if ON_DEVICE else [])])
def test_operator(benchmark, runner, own, direction):
    runner.run(benchmark, own, direction)
