"""Slot attention, forward and backward, against the ways to do it without this library.

``pytest benchmarks/ --benchmark-only`` times, in one run and for each shape: the loop over classes, a class-padded
batch whose keys and values are made once, before the iterations, and this library; all but the loop also under
``torch.compile``, and on a CUDA device this library's kernels. Each is checked against the reference in fp64 before it
is timed. Quote the ratios in ``extra_info``, measured turn by turn. On a device there are also quantiles of its own
time, by graph replay, and the peak memory.
"""

from __future__ import annotations

import pytest

from benchmarks.operator_bench import ON_DEVICE, Bench, variants_of
from benchmarks.operators import DIRECTIONS, Spec

SIZES = [{"B": 64, "K": 10, "T": 16, "D": 64}, {"B": 128, "K": 100, "T": 1, "D": 64}]
if ON_DEVICE:
    SIZES = [
        {"B": 1024, "K": 10, "T": 64, "D": 128},
        {"B": 1024, "K": 10, "T": 64, "D": 128, "dtype": "bf16"},
        {"B": 512, "K": 100, "T": 1, "D": 128},
        {"B": 128, "K": 10, "T": 1, "D": 128},
    ]
SPECS = [Spec("slot_attention", **sizes) for sizes in SIZES]


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name.replace(" ", "-"))
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", variants_of("slot_attention"))
def test_slot_attention(benchmark, bench, variant, direction):
    bench.run(benchmark, variant, direction)
