"""Files that are complete or not there, folders that appear complete, and locks that die with their process."""

import errno
import json
import os
import stat
import subprocess
import sys

import pytest

from cem import files, folders
from cem.errors import CheckpointError, MachineError, UsageError
from cem.files import read_json, replacing, write_json, write_text
from cem.folders import Lock, appear, remove_unfinished
from cem.locks import try_lock

posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX systems")
DEAD = f".a.{'0' * 16}.tmp"


def test_file_takes_the_place_of_the_one_before_with_the_permissions_of_any_new_one(tmp_path):
    for text in ("σ = 0.1", "σ = 0.2"):
        write_text(tmp_path / "a.txt", text)
    (tmp_path / "usual.txt").touch()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "σ = 0.2"
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "usual.txt"}
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "usual.txt").stat().st_mode


def test_what_fails_halfway_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})

    def fail():
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@posix
def test_a_file_is_written_under_another_name_each_time_and_never_through_a_link(tmp_path, monkeypatch):
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("mine")
            names.add(temporary.name)
    assert len(names) == 3
    (tmp_path / "other.txt").write_text("another's")
    monkeypatch.setattr(files, "unfinished", lambda _: tmp_path / DEAD)  # as if it could be foreseen
    for planted in (DEAD, folders.LOCK):
        (tmp_path / planted).symlink_to("other.txt")
    with pytest.raises(MachineError, match=r"cannot write .*a\.txt: File exists"):
        write_text(tmp_path / "a.txt", "mine")
    with pytest.raises(MachineError, match=r"cannot write .*\.lock: Too many levels of symbolic links"):
        Lock(tmp_path)
    assert (tmp_path / "other.txt").read_text() == "another's"


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "Read-only file system")]
)
def test_disk_that_refuses_is_named_with_the_reason_and_keeps_the_old_file(tmp_path, monkeypatch, number, reason):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    def write():
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
            try:
                refuse(temporary)
            except OSError:
                raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 - so does PyTorch

    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(MachineError, match=f"cannot write {tmp_path / 'a.txt'}: {reason}"):
        write()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(MachineError, match=f"cannot write {tmp_path / 'a.txt'}: {reason}"):
        write_text(tmp_path / "a.txt", "new")
    with pytest.raises(MachineError, match=f"cannot write {tmp_path / 'b' / 'c'}: {reason}"):
        appear([tmp_path / "b"], lambda folder: write_text(folder / "c", "new"))
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot read"), ("[]", "must hold a mapping, got list"), ("{}", "it has no figure")]
)
def test_damaged_json_is_refused_by_name(tmp_path, text, message):
    assert read_json(tmp_path / "a.json") is None
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"a\.json.*") as error:
        read_json(tmp_path / "a.json", "figure")
    assert message in str(error.value)


def test_folder_is_locked_for_one_until_it_is_released_and_says_by_whom(tmp_path):
    with Lock(tmp_path), pytest.raises(UsageError, match=f"at work in {tmp_path}: process {os.getpid()} on "):
        Lock(tmp_path)
    assert list(tmp_path.iterdir()) == []
    Lock(tmp_path).release()


def test_who_has_just_locked_a_folder_is_waited_for_until_his_name_stands_where_a_dead_one_stood(tmp_path, monkeypatch):
    path = tmp_path / folders.LOCK
    path.write_text("process 1 of the past")
    with open(path, "r+") as file:
        assert try_lock(file.fileno())
        names = iter(["", "process 2"])
        monkeypatch.setattr(folders.time, "sleep", lambda _: path.write_text(next(names)))
        with pytest.raises(UsageError, match=r"at work in .*: process 2, or one that it started"):
            Lock(tmp_path)


HOLD = """
import os, sys, time
from pathlib import Path
from cem.folders import Lock
lock = Lock(Path(sys.argv[1]))
if os.fork() == 0:
    print(flush=True)
    time.sleep(60)
input()
"""


@posix
def test_lock_dies_with_its_process_also_where_that_has_forked_others(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=-1, stdout=-1)
    process.stdout.readline()
    with pytest.raises(UsageError, match=f"process {process.pid} on "):
        Lock(tmp_path)
    process.kill()
    process.wait()
    Lock(tmp_path).release()


def test_file_system_without_locks_is_warned_about_and_used_and_nothing_is_removed_from_it(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / DEAD).touch()
    with pytest.warns(UserWarning, match="on a file system without locks"):
        lock = Lock(tmp_path)
    remove_unfinished(tmp_path)
    write_text(tmp_path / "a.txt", "text")
    lock.release()
    assert {path.name for path in tmp_path.iterdir()} == {DEAD, "a.txt"}


@posix
def test_what_the_dead_left_is_removed_and_what_the_living_write_or_others_have_is_not(tmp_path):
    for name in (DEAD, ".b.tmp", "c.tmp"):
        (tmp_path / name).touch()
    for folder in (f".d.{'0' * 16}.tmp", ".e.tmp"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "last.pt").touch()

    def fill(folder):
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("text")
            remove_unfinished(tmp_path)
            assert temporary.exists()
            assert folder.exists()

    path, lock = appear([tmp_path / "run"], fill)
    lock.release()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / ".e.tmp").stat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "run", ".b.tmp", "c.tmp", ".e.tmp"}


def test_folder_appears_complete_and_locked_under_the_first_free_name_or_not_at_all(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").touch()
    (tmp_path / "b").touch()
    taken = [tmp_path / "a", tmp_path / "b"]

    def fill(folder):
        assert not (tmp_path / "c").exists()
        (folder / "file").touch()

    assert appear(taken, fill) is None
    path, lock = appear([*taken, tmp_path / "c"], fill)
    with pytest.raises(UsageError, match="at work in"):
        Lock(path)
    lock.release()
    assert {each.name for each in path.iterdir()} == {"file"}
    assert {each.name for each in tmp_path.iterdir()} == {"a", "b", "c"}
