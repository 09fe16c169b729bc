"""Peak memory of the surrogate, and what it keeps for its backward; needs no GPU. ``python -m benchmarks.cpu memory``.

Everything runs on the CPU, and PyTorch's allocator there is asked what it gave and took. Triton's launches do nothing
meanwhile: a kernel allocates nothing itself, and no size depends on what one writes. So the figures are those of a
device, but for three things: a device rounds every allocation up (512 bytes), a few operators of PyTorch (fused
attention, the GRU cell) keep other, small buffers there, and libraries take workspaces that no tensor owns.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import cem_kernels
from benchmarks.gpu.cases import PLANS
from benchmarks.operators import CASES, Case, Spec
from benchmarks.steps import steps_of
from cem_kernels import BackendUnavailableError

VARIANTS = ("loop", "padded", "eager", "triton")
SPECS = [plan.spec for plan in PLANS if plan.spec.operator == "surrogate"]


@contextmanager
def no_kernels() -> Iterator[list[str]]:
    """Launches allocate what they allocate and run nothing: interpreted, kernels would take hours at these sizes.

    Yields the names of the kernels that were to run, one a launch.
    """
    for file in Path(cem_kernels.__file__).parent.glob("*/triton.py"):
        importlib.import_module(f"cem_kernels.{file.parent.name}.triton")
    launched: list[str] = []
    launch = importlib.import_module("cem_kernels.triton_utils").launch
    spaces = [vars(module) for name, module in sys.modules.items() if name.startswith("cem_kernels.")]
    users = [space for space in spaces if space.get("launch") is launch]
    for user in users:
        user["launch"] = lambda kernel, *args, **options: launched.append(kernel.__name__)
    try:
        yield launched
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


def rows_of(spec: Spec, variants: Sequence[str] = VARIANTS) -> list[dict[str, Any]]:
    """A row a variant; those that cannot run here have none."""
    case = CASES[spec.operator](spec, "cpu")
    rows = []
    for variant in variants:
        with no_kernels():
            try:
                rows.append({"case": spec.name, "variant": variant, **sizes_of(case, variant)})
            except BackendUnavailableError as error:
                print(f"{spec.name}: no {variant}: {error}", file=sys.stderr)
    return rows


def measure() -> list[dict[str, Any]]:
    return [row for spec in tqdm(SPECS, unit="case", disable=None) for row in rows_of(spec)]


def line_of(row: Mapping[str, Any]) -> str:
    peak, saved = (row[key] / 1e6 for key in ("peak_bytes", "saved_bytes"))
    return f"{row['case']:44}{row['variant']:10}{peak:10.2f} MB at most{saved:10.2f} MB for the backward"
