"""Kernels run on the device where there is one, and elsewhere in Triton's interpreter, which must be chosen before the
first import of Triton. Slow tests are left out unless an expression of markers or the name of a test asks for them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the other cores have tests of their own


def pytest_configure(config: pytest.Config) -> None:
    """Here and not in ``addopts``, which would hold for benchmarks too."""
    if not config.option.markexpr and not any("::" in name for name in config.args):
        config.option.markexpr = "not slow"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where tests, and processes that they start, keep images in place of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache") / "cem"
        patch.setenv("CEM_CACHE", str(folder))
        yield folder
