"""Compile kernels for GPUs that are not there, and say what each needs.

    python tests/cem_kernels/compile_kernels.py --write        # what the table holds, into kernel_resources.csv
    python tests/cem_kernels/compile_kernels.py sm90           # every case on one target; or ``sm90 touchiest``
    python tests/cem_kernels/compile_kernels.py --vary-sizes   # versions asked for as the batch varies: one each

The launchers run as they are, on CPU tensors, with a driver that is a stub and a ``launch`` that only compiles. So what
is compiled is the very launch that a GPU would get: signature, specialization, tile sizes. Needs a process of its own,
without ``TRITON_INTERPRET``, which replaces the compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget

from cem_kernels.cross_attention import triton as cross_attention
from cem_kernels.slot_attention import triton as slot_attention
from cem_kernels.slot_variance import triton as slot_variance
from cem_kernels.triton_utils import FUSION
from cem_kernels.variance import triton as variance

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TABLE = Path(__file__).with_name("kernel_resources.csv")
Rows = list[dict[str, str]]
COLUMNS = ("target", "kernel", "case", "shared_bytes", "registers", "spilled_bytes", "triton")


def stub_driver(target: GPUTarget) -> SimpleNamespace:
    """An active driver of a device that does not exist: enough for ``warmup``, which compiles and does not launch."""
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )


def resources(compiled: Any) -> dict[str, int]:
    """Shared memory, registers and spills of a compiled kernel, as the assembler reports them."""
    if "cubin" in compiled.asm:
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            report = subprocess.run(
                [cuobjdump, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
            ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    else:
        assembly = compiled.asm["amdgcn"]
        found = re.search(r"\.vgpr_count:\s+(\d+)\s+\.vgpr_spill_count:\s+(\d+)", assembly)
    if found is None:
        raise RuntimeError("the assembler's report of resources was not understood")
    return {
        "shared_bytes": compiled.metadata.shared,
        "registers": int(found[1]),
        # Four bytes a spilled register; a CUDA kernel has no stack but for spills.
        "spilled_bytes": int(found[2]) * (1 if "cubin" in compiled.asm else 4),
    }


# ------------------------------------------------------------------------------------------------------------- cases

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def run_variance(
    dtype: torch.dtype, penalty: str, columns: int, upstream: str = "losses", *, centroids: bool = False,
    samples: int = 64, classes: int = 4,
) -> None:  # fmt: skip
    """``upstream``: ``losses``, as training has it, or ``all`` four results, through expanded gradients.

    ``centroids``: around running ones, instead of the batch's means.
    """
    x, order, offsets = torch.empty(samples, columns, dtype=dtype), torch.arange(samples), torch.arange(classes + 1)
    common, running, min_samples = (x, order, offsets), (None,) * 4, 2
    if centroids:
        moments, counter = (torch.empty(classes, columns) for _ in range(2)), (torch.arange(classes) for _ in range(2))
        running = *moments, *counter
        min_samples = 1
    options = None, penalty, 0.1, 1e-4, 1e-6, 1e-4, min_samples, 0.99
    kept = variance.variance_forward(*common, *running, *options)[4:]
    one, several = torch.empty(()), torch.empty(()).expand(classes)
    grads = (one, None, None, None) if upstream == "losses" else (one, one, several, several)
    variance.variance_backward(*common, *kept, *grads, min_samples)


def run_slot_variance(
    dtype: torch.dtype, slots: int, columns: int, upstream: str = "losses", *, samples: int = 64, classes: int = 4
) -> None:
    x, order, offsets = torch.empty(samples, columns, dtype=dtype), torch.arange(samples), torch.arange(classes + 1)
    moments, counter = (torch.empty(classes, slots, columns) for _ in range(2)), (torch.arange(classes) for _ in "bi")
    running = *moments, torch.empty(classes, slots), *counter
    kept = slot_variance.slot_variance_forward(x, order, offsets, *running, 0.1)[4:]
    grads = torch.empty(()), None if upstream == "losses" else torch.empty(()).expand(classes)
    slot_variance.slot_variance_backward(x, order, offsets, *kept, *grads)


def run_read(
    width: int, heads: int, slots: int, dtype: torch.dtype, matmul: str = "highest", *, dropout: float = 0.0,
    samples: int = 64, classes: int = 4, tokens: int = 4, products: torch.dtype | None = None,
) -> None:  # fmt: skip
    """``matmul``: PyTorch's fp32 precision."""
    torch.set_float32_matmul_precision(matmul)
    x = torch.empty(samples, tokens, width, dtype=dtype)
    padded_heads, padded_slots = cross_attention.padded_sizes(heads, slots)
    shifts = torch.empty(classes, padded_heads * padded_slots)
    queries = torch.empty(*shifts.shape, width, dtype=products or dtype)
    alpha, seed = torch.empty(()), torch.zeros(1, dtype=torch.int64) if dropout else None
    common = (x, torch.arange(samples), torch.arange(classes + 1), queries, shifts, queries, alpha, seed)
    y, statistics = cross_attention.gated_read_forward(*common, padded_slots, dropout)
    cross_attention.gated_read_backward(*common, statistics, y, padded_slots, dropout)


