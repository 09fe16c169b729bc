"""One small run, trained by the command, for tests that only read it."""

import pytest
from said import run

from cem import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    line = "--surrogate=none --train-size=64 --batch-size=32 --epochs=2 --cut-layer=2 --device=cpu"
    return run(train, line.split(), tmp_path_factory.mktemp("command") / "run")
