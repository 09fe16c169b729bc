"""Files that are complete or not there, folders that appear complete, and folders in which one works at a time."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

from cem.errors import CheckpointError, MachineError, UsageError

LOCK = ".lock"
"""File of a folder in which somebody is at work: locked by him, and his name inside."""

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota of this disk is used up"}
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_FAR = 2**30  # on Windows nobody can read a byte that is locked, so it is one behind the text


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes to ``path``, or below it: what the system refuses is the user's to mend.

    Raises:
        MachineError: naming the file, and why it cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # what PyTorch says of a file tells nobody
        if not isinstance(cause, OSError) or cause.errno is None or isinstance(cause, ConnectionError):
            raise
        named = isinstance(cause.filename, str) and not _UNFINISHED.fullmatch(Path(cause.filename).name)
        reason = _FULL.get(cause.errno) or cause.strerror
        raise MachineError(f"cannot write {cause.filename if named else path}: {reason}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on the way out it takes the place of ``path``, complete on disk.

    Neither a crash nor a power cut leaves half a file; where the block raises, what was at ``path`` stays.

    Raises:
        MachineError: it cannot be written.
    """
    with writing(path):
        temporary, file = _unfinished_file(path)
        try:
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            if file is not None:
                os.close(file)
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON to ``path``, see :func:`replacing`."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, *names: str) -> dict[str, Any] | None:
    """What :func:`write_json` wrote, or ``None`` if there is no such file.

    Args:
        path: the file.
        names: what it has to hold.

    Raises:
        CheckpointError: it cannot be read, holds something else, or not all of ``names``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot read {path}: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(content).__name__}")
    if missing := [name for name in names if name not in content]:
        raise CheckpointError(f"{path} is not complete: it has no {missing[0]}")
    return content


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
                self._file = open(self._path, "r+", encoding="utf-8", errors="replace", opener=_create)  # noqa: SIM115
                free = _try_lock(self._file.fileno())
                if free is False:
                    with self._file:
                        holder = self._file.read() or "one that has just come"
                    raise UsageError(f"another process is at work in {folder}: {holder}, or one that it started")
                # Who had it may have removed it between our opening and our locking.
                if sys.platform == "win32" or _is_there(self._file.fileno(), self._path):
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
            _sync(temporary)
            for path in chain([first], names):
                if sys.platform == "win32":  # where no folder with an open file in it can be renamed
                    lock.release()
                if _renamed(temporary, path):
                    _sync(path.parent)
                    return path, lock.moved(path)
            return None
        except MachineError as error:
            raise MachineError(str(error).replace(str(temporary), str(first))) from error
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)
                lock.release()


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that are no more were about to write in ``folder``; the living have locked what is theirs.

    Where locks cannot tell, nothing is removed: on file systems without them, and of single files on Windows.
    """
    for path in filter(is_unfinished, list(folder.iterdir())):
        with suppress(OSError):
            kind = path.lstat().st_mode
            if stat.S_ISDIR(kind):
                with open(path / LOCK, "r+", opener=_create) as file:
                    if _try_lock(file.fileno()):
                        shutil.rmtree(path)
            elif stat.S_ISREG(kind) and sys.platform != "win32":
                with open(path, "rb+") as file:
                    if _try_lock(file.fileno()):
                        path.unlink()


def is_unfinished(path: Path) -> bool:
    """Whether its name is one of those under which files and folders are written before they appear."""
    return _UNFINISHED.fullmatch(path.name) is not None


def _unfinished(path: Path) -> Path:
    """Where to write what shall appear at ``path``: nobody can plant a link under a name that he cannot foresee."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")


def _unfinished_file(path: Path) -> tuple[Path, int | None]:
    """A file that shall appear at ``path``, with the permissions of any new one, and the descriptor that locks it."""
    while True:
        temporary = _unfinished(path)
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if sys.platform == "win32":  # where a file that is open cannot be replaced
            os.close(file)
            return temporary, None
        if _try_lock(file) is not False and _is_there(file, temporary):
            return temporary, file
        os.close(file)  # somebody who removes what the dead have left was faster


def _unfinished_folder(path: Path) -> tuple[Path, Lock]:
    """A folder that shall appear at ``path``, with the permissions of any new one, and the lock in it."""
    while True:
        temporary = _unfinished(path)
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


def _sync(folder: Path) -> None:
    """Let new names in ``folder`` survive a power cut, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _create(path: str, flags: int) -> int:
    """Open, and make what is not there, without following a link."""
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _try_lock(descriptor: int) -> bool | None:
    """Lock a file until it is closed: whether that succeeded, or ``None`` on a file system without locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in _HELD:
            return False
        raise
    return True


def _is_there(descriptor: int, path: Path) -> bool:
    """Whether an open file is still what lies at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


_held = WeakSet[Lock]()


def _let_go() -> None:
    """In a process that was forked, such as one that loads images: a lock must not outlive whoever took it."""
    for lock in list(_held):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
