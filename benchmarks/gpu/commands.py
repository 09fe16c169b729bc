"""The commands that users type, on this machine: scripts in folders of their own, run beside the checks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import cut_folders

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Script:
    """Lines of bash, in the project's root; ``$OUT`` is a folder that goes away, ``$PYTHON`` this Python.

    A ``tool`` that does not write ``SUMMARY`` is not installed, or cannot work here: nothing has failed.
    """

    name: str
    expected: float
    lines: str
    tool: str = ""


TRAIN = "$PYTHON -m cem.train --train-size 900 --out $OUT/run --epochs"
ORIGINAL = f"{TRAIN} 3 --surrogate attention --lambd 0.5 --backend triton"
# Small kernels under a tool. Without PyTorch's allocator every tensor has bounds that the tool knows.
SANITIZE = """PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 86 --tool {} \
$PYTHON -m benchmarks.gpu.jobs 'fp32 holes'"""
COMMANDS = [
    Script("pytest -m gpu", 60, "$PYTHON -m pytest -m gpu -q -n 4 -p no:cacheprovider tests"),
    *(Script(tool, 60, SANITIZE.format(tool), "compute-sanitizer") for tool in ("memcheck", "racecheck")),
    Script("train, resume, attack", 50, f"""\
{TRAIN} 12 & run=$!
while kill -0 $run && [ "$(cat $OUT/run/metrics.csv 2> /dev/null | wc -l)" -lt 3 ]; do sleep 0.1; done
kill -9 $run; wait $run || true
$PYTHON -m cem.train --resume $OUT/run
$PYTHON -m cem.attack $OUT/run --decoder.networks preactN2C32 --decoder.max-cycles 1 --score-size 100"""),
    Script("train, mixture", 20, f"{TRAIN} 2 --surrogate mixture"),
    Script("compare", 50, """\
$PYTHON -m cem.compare --surrogates none slots --seeds 0 --epochs 2 --train-size 900 --out $OUT/all \
--attack.attacks decoder --attack.score-size 99 --attack.decoder.networks preactN2C32 --attack.decoder.max-cycles 1"""),
    Script("train --capture", 25, f"{ORIGINAL} --capture"),
    Script("train --amp", 25, f"{ORIGINAL} --amp --attention.reduction linear128"),
]  # fmt: skip


def run(script: Script) -> dict[str, Any]:
    """``status`` is ok, absent or error; ``why`` ends with what was written last."""
    with tempfile.TemporaryDirectory(prefix="cem-gpu-", ignore_cleanup_errors=True) as folder:
        known = {"OUT": folder, "PYTHON": sys.executable, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
        options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        done = subprocess.run(["bash", "-euxc", script.lines], cwd=ROOT, env={**os.environ, **known}, **options)
    last = cut_folders(" | ".join(done.stdout.splitlines()[-12:]))[-1500:]
    if script.tool and "SUMMARY" not in done.stdout:
        return {"status": "absent", "why": f"{script.tool} does not work here: {last}"}
    return {"status": "error" if done.returncode else "ok", "why": f"exit code {done.returncode}: {last}"}