def run_slots(
    width: int, slots: int, dtype: torch.dtype, matmul: str = "highest", *, hidden: int | None = None,
    split: bool = False, samples: int = 64, classes: int = 4, tokens: int = 4, products: torch.dtype | None = None,
) -> None:  # fmt: skip
    """``split``: tokens, over programs."""
    torch.set_float32_matmul_precision(matmul)
    x = torch.empty(samples, tokens, width, dtype=dtype)
    initial, vectors = torch.empty(classes, slots, width), torch.empty(15 * width + (hidden or 2 * width))
    sizes = (width, width), (3 * width, width), (3 * width, width), (hidden or 2 * width, width)
    matrices = [torch.empty(size, dtype=products or dtype) for size in (*sizes, sizes[-1][::-1])]
    common = (x, torch.arange(samples), torch.arange(classes + 1))
    slot_attention.tokens_are_split = lambda x, groups: split
    kept = slot_attention.slot_attention_forward(*common, initial, *matrices, vectors, 3, 1e-8)
    slot_attention.slot_attention_backward(*common, *matrices, vectors, *kept, initial, 1e-8)


MIXED = {"products": BF16}  # of fp32 tokens: a surrogate of half-precision features
PRECISIONS = {"fp32": (FP32,), "tf32": (FP32, "high"), "bf16": (BF16,), "fp16": (FP16,)}
Case = tuple[str, Callable[[], None]]


def others() -> Iterator[Case]:
    """One of every class of configuration that the launchers choose: variances and reads."""
    for name in ("fp32", "bf16"):
        yield f"{name} relu C128", partial(run_variance, *PRECISIONS[name], "relu", 128)
    for penalty in ("softplus", "nats"):
        yield f"fp32 {penalty} C8192", partial(run_variance, FP32, penalty, 8192, "all")
    yield "fp32 relu C17", partial(run_variance, FP32, "relu", 17, "all")
    for name in ("fp32", "bf16", "fp16"):
        yield f"{name} nats C392 of centroids", partial(run_variance, *PRECISIONS[name], "nats", 392, centroids=True)
    for penalty in ("relu", "softplus"):
        yield f"fp32 {penalty} C8192 of centroids", partial(run_variance, FP32, penalty, 8192, centroids=True)
    yield "fp32 nats C128 of centroids", partial(run_variance, FP32, "nats", 128, centroids=True)
    for name in ("fp32", "bf16", "fp16"):
        yield f"{name} S4 C392 of slots", partial(run_slot_variance, *PRECISIONS[name], 4, 392)
    for slots, columns in ((1, 512), (16, 8192), (3, 17)):
        yield f"fp32 S{slots} C{columns} of slots", partial(run_slot_variance, FP32, slots, columns, "all")
    for name in ("fp32", "tf32", "bf16"):
        yield f"{name} D128 H4 S8", partial(run_read, 128, 4, 8, *PRECISIONS[name])
        yield f"{name} D512 H16 S32", partial(run_read, 512, 16, 32, *PRECISIONS[name])
    yield "fp16 D128 H4 S8", partial(run_read, 128, 4, 8, FP16)
    for name in ("fp32", "bf16"):
        yield f"{name} D16 H1 S1", partial(run_read, 16, 1, 1, *PRECISIONS[name])
        yield f"{name} D200 H5 S7", partial(run_read, 200, 5, 7, *PRECISIONS[name])
        yield f"{name} D512 H8 S8", partial(run_read, 512, 8, 8, *PRECISIONS[name])
        yield f"{name} D128 H4 S8 dropout", partial(run_read, 128, 4, 8, *PRECISIONS[name], dropout=0.1)
    yield "bf16 of fp32 D128 H4 S8", partial(run_read, 128, 4, 8, FP32, **MIXED)


def slots() -> Iterator[Case]:
    """Slot attention: few and large kernels, most of what there is to compile."""
    yield "fp32 D128 S8", partial(run_slots, 128, 8, FP32)
    yield "fp32 split D128 S8", partial(run_slots, 128, 8, FP32, split=True)
    yield "bf16 D128 S8", partial(run_slots, 128, 8, BF16)
    yield "bf16 of fp32 split D128 S8", partial(run_slots, 128, 8, FP32, split=True, **MIXED)
    yield "bf16 D512 S32", partial(run_slots, 512, 32, BF16)
    yield "tf32 D128 S8", partial(run_slots, 128, 8, *PRECISIONS["tf32"])
    yield "fp32 D512 S32", partial(run_slots, 512, 32, FP32)
    yield "fp32 D200 S7", partial(run_slots, 200, 7, FP32, hidden=100)
    yield "bf16 D16 S1", partial(run_slots, 16, 1, BF16)


