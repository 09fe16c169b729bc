"""``python -m benchmarks.memory``: peak memory of the surrogate, and what it keeps for its backward; needs no GPU.

Everything runs on the CPU, and PyTorch's allocator there is asked what it gave and took. Triton's launches do nothing
meanwhile: a kernel allocates nothing itself, and no size depends on what one writes. So the figures are those of a
device, but for three things: a device rounds every allocation up (512 bytes), a few operators of PyTorch (fused
attention, the GRU cell) keep other, small buffers there, and libraries take workspaces that no tensor owns.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before the first import of Triton and PyTorch: kernels that take CPU tensors, and no log of the profiler's.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.cases import PLANS
from benchmarks.gpu.environment import versions
from benchmarks.gpu.report import write_json
from benchmarks.operators import CASES, Case, Spec
from benchmarks.steps import steps_of
from cem_kernels import BackendUnavailableError

VARIANTS = ("loop", "padded", "eager", "triton")
SPECS = [plan.spec for plan in PLANS if plan.spec.operator == "surrogate"]
OUT = Path(__file__).parent / "results" / "memory.json"


@contextmanager
def no_kernels() -> Iterator[None]:
    """Launches allocate what they allocate and run nothing: interpreted, kernels would take hours at these sizes."""
    for operator in ("variance", "cross_attention", "slot_attention"):
        importlib.import_module(f"cem_kernels.{operator}.triton")
    launch = importlib.import_module("cem_kernels.triton_utils").launch
    spaces = [vars(module) for name, module in sys.modules.items() if name.startswith("cem_kernels.")]
    users = [space for space in spaces if space.get("launch") is launch]
    for user in users:
        user["launch"] = lambda *args, **options: None
    try:
        yield
    finally:
        for user in users:
            user["launch"] = launch


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that ``call`` holds at any time above what was held before it, its result included.

    From the CPU allocator's own record, which has every allocation, those inside of operators too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    assert profiler.profiler is not None
    records = [r for r in profiler.profiler.kineto_results.events() if r.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(call: Callable[[], object], besides: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps from ``call`` for its backward, each storage once, without those of ``besides``."""
    found: dict[int, Tensor] = {}  # holds them, so that no address is used again

    def pack(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    return sum(tensor.untyped_storage().nbytes() for address, tensor in found.items() if address not in known)


def sizes_of(case: Case, variant: str) -> dict[str, int]:
    """The record of a variant, forward and backward to features and parameters.

    Raises:
        BackendUnavailableError: the variant cannot run here.
    """
    call = case.build(variant)
    (step,) = steps_of(call, case, "both", copies=1)
    features, *parameters = case.leaves.values()
    saved = saved_bytes(lambda: call(features, *parameters), parameters)
    return {"peak_bytes": peak_bytes(step), "saved_bytes": saved}


def record_of(spec: Spec, variants: Sequence[str] = VARIANTS) -> dict[str, Any]:
    """The record of a case; variants that cannot run here are not in it."""
    case = CASES[spec.operator](spec, "cpu")
    found: dict[str, Any] = {}
    for variant in variants:
        with no_kernels():
            try:
                found[variant] = sizes_of(case, variant)
            except BackendUnavailableError as error:
                print(f"{spec.name}: no {variant}: {error}", file=sys.stderr)
    return {"name": spec.name, "variants": found}


def lines_of(record: dict[str, Any], spec: Spec) -> list[str]:
    """The case as text; the last column is in units of what the tokens take in fp32."""
    tokens = 4 * spec.B * spec.T * spec.D
    lines = ["", f"{record['name']:42}{'peak MiB':>12}{'saved MiB':>12}{'saved/tokens':>14}"]
    for variant, sizes in record["variants"].items():
        peak, saved = (sizes[key] / 2**20 for key in ("peak_bytes", "saved_bytes"))
        lines.append(f"{variant:42}{peak:12.2f}{saved:12.2f}{sizes['saved_bytes'] / tokens:14.2f}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", metavar="FILE", type=Path, default=OUT, help="JSON (benchmarks/results/memory.json)")
    options = parser.parse_args(arguments)
    cases = []
    for spec in SPECS:
        cases.append(record_of(spec))
        print("\n".join(lines_of(cases[-1], spec)), flush=True)
    write_json(options.out, {"environment": {"device": "cpu", **versions()}, "cases": cases})


if __name__ == "__main__":
    main()
