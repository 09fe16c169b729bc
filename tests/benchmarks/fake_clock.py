"""What tests of benchmarks share: a clock that needs no device, small batches, records and a report's file."""

import time

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import quantiles
from benchmarks.operators import DIRECTIONS, Spec

CEILINGS = {"copy": 4e12, "bf16": 8e14, "fp32": 5e13}
ENVIRONMENT = {"device": "Some GPU", "torch": torch.__version__}

SMALL = {
    "class_variance": Spec("class_variance", B=24, K=4, T=2, D=16, labels="holes"),
    "centroid_variance": Spec("centroid_variance", B=24, K=4, T=2, D=16, labels="holes"),
    "slot_attention": Spec("slot_attention", B=12, K=4, T=2, D=16, S=3, labels="holes"),
    "gated_read": Spec("gated_read", B=24, K=4, T=3, D=32, S=3, H=2, labels="holes"),
    "cross_attention": Spec("cross_attention", B=24, K=4, T=3, D=32, S=3, H=2),
    "surrogate": Spec("surrogate", B=12, K=4, T=2, D=16, S=3, H=2, labels="holes"),
}


class HostTimer:
    """A clock for CPU tensors that only proves that every step runs."""

    def device_time(self, steps, uncapturable):
        for step in steps:
            assert all(isinstance(tensor, torch.Tensor) for tensor in step())
        start = time.perf_counter()
        steps[0]()
        return {"how": "events", "calls_per_sample": 1, **quantiles([time.perf_counter() - start + 1e-9] * 3)}

    def wall_time(self, steps):
        return quantiles([1e-3, 2e-3])

    def peak_bytes(self, step):
        return 1 << 20


def report_with(tmp_path, **data):
    report = Report(tmp_path / "new" / "gpu.json")
    ceilings = {name: {"rate": rate, "unit": "x/s"} for name, rate in CEILINGS.items()}
    report.set(environment=ENVIRONMENT, ceilings=ceilings, **data)
    return report


def record_of(spec, **seconds):
    """A case's record with these seconds for every direction of each variant."""
    figures = {
        variant.replace("_", "-"): {"status": "ok"} | {d: {"device": {"median": s}} for d in DIRECTIONS}
        for variant, s in seconds.items()
    }
    return {"name": spec.name, "variants": figures, "left_out": []}
