"""Jobs in processes that crash, hang, or lose the device, and how ``python -m benchmarks.gpu`` goes on."""

import os
import time
from pathlib import Path

import pytest
from troubled import Troubled, Word, broken

from benchmarks.gpu import processes


def perform(words, count=1, seconds=60.0, make=Troubled):
    """Records by word, and the words that were left out."""
    records = {}
    until = time.monotonic() + seconds
    left = processes.run(words, make, count, until, lambda word, record: records.update({word.name: record}))
    return records, [word.name for word in left]


def gone(process, seconds=10.0):
    """Whether it has ended, or does so soon; then it may wait for somebody to take note."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
    return False


@pytest.mark.parametrize(
    ("trouble", "status", "why"),
    [
        ("crashes", "error", "exit code 7"),
        pytest.param("loses the device", "ok", "", marks=pytest.mark.slow),
        pytest.param("hangs", "error", "no answer after", marks=pytest.mark.slow),
    ],
)
def test_trouble_costs_its_own_job_and_a_fresh_process_goes_on(tmp_path, trouble, status, why):
    child = tmp_path / "child"
    name = f"hangs {child}" if trouble == "hangs" else trouble
    records, left = perform([Word("first"), Word(name, limit=10.0), Word("last")])
    assert [records[word]["status"] for word in ("first", name, "last")] == ["ok", status, "ok"]
    assert why in records[name].get("why", "")
    assert records["first"]["process"] != records["last"]["process"]
    assert not left
    assert trouble != "hangs" or gone(child.read_text())


def test_jobs_are_shared_and_processes_are_not_those_that_called():
    records, _ = perform([Word(str(number)) for number in range(8)], count=2)
    used = {record["process"] for record in records.values()}
    assert len(records) == 8
    assert 1 <= len(used) <= 2
    assert os.getpid() not in used
    assert all(map(gone, used))


@pytest.mark.slow
def test_what_would_end_too_late_is_not_begun_and_what_is_at_work_then_is_ended(tmp_path):
    child = tmp_path / "child"
    words = [Word("in time"), Word(f"hangs {child}"), Word("too long", expected=99.0)]
    records, left = perform(words, seconds=30.0)
    assert list(records) == ["in time"]
    assert left == [f"hangs {child}", "too long"]
    assert gone(child.read_text())


def test_where_no_process_can_start_nothing_waits_for_ever():
    assert perform([Word("anything")], make=broken) == ({}, ["anything"])
