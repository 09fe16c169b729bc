"""Every kernel compiles for GPUs that are not there, fits, spills nothing, and does not change its needs unnoticed."""

import csv

import pytest
from compile_kernels import COLUMNS, TABLE, TARGETS

MOST_SHARED = 99 * 1024  # what a block can have on the smallest of the devices, sm_86
KEY = ("kernel", "case")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_and_need_what_the_table_says(compiled, target):
    found = compiled(target)
    for row in found:
        assert int(row["shared_bytes"]) <= MOST_SHARED, row
        assert int(row["spilled_bytes"]) == 0, row
    with open(TABLE, newline="") as file:
        expected = [row for row in csv.DictReader(file) if row["target"] == target]
    assert [[row[k] for k in KEY] for row in found] == [[row[k] for k in KEY] for row in expected]
    if found[0]["triton"] == expected[0]["triton"]:  # another compiler gives other numbers
        assert found == expected, "python tests/cem_kernels/compile_kernels.py --write, and look at the difference"


@pytest.mark.slow
def test_batch_classes_and_tokens_vary_without_recompiling(compiled):
    versions = {row["kernel"]: int(row["versions"]) for row in compiled("--vary-sizes", "sm90")}
    assert len(versions) == 10
    assert set(versions.values()) == {1}, versions


def test_table_has_the_columns_that_the_script_writes():
    with open(TABLE, newline="") as file:
        assert next(csv.reader(file)) == list(COLUMNS)
