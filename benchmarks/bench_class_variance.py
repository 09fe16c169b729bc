"""Class variance, around a batch's means and around running centroids, against the ways to do it without this library.

``pytest benchmarks/ --benchmark-only`` times, for each shape, forward and backward, side by side: loop over classes, a
class-padded batch, two-pass ``index_add``, ``torch.segment_reduce``, and this library; padding, ``index_add`` and this
library's eager backend also under ``torch.compile``, and on a CUDA device its kernels. Each is checked against the
reference in fp64 before it is timed. Quote the ratios in ``extra_info``, measured turn by turn. On a device there are
also quantiles of its own time, by graph replay, and the peak memory.
"""

from __future__ import annotations

import pytest

from benchmarks.operator_bench import ON_DEVICE, Bench, variants_of
from benchmarks.operators import DIRECTIONS, Spec

SPECS = [
    Spec("class_variance", B=128, K=10, T=16, D=64),
    Spec("class_variance", B=256, K=100, T=1, D=128),
    Spec("centroid_variance", B=128, K=10, T=1, D=392),
    Spec("centroid_variance", B=256, K=100, T=1, D=128),
]
if ON_DEVICE:
    SPECS = [
        Spec("class_variance", B=4096, K=100, T=64, D=128),
        Spec("class_variance", B=4096, K=100, T=64, D=128, dtype="bf16"),
        Spec("class_variance", B=512, K=100, T=1, D=128),
        Spec("centroid_variance", B=4096, K=100, T=64, D=128),
        Spec("centroid_variance", B=128, K=10, T=1, D=392),
    ]


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name.replace(" ", "-"))
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", variants_of("class_variance"))
def test_class_variance(benchmark, bench, variant, direction):
    bench.run(benchmark, variant, direction)
