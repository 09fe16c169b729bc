"""Every kernel compiles for GPUs that are not there, fits, spills nothing, and does not change its needs unnoticed."""

import contextlib
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from compile_kernels import COLUMNS, TABLE, TARGETS, Rows, rows_for

MOST_SHARED = 99 * 1024  # what a block can have on the smallest of the devices, sm_86
KEY = ("kernel", "case")
OLDER = "3.6.0"


def assert_fits(rows: Rows) -> None:
    for row in rows:
        assert int(row["shared_bytes"]) <= MOST_SHARED, row
        assert int(row["spilled_bytes"]) == 0, row


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_and_need_what_the_table_says(compiled, target):
    found = compiled(target)
    assert_fits(found)
    with open(TABLE, newline="") as file:
        expected = [row for row in csv.DictReader(file) if row["target"] == target]
    assert [[row[k] for k in KEY] for row in found] == [[row[k] for k in KEY] for row in expected]
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
@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm")])
def test_kernels_fit_under_the_triton_of_pytorch_2_11_too(older_triton, target):
    found = rows_for((target,), os.environ | {"PYTHONPATH": str(older_triton)})
    assert {row["triton"] for row in found} == {OLDER}
    assert_fits(found)


@pytest.mark.slow
def test_batch_classes_and_tokens_vary_without_recompiling(compiled):
    versions = {row["kernel"]: int(row["versions"]) for row in compiled("--vary-sizes", "sm90")}
    assert len(versions) == 9
    assert versions.pop("variance_forward_kernel") == 2  # around means, and around running centroids
    assert set(versions.values()) == {1}, versions


def test_table_has_the_columns_that_the_script_writes():
    with open(TABLE, newline="") as file:
        assert next(csv.reader(file)) == list(COLUMNS)
