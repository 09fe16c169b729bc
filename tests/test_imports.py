"""Importing the packages needs neither a GPU nor Triton."""

import subprocess
import sys

# An entry of None makes both ``import triton`` and the probes of other libraries say that it is not there.
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import cem_kernels, cem
print("imported", sys.modules["triton"])
"""


def test_packages_are_imported_without_triton():
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "imported None", done.stderr
