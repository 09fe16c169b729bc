"""Importing the packages needs neither a GPU nor Triton."""

import subprocess
import sys

import pytest

# An entry of None makes both ``import triton`` and the probes of other libraries say that it is not there.
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import {package}
print("imported", sys.modules["triton"])
"""


@pytest.mark.parametrize("package", ["cem_kernels", "cem"])
def test_import_without_triton(package):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON.format(package=package)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "imported None", done.stderr
