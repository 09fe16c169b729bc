"""What the tests of kernels share."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from compile_kernels import TARGETS, Rows, rows_for

RUNS = [*((target,) for target in TARGETS), ("--vary-sizes", "sm90")]
COMPILING = pytest.StashKey[dict[tuple[str, ...], "Future[Rows]"]]()


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    """A kernel that reads what nobody wrote finds NaN there: PyTorch's own aid against nondeterminism."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(1).new_empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def pytest_collection_finish(session: pytest.Session) -> None:
    """The compiler takes minutes: it starts with the session, beside the other tests, on all cores but one. Where
    pytest-xdist gives every core tests (``-n 2``), a test compiles what it looks at."""
    wanted = any("compiled" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly and "PYTEST_XDIST_WORKER" not in os.environ:
        pool = ThreadPoolExecutor(max((os.cpu_count() or 1) - 1, 1))
        # A copy: a test that sets a variable moves the process's own list of them, and a start just then fails.
        environment = dict(os.environ)
        session.config.stash[COMPILING] = {run: pool.submit(rows_for, run, environment) for run in RUNS}
        session.config.add_cleanup(lambda: pool.shutdown(cancel_futures=True))


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> Callable[..., Rows]:
    """The rows that ``compile_kernels.py`` prints for its arguments, of which there is one list for every run."""
    early = request.config.stash.get(COMPILING, {})
    return lambda *a: early[a].result() if a in early else rows_for(a, dict(os.environ))
