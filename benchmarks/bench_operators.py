"""Every operator and the whole surrogate against the ways to do the same without this library.

``pytest benchmarks/ --benchmark-only`` times them side by side, forward, backward and both in one go, each checked in
that very case first, outputs and every gradient against the reference in fp64. Where each stands is in the table at
the end: against the loop over classes, as first published, a class-padded batch, two-pass ``index_add``,
``torch.segment_reduce``, fused attention; eager against what is not compiled, and compiled against compiled.
``-m "not slow"`` leaves out what compiles. On a device ``python -m benchmarks.gpu`` measures more, and better.
"""

from __future__ import annotations

import pytest

from benchmarks.cases import SPECS, owns_of
from benchmarks.operators import DIRECTIONS
from benchmarks.runner import runner_of

MEASURED = [
    pytest.param(
        spec, own,
        id=f"{spec.name} {own}".replace(" ", "-"), marks=[pytest.mark.slow] if own.endswith("-compiled") else [],
    )
    for spec in SPECS for own in owns_of(spec)
]  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("spec", "own"), MEASURED)
def test_operator(benchmark, spec, own, direction):
    runner_of(spec).run(benchmark, own, direction)
