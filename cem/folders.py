"""Folders that appear complete, and in which one works at a time."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TextIO
from weakref import WeakSet

from cem.errors import MachineError, UsageError
from cem.files import is_unfinished, sync, unfinished, writing
from cem.locks import create, is_there, try_lock

LOCK = ".lock"
"""File of a folder in which somebody is at work: locked by him, and his name inside."""

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class Lock:
    """Keeps others out of a folder until it is released or the process ends, in whatever way that happens.

    Attributes:
        descriptor: of the file that is locked; a process that inherits it keeps the folder locked as long as it lives.
            Processes that are merely forked do not.

    Warns:
        UserWarning: the file system has no locks, so nobody is kept out.

    Raises:
        UsageError: somebody is at work in the folder; the message says which process.
        MachineError: nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        with writing(self._path):
            while True:
                self._file = open(self._path, "r+", encoding="utf-8", errors="replace", opener=create)  # noqa: SIM115
                free = try_lock(self._file.fileno())
                if free is False:
                    with self._file:
                        holder = _holder(self._file)
                    raise UsageError(f"another process is at work in {folder}: {holder}, or one that it started")
                # Who had it may have removed it between our opening and our locking.
                if sys.platform == "win32" or is_there(self._file.fileno(), self._path):
                    break
                self._file.close()
            if free is None:
                warnings.warn(f"{folder} is on a file system without locks: let nobody else work in it", stacklevel=2)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {platform.node()}")
            self._file.flush()
        self.descriptor = self._file.fileno()
        _held.add(self)

    def release(self) -> None:
        """Let others in; nothing is left behind."""
        if self._file.closed:
            return
        if sys.platform == "win32":  # where a file that is open cannot be removed
            self.close()
        with suppress(OSError):
            self._path.unlink()
        self.close()

    def close(self) -> None:
        """Forget the lock without letting go of it in other processes that have it."""
        self._file.close()

    def moved(self, folder: Path) -> Lock:
        """The lock, after its folder has become ``folder``."""
        if self._file.closed:
            return Lock(folder)
        self._path = folder / LOCK
        return self

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def _holder(file: TextIO) -> str:
    """Who has locked a file: he writes his name right after, where that of one who is no more may stand."""
    for _ in range(20):
        time.sleep(0.1)
        file.seek(0)
        if name := file.read():
            return name
    return "one that has just come"


def appear(names: Iterable[Path], fill: Callable[[Path], None]) -> tuple[Path, Lock] | None:
    """Make a folder under the first of ``names`` that is free: it appears there complete, and locked by this process.

    Until then it lies beside its place under a name that nobody can foresee. No file is ever replaced.

    Args:
        names: all of one parent, which is made if it is not there.
        fill: writes the files of the folder that it is given.

    Returns:
        Its path, and the lock; ``None`` if no name is free.

    Raises:
        MachineError: it cannot be written.
    """
    names = iter(names)
    first = next(names)
    with writing(first):
        first.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(first.parent)
        temporary, lock = _unfinished_folder(first)
        try:
            fill(temporary)
            sync(temporary)
            for path in chain([first], names):
                if sys.platform == "win32":  # where no folder with an open file in it can be renamed
                    lock.release()
                if _renamed(temporary, path):
                    sync(path.parent)
                    return path, lock.moved(path)
            return None
        except MachineError as error:
            raise MachineError(str(error).replace(str(temporary), str(first))) from error
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)
                lock.release()


def remove_left_lock(folder: Path) -> None:
    """Remove the lock that a process which is no more has left in a folder where nothing is to be done any more."""
    if (folder / LOCK).exists():
        with suppress(UsageError, MachineError):
            Lock(folder).release()


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that are no more were about to write in ``folder``; the living have locked what is theirs.

    Where locks cannot tell, nothing is removed: on file systems without them, and of single files on Windows.
    """
    for path in filter(is_unfinished, list(folder.iterdir())):
        with suppress(OSError):
            kind = path.lstat().st_mode
            if stat.S_ISDIR(kind):
                with open(path / LOCK, "r+", opener=create) as file:
                    if try_lock(file.fileno()):
                        shutil.rmtree(path)
            elif stat.S_ISREG(kind) and sys.platform != "win32":
                with open(path, "rb+") as file:
                    if try_lock(file.fileno()):
                        path.unlink()


def _unfinished_folder(path: Path) -> tuple[Path, Lock]:
    """A folder that shall appear at ``path``, with the permissions of any new one, and the lock in it."""
    while True:
        temporary = unfinished(path)
        temporary.mkdir()
        try:
            return temporary, Lock(temporary)
        except UsageError:
            continue  # as above
        except MachineError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise


def _renamed(folder: Path, path: Path) -> bool:
    """Rename ``folder`` unless there is something: an empty folder may go, which is what POSIX's rename means."""
    try:
        os.rename(folder, path)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


_held = WeakSet[Lock]()


def _let_go() -> None:
    """In a process that was forked, such as one that loads images: a lock must not outlive whoever took it."""
    for lock in list(_held):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
