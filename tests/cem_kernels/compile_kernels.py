"""Compile every kernel for a GPU that is not there, and say what each needs.

    python tests/cem_kernels/compile_kernels.py sm90             # the rows of one target
    python tests/cem_kernels/compile_kernels.py --write          # all targets, into kernel_resources.csv
    python tests/cem_kernels/compile_kernels.py --vary-sizes sm90  # versions compiled as the batch varies: one each

The launchers run as they are, on CPU tensors, with a driver that is a stub and a ``launch`` that only compiles. So what
is compiled is the very launch that a GPU would get: signature, specialization, tile sizes. Needs a process of its own,
without ``TRITON_INTERPRET``, which replaces the compiler.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget

from cem_kernels.cross_attention import triton as cross_attention
from cem_kernels.slot_attention import triton as slot_attention
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


class StubDriver:
    """An active driver of a device that does not exist: enough for ``warmup``, which compiles and does not launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


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


def variance_case(
    dtype: torch.dtype, penalty: str, columns: int, upstream: str = "losses", *, centroids: bool = False,
    samples: int = 64, classes: int = 4,
) -> Callable[[], None]:  # fmt: skip
    """``upstream``: ``losses``, as training has it, or ``all`` four results, through expanded gradients.

    ``centroids``: around running ones, instead of the batch's means.
    """

    def run() -> None:
        x, order, offsets = torch.empty(samples, columns, dtype=dtype), torch.arange(samples), torch.arange(classes + 1)
        common, running, min_samples = (x, order, offsets), (None, None, None), 2
        if centroids:
            running = torch.empty(classes, columns), torch.empty(classes, columns), torch.arange(classes)
            min_samples = 1
        _, _, _, _, *kept = variance.variance_forward(
            *common, *running, None, penalty, 0.1, 1e-4, 1e-6, min_samples, 0.99
        )
        one, several = torch.empty(()), torch.empty(()).expand(classes)
        grads = (one, None, None, None) if upstream == "losses" else (one, one, several, several)
        variance.variance_backward(*common, *kept, *grads, min_samples)

    return run


def read_case(
    width: int, heads: int, slots: int, dtype: torch.dtype, matmul: str = "highest", *, dropout: float = 0.0,
    strided: bool = False, samples: int = 64, classes: int = 4, tokens: int = 4, products: torch.dtype | None = None,
) -> Callable[[], None]:  # fmt: skip
    """``matmul``: PyTorch's fp32 precision; ``strided``: samples side by side and an expanded upstream gradient."""

    def run() -> None:
        torch.set_float32_matmul_precision(matmul)
        x = torch.empty(tokens, samples, width, dtype=dtype).transpose(0, 1)
        x = x if strided else x.contiguous()
        order, offsets = torch.arange(samples), torch.arange(classes + 1)
        padded_heads, padded_slots = cross_attention.padded_sizes(heads, slots)
        shifts = torch.empty(classes, padded_heads * padded_slots)
        queries = torch.empty(*shifts.shape, width, dtype=products or dtype)
        alpha, seed = torch.empty(()), torch.zeros(1, dtype=torch.int64) if dropout else None
        common = (x, order, offsets, queries, shifts, queries, alpha, seed)
        y, statistics = cross_attention.gated_read_forward(*common, padded_slots, dropout)
        dy = torch.empty(()).expand(y.shape) if strided else y
        cross_attention.gated_read_backward(*common, statistics, dy, padded_slots, dropout)

    return run


