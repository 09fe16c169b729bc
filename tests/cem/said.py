"""Runs a command inside the test's own process."""

import signal
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest


class Said(NamedTuple):
    """Where a command was to leave its results, its exit code, and what it said."""

    path: Path | None
    code: int
    out: str
    err: str


def run(command, argv, path):
    """Run a command into ``path``, without its signal handlers and its slowest picture."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr("cem.training.trainer.draw_tsne", lambda *_, **__: None)
        code = command.main([*argv, *([] if path is None else [f"--out={path}"])])
    return Said(path, code, out.getvalue(), err.getvalue())
