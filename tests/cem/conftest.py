"""Commands run inside the test's own process, and one small run for tests that only read it."""

import signal
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace

import pytest

from cem import train


def _run(command, argv, path=None):
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr("cem.training.trainer.draw_tsne", lambda *_, **__: None)
        code = command.main([*argv, *([] if path is None else [f"--out={path}"])])
    return SimpleNamespace(path=path, code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="session")
def run():
    """Runs a command into a path, without its signal handlers and its slowest picture."""
    return _run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    line = "--surrogate=none --train-size=64 --batch-size=32 --epochs=2 --cut-layer=2 --device=cpu"
    return _run(train, line.split(), tmp_path_factory.mktemp("command") / "run")
