"""The whole attention surrogate, forward and backward, against the ways to do it without this library.

``pytest benchmarks/ --benchmark-only`` times, in one run and for each shape: the loop over classes, as first published,
a class-padded batch with keys and values materialized, and this library, with a static bound on the class size; all but
the loop also under ``torch.compile``, and on a CUDA device this library's kernels. Gradients go to the features and to
every parameter. Each is checked against the reference in fp64 before it is timed. The figures to quote are the ratios
in ``extra_info``, timed turn by turn, because the medians of the table are minutes apart and machines are noisy.
"""

from __future__ import annotations

import pytest

from benchmarks.operator_bench import ON_DEVICE, Bench, variants_of
from benchmarks.operators import Spec

SIZES = [
    {"B": 128, "K": 10, "T": 1, "D": 128},
    {"B": 256, "K": 100, "T": 1, "D": 128},
    {"B": 1024, "K": 200, "T": 1, "D": 128},
    {"B": 64, "K": 10, "T": 16, "D": 64},
]
if ON_DEVICE:
    SIZES = [
        {"B": 512, "K": 100, "T": 1, "D": 128},
        {"B": 128, "K": 10, "T": 1, "D": 128},
        {"B": 1024, "K": 10, "T": 64, "D": 128},
        {"B": 1024, "K": 10, "T": 64, "D": 128, "dtype": "bf16"},
    ]
SPECS = [Spec("surrogate", **sizes) for sizes in SIZES]


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name.replace(" ", "-"))
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


@pytest.mark.parametrize("variant", variants_of("surrogate"))
def test_surrogate_forward_and_backward(benchmark, bench, variant):
    bench.run(benchmark, variant, "both")