def slot_case(
    width: int, slots: int, dtype: torch.dtype, matmul: str = "highest", *, hidden: int | None = None,
    strided: bool = False, split: bool | None = None, samples: int = 64, classes: int = 4, tokens: int = 4,
    products: torch.dtype | None = None,
) -> Callable[[], None]:  # fmt: skip
    """``split``: whether tokens are split over programs, where the launcher's own choice is not wanted."""

    def run() -> None:
        torch.set_float32_matmul_precision(matmul)
        x = torch.empty(tokens, samples, width, dtype=dtype).transpose(0, 1)
        x = x if strided else x.contiguous()
        initial, vectors = torch.empty(classes, slots, width), torch.empty(15 * width + (hidden or 2 * width))
        sizes = (width, width), (3 * width, width), (3 * width, width), (hidden or 2 * width, width)
        matrices = [torch.empty(size, dtype=products or dtype) for size in (*sizes, sizes[-1][::-1])]
        common = (x, torch.arange(samples), torch.arange(classes + 1))
        choose = slot_attention.tokens_are_split
        slot_attention.tokens_are_split = choose if split is None else lambda x, groups: split
        try:
            kept = slot_attention.slot_attention_forward(*common, initial, *matrices, vectors, 3, 1e-8)
            slot_attention.slot_attention_backward(*common, *matrices, vectors, *kept, initial, 1e-8)
        finally:
            slot_attention.tokens_are_split = choose

    return run