OTHERS, SLOTS = dict(others()), dict(slots())
# Those that need most registers and most shared memory of their kernels on some target; every kernel is there.
TOUCHIEST_OTHERS = (
    "fp32 relu C128", "bf16 nats C392 of centroids", "fp32 S4 C392 of slots", "fp32 S1 C512 of slots",
    "tf32 D128 H4 S8", "tf32 D512 H16 S32", "fp32 D512 H8 S8", "fp32 D128 H4 S8 dropout", "bf16 D128 H4 S8 dropout",
)  # fmt: skip
TOUCHIEST_SLOTS = ("fp32 D128 S8", "bf16 D128 S8", "bf16 of fp32 split D128 S8")
CHOICES = {
    "all": (*OTHERS, *SLOTS),
    "others": tuple(OTHERS),
    "slots": tuple(SLOTS),
    "touchiest": (*TOUCHIEST_OTHERS, *TOUCHIEST_SLOTS),
    "touchiest-others": TOUCHIEST_OTHERS,
    "touchiest-slots": TOUCHIEST_SLOTS,
    "smallest": ("fp32 relu C17", "fp32 S3 C17 of slots", "bf16 D16 H1 S1", "fp32 D128 S8", "fp32 split D128 S8"),
}
# What the table holds. Nobody has cut slot attention for gfx942, where its kernels spill.
RUNS = (
    ("sm80", "others"), ("sm80", "touchiest-slots"), ("sm90", "others"), ("sm90", "slots"),
    ("sm100", "others"), ("sm100", "touchiest-slots"), ("gfx942", "touchiest-others"),
)  # fmt: skip


def compile_only(target: str) -> list[tuple[str, Any]]:
    """From here on launches compile for ``target``, and are appended to the returned list: kernel name, result."""
    triton.runtime.driver.set_active(stub_driver(TARGETS[target]))
    compiled: list[tuple[str, Any]] = []

    def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
        if TARGETS[target].backend == "hip":  # this PyTorch is CUDA's, and so are its launchers' options
            options.pop("maxnreg", None)
        compiled.append((kernel.__name__, kernel.warmup(*args, grid=grid, **FUSION, **options)))

    for module in (variance, slot_variance, cross_attention, slot_attention):
        module.launch = launch
    return compiled


def rows_of(target: str, choice: str) -> Iterator[dict[str, Any]]:
    """What every kernel needs on ``target``."""
    compiled = compile_only(target)
    for case in CHOICES[choice]:
        (OTHERS | SLOTS)[case]()
        launched = {result.hash: (kernel, result) for kernel, result in compiled}  # some launch several times
        for kernel, result in launched.values():
            needs = resources(result)
            yield {"target": target, "kernel": kernel, "case": case, **needs, "triton": triton.__version__}
        compiled.clear()


def versions_as_sizes_vary() -> Iterator[dict[str, Any]]:
    """The number of versions of each kernel that batches of many sizes ask for; none of them is compiled."""
    versions: dict[str, set[Any]] = {}

    def asked_for(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        versions.setdefault(fn.name.rpartition(".")[2], set()).add(compile["key"])
        return True  # it needs no compiling

    triton.knobs.runtime.jit_cache_hook = asked_for
    compile_only("sm90")
    for samples, classes, tokens in ((64, 4, 4), (1, 1, 1), (17, 3, 1), (8192, 1, 7), (4096, 100, 16), (100, 1000, 2)):
        sizes = {"samples": samples, "classes": classes}
        for either in (False, True):
            run_variance(FP32, "nats", 128, centroids=either, **sizes)
            run_slots(128, 8, BF16, split=either, tokens=tokens, **sizes)
        run_slot_variance(FP32, 4, 128, **sizes)
        run_read(128, 4, 8, BF16, tokens=tokens, **sizes)
    yield from ({"kernel": kernel, "versions": len(keys)} for kernel, keys in versions.items())


# --------------------------------------------------------------------------------------------------------- processes


def rows_for(*arguments: str, older: Path | None = None) -> Rows:
    """What this script prints for ``arguments``, in a process of its own: where it is called, the interpreter may be at
    work, and a kernel remembers what it was compiled for. With the Triton in the folder ``older``, where there is one.
    """
    environment = os.environ | ({"PYTHONPATH": str(older)} if older else {})
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr[-3000:]}")
    return list(csv.DictReader(done.stdout.splitlines()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=TARGETS)
    parser.add_argument("cases", nargs="?", choices=CHOICES, default="all")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--vary-sizes", action="store_true", help="count versions as the batch varies")
    options = parser.parse_args()
    if options.vary_sizes:
        columns, rows = ("kernel", "versions"), versions_as_sizes_vary()
    elif options.write:
        columns, pool = COLUMNS, ThreadPoolExecutor(os.cpu_count())
        rows = itertools.chain(*pool.map(lambda run: rows_for(*run), RUNS))
    elif options.target:
        columns, rows = COLUMNS, rows_of(options.target, options.cases)
    else:
        parser.error("say a target, --write or --vary-sizes")
    with open(TABLE, "w", newline="") if options.write else contextlib.nullcontext(sys.stdout) as out:
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
