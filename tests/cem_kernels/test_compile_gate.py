"""Every kernel compiles for GPUs that are not there, fits, spills nothing, and does not change its needs unnoticed."""

import contextlib
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from compile_kernels import CHOICES, RUNS, TABLE, Rows, rows_for

MOST_SHARED = 99 * 1024  # what a block can have on the smallest of the devices, sm_86
OLDER = "3.6.0"
OLDER_TARGETS = ("sm80", "sm90", "sm100")


def assert_fits(rows: Rows) -> None:
    for row in rows:
        assert int(row["shared_bytes"]) <= MOST_SHARED, row
        assert int(row["spilled_bytes"]) == 0, row


@pytest.mark.parametrize(
    ("target", "cases"),
    [("sm90", "smallest"), *(pytest.param(*run, marks=pytest.mark.slow) for run in RUNS)],
)
def test_kernels_compile_and_need_what_the_table_says(target, cases):
    found = rows_for(target, cases)
    assert_fits(found)
    assert len({row["kernel"] for row in found}) == {"smallest": 11}.get(cases, 5 if "slots" in cases else 6)
    with open(TABLE, newline="") as file:
        expected = [row for row in csv.DictReader(file) if row["target"] == target and row["case"] in CHOICES[cases]]
    assert [(row["kernel"], row["case"]) for row in found] == [(row["kernel"], row["case"]) for row in expected]
    if found[0]["triton"] == expected[0]["triton"]:  # another compiler gives other numbers
        assert found == expected, "python tests/cem_kernels/compile_kernels.py --write, and look at the difference"


@pytest.fixture
def older_triton(pytestconfig: pytest.Config) -> Path:
    """Triton 3.6.0 alone in a folder of its own, downloaded once: what it compiles does not depend on the PyTorch that
    calls it."""
    folder = Path(pytestconfig.cache.mkdir("older")) / f"triton-{OLDER}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            command = ["pip", "install", "--quiet", "--no-deps", "--target", f"{made}/new", f"triton=={OLDER}"]
            subprocess.run([sys.executable, "-m", *command], check=True)
            with contextlib.suppress(OSError):  # another worker was first
                Path(made, "new").rename(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("target", OLDER_TARGETS)
def test_kernels_fit_under_the_triton_of_pytorch_2_11_too(older_triton, target):
    found = rows_for(target, "touchiest", older=older_triton)
    assert {row["triton"] for row in found} == {OLDER}
    assert_fits(found)


def test_batch_classes_and_tokens_vary_without_recompiling():
    versions = {row["kernel"]: int(row["versions"]) for row in rows_for("--vary-sizes")}
    assert len(versions) == 11
    assert versions.pop("variance_forward_kernel") == 2  # around means, and around running centroids
    assert set(versions.values()) == {1}, versions