def cases(target: str, everything: bool = False) -> Iterator[tuple[str, Callable[[], None]]]:
    """One of every class of configuration that the launchers choose."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield f"{name_of(dtype)} relu C128", variance_case(dtype, "relu", 128)
    for penalty in ("softplus", "nats"):
        yield f"fp32 {penalty} C8192", variance_case(torch.float32, penalty, 8192, "all")
    yield "fp32 relu C128 split", variance_case(torch.float32, "relu", 128, samples=8192, classes=1)
    yield "fp32 relu C17", variance_case(torch.float32, "relu", 17, "all")

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield f"{name_of(dtype)} nats C392 of centroids", variance_case(dtype, "nats", 392, centroids=True)
    for penalty in ("relu", "softplus"):
        yield f"fp32 {penalty} C8192 of centroids", variance_case(torch.float32, penalty, 8192, centroids=True)
    split = {"samples": 8192, "classes": 1}
    yield "fp32 nats C128 split of centroids", variance_case(torch.float32, "nats", 128, centroids=True, **split)

    products = {"fp32": (torch.float32,), "tf32": (torch.float32, "high"), "bf16": (torch.bfloat16,)}
    for name, product in products.items():
        yield f"{name} D128 H4 S8", read_case(128, 4, 8, *product)
        yield f"{name} D64 H4 S8", read_case(64, 4, 8, *product)
        yield f"{name} D512 H16 S32", read_case(512, 16, 32, *product)
    yield "fp16 D128 H4 S8", read_case(128, 4, 8, torch.float16)
    for name in ("fp32", "bf16"):
        yield f"{name} D16 H1 S1", read_case(16, 1, 1, *products[name])
        yield f"{name} D200 H5 S7", read_case(200, 5, 7, *products[name])
        yield f"{name} D512 H8 S8", read_case(512, 8, 8, *products[name])
        yield f"{name} D128 H4 S8 dropout", read_case(128, 4, 8, *products[name], dropout=0.1)
        yield f"{name} D128 H4 S8 strided", read_case(128, 4, 8, *products[name], strided=True)

    mixed = {"products": torch.bfloat16}  # of fp32 tokens: a surrogate of half-precision features
    yield "bf16 of fp32 D128 H4 S8", read_case(128, 4, 8, torch.float32, **mixed)
    if TARGETS[target].backend == "hip":
        return  # nobody has cut the kernels of slot attention for it, and they spill
    # Large kernels, most of what there is to compile: on other targets than the main one no more cases than differ.
    yield "fp32 D128 S8", slot_case(128, 8, *products["fp32"])
    yield "fp32 split D128 S8", slot_case(128, 8, *products["fp32"], split=True)
    yield "bf16 D128 S8", slot_case(128, 8, *products["bf16"])
    yield "bf16 of fp32 split D128 S8", slot_case(128, 8, torch.float32, split=True, **mixed)
    yield "bf16 D512 S32", slot_case(512, 32, *products["bf16"])
    if target != "sm90" and not everything:
        return
    yield "tf32 D128 S8", slot_case(128, 8, *products["tf32"])
    yield "fp32 D512 S32", slot_case(512, 32, *products["fp32"])
    yield "fp32 D200 S7", slot_case(200, 7, *products["fp32"], hidden=100)
    yield "bf16 D16 S1", slot_case(16, 1, *products["bf16"], strided=True)


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def compile_only(target: str) -> list[tuple[str, Any]]:
    """From here on launches compile for ``target``, and are appended to the returned list: kernel name, result."""
    triton.runtime.driver.set_active(StubDriver(TARGETS[target]))
    compiled: list[tuple[str, Any]] = []

    def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
        if TARGETS[target].backend == "hip":  # this PyTorch is CUDA's, and so are its launchers' options
            options.pop("maxnreg", None)
        compiled.append((kernel.__name__, kernel.warmup(*args, grid=grid, **FUSION, **options)))

    for module in (variance, cross_attention, slot_attention):
        module.launch = launch
    return compiled


def rows_of(target: str, everything: bool) -> Iterator[dict[str, Any]]:
    """What every kernel needs on ``target``."""
    compiled = compile_only(target)
    for case, run in cases(target, everything):
        run()
        launched = {result.hash: (kernel, result) for kernel, result in compiled}  # some launch several times
        for kernel, result in launched.values():
            needs = resources(result)
            yield {"target": target, "kernel": kernel, "case": case, **needs, "triton": triton.__version__}
        compiled.clear()


def versions_as_sizes_vary(target: str) -> dict[str, int]:
    """Kernel to the number of versions compiled for batches of many sizes."""
    compiled = compile_only(target)
    for samples, classes, tokens in ((64, 4, 4), (1, 1, 1), (17, 3, 1), (8192, 1, 7), (4096, 100, 16), (100, 1000, 2)):
        for centroids in (False, True):
            variance_case(torch.float32, "nats", 128, centroids=centroids, samples=samples, classes=classes)()
        read_case(128, 4, 8, torch.bfloat16, samples=samples, classes=classes, tokens=tokens)()
        for split in (False, True):
            sizes = {"samples": samples, "classes": classes, "tokens": tokens}
            slot_case(128, 8, torch.bfloat16, split=split, **sizes)()
    versions: dict[str, set[str]] = {}
    for kernel, result in compiled:
        versions.setdefault(kernel, set()).add(result.hash)
    return {kernel: len(hashes) for kernel, hashes in versions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all of them")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} instead of printing")
    parser.add_argument("--vary-sizes", action="store_true", help="count compiled versions as the batch varies")
    parser.add_argument("--everything", action="store_true", help="one target: all cases, as the main target has")
    options = parser.parse_args()
    targets = options.targets or [*TARGETS]
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"unknown targets {', '.join(sorted(unknown))}")
    if options.vary_sizes:
        print("target,kernel,versions")
        for target in targets:
            for kernel, count in versions_as_sizes_vary(target).items():
                print(target, kernel, count, sep=",")
        return
    if len(targets) > 1 or options.write:
        table = tables_of(targets)
        if options.write:
            TABLE.write_text(table)
        else:
            print(table, end="")
        return
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows_of(targets[0], options.everything))


def rows_for(arguments: tuple[str, ...], environment: dict[str, str]) -> Rows:
    """The table that this script prints for ``arguments``, in a process of its own: where it is called, the interpreter
    may be at work."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr[-3000:]}")
    return list(csv.DictReader(done.stdout.splitlines()))


def tables_of(targets: list[str]) -> str:
    """The tables of several targets, each from a process of its own: a kernel remembers what it was compiled for."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        command = [sys.executable, __file__]
        runs = [pool.submit(subprocess.check_output, [*command, target], text=True) for target in targets]
        tables = [run.result().splitlines() for run in runs]
    lines = tables[0][:1] + [line for table in tables for line in table[1:]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
