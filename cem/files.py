"""Files that are complete or not there, and what the system refuses of them in words of the user's."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cem.errors import CheckpointError, MachineError
from cem.locks import is_there, try_lock

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota of this disk is used up"}


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
        sync(path.parent)


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


def is_unfinished(path: Path) -> bool:
    """Whether its name is one of those under which files and folders are written before they appear."""
    return _UNFINISHED.fullmatch(path.name) is not None


def unfinished(path: Path) -> Path:
    """Where to write what shall appear at ``path``: nobody can plant a link under a name that he cannot foresee."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")


def sync(folder: Path) -> None:
    """Let new names in ``folder`` survive a power cut, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unfinished_file(path: Path) -> tuple[Path, int | None]:
    """A file that shall appear at ``path``, with the permissions of any new one, and the descriptor that locks it."""
    while True:
        temporary = unfinished(path)
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if sys.platform == "win32":  # where a file that is open cannot be replaced
            os.close(file)
            return temporary, None
        if try_lock(file) is not False and is_there(file, temporary):
            return temporary, file
        os.close(file)  # somebody who removes what the dead have left was faster
