"""``compute-sanitizer`` over one small call of every kernel, in a process of its own.

``python -m benchmarks.gpu.sanitize`` is that call, to be put behind any tool by hand::

    compute-sanitizer --tool initcheck python -m benchmarks.gpu.sanitize
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu.errors import cut_folders
from benchmarks.operators import CASES, Spec
from cem_kernels import BackendUnavailableError

TOOLS = ("memcheck", "racecheck")
FOUND = 86  # exit status by which the tool says that it found something

SPECS = [
    Spec("class_variance", B=40, K=5, T=3, D=24, labels="holes"),
    Spec("class_variance", B=300, K=2, T=1, D=40, dtype="bf16", labels="one"),
    Spec("centroid_variance", B=40, K=5, T=3, D=24, labels="holes"),
    Spec("centroid_variance", B=300, K=2, T=1, D=40, dtype="bf16", labels="one"),
    Spec("slot_attention", B=24, K=5, T=3, D=64, labels="holes"),
    Spec("slot_attention", B=24, K=2, T=48, D=64),
    Spec("gated_read", B=24, K=5, T=3, D=64, labels="holes"),
    Spec("gated_read", B=24, K=5, T=3, D=64, dtype="bf16"),
]


def run_kernels(device: str = "cuda", variant: str = "triton") -> list[str]:
    """Forward and backward of every small case; the names of those that could run."""
    ran = []
    for spec in SPECS:
        case = CASES[spec.operator](spec, device)
        try:
            call = case.build(variant)
        except BackendUnavailableError:
            continue
        case.results(call)
        ran.append(spec.name)
    return ran


def sanitize(tool: str, timeout: float) -> dict[str, Any]:
    """``status`` is clean, found, absent, timeout or error; ``summary`` is the tool's own last line."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"tool": tool, "status": "absent"}
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", "benchmarks.gpu.sanitize"]
    # Without PyTorch's caching allocator every tensor is an allocation of its own, with bounds that the tool knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the tool and the program under it
        process.communicate()
        return {"tool": tool, "status": "timeout", "seconds": timeout}
    summaries = re.findall(r"=+ *((?:ERROR|RACECHECK) SUMMARY:.*)", output)
    status = {0: "clean", FOUND: "found"}.get(process.returncode, "error")
    if status == "clean" and not summaries:
        status = "error"
    return {
        "tool": tool,
        "status": status,
        "summary": cut_folders(summaries[-1] if summaries else output[-300:]).strip(),
        "first": [cut_folders(line) for line in output.splitlines() if line.startswith("=====")][:12],
        "seconds": round(time.monotonic() - start, 1),
        "kernels": re.findall(r"^ran (.*)$", output, flags=re.MULTILINE),
    }


if __name__ == "__main__":
    for name in run_kernels():
        print("ran", name, flush=True)
