"""Images that took long to read, as they came out: kept in the user's cache folder, checked whenever they are read.

A file is a line with the checksum of the rest, a line of JSON, and the pixels. Deleting it costs time only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cem.data.decode import Pixels
from cem.errors import MachineError
from cem.files import replacing

LIMIT = 4 * 2**30  # bytes of all files together; those unused for longest make room
_SUFFIX = ".images"
_LONGEST_LINE = 2**20


def folder() -> Path | None:
    """``CEM_CACHE``, or ``cem`` where the system has such files; ``None`` if ``CEM_CACHE`` is empty."""
    given = os.environ.get("CEM_CACHE")
    if given is not None:
        return Path(given).expanduser().absolute() if given else None
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", os.path.join(home, "AppData", "Local"))
    elif sys.platform == "darwin":
        base = os.path.join(home, "Library", "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return Path(base, "cem") if os.path.isabs(base) else None


def place(owner: str) -> Path | None:
    """The one file for what ``owner`` names; ``None`` where nothing is kept."""
    where = folder()
    return where and where / f"{hashlib.sha256(owner.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}{_SUFFIX}"


def load(path: Path, key: str) -> tuple[Pixels, dict[str, Any]] | None:
    """What was kept under ``key``: images and facts; ``None`` if there is nothing, or something else.

    A damaged file is removed with a warning.
    """
    try:
        with open(path, "rb") as file:
            checksum, head = (file.readline(_LONGEST_LINE) for _ in range(2))
            about = json.loads(head)
            if about["key"] != key:
                return None
            shape = about["shape"]
            if os.fstat(file.fileno()).st_size != file.tell() + math.prod(shape):
                raise ValueError("another length than its first lines say")
            images = np.fromfile(file, np.uint8).reshape(shape)
        if checksum != _checksum(head, images):
            raise ValueError("another checksum than its first line says")
        os.utime(path)  # it was used
        return images, about["facts"]
    except OSError:
        return None
    except Exception as error:  # whatever a damaged file makes of JSON, the cure is the same
        warnings.warn(f"{path} is damaged ({error}); the images are read again", stacklevel=2)
        path.unlink(missing_ok=True)
        return None


def save(path: Path, key: str, images: Pixels, facts: dict[str, Any]) -> None:
    """Keep ``images`` and ``facts``, which JSON must be able to hold, in place of what was at ``path``.

    What cannot be written, or is larger than :data:`LIMIT`, is not kept.
    """
    if images.nbytes > LIMIT:
        return
    head = json.dumps({"key": key, "shape": images.shape, "facts": facts}).encode() + b"\n"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # images may be nobody else's business
        path.unlink(missing_ok=True)
        _make_room(path.parent, images.nbytes)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.writelines((_checksum(head, images), head))
            file.write(images.data)
    except (OSError, MachineError):
        return


def _checksum(head: bytes, images: Pixels) -> bytes:
    digest = hashlib.sha256(head)
    digest.update(images.data)
    return digest.hexdigest().encode() + b"\n"


def _make_room(where: Path, wanted: int) -> None:
    """Remove what was unused for longest, leftovers of processes that were killed among it."""
    files = sorted((each.stat().st_mtime_ns, each.stat().st_size, each) for each in where.glob(f"*{_SUFFIX}*"))
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total + wanted <= LIMIT:
            break
        path.unlink(missing_ok=True)
        total -= size
