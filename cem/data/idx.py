"""The idx format of MNIST and Fashion-MNIST (http://yann.lecun.com/exdb/mnist/)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cem.errors import DataError

_UINT8 = 0x08


def find_idx(root: Path, name: str) -> Path | None:
    """The path of ``name`` or ``name.gz`` in ``root``, or None."""
    candidates = (root / name, root / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read a file of unsigned bytes, gzipped if named ``.gz``, into a uint8 tensor of ``ndim`` dimensions.

    The header is two zero bytes, the type (8 for uint8), the number of dimensions, and each size as a
    big-endian 32-bit integer.

    Raises:
        DataError: the file cannot be read, is not gzip although named so, has another header, or is of another
            length than its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error

    header = 4 + 4 * ndim
    expected = bytes((0, 0, _UINT8, ndim))
    if content[:4] != expected or len(content) < header:
        raise DataError(
            f"{path}: expected the idx header {expected.hex()} (uint8, {ndim} dimensions) and {ndim} sizes, "
            f"got {content[:header].hex() or 'an empty file'}"
        )
    shape = [int(size) for size in np.frombuffer(content, dtype=">u4", count=ndim, offset=4)]
    if 0 in shape[1:]:
        raise DataError(f"{path}: expected images of at least one pixel, got the shape {shape}")
    if len(content) != header + math.prod(shape):
        raise DataError(
            f"{path}: the header promises {math.prod(shape)} bytes (shape {shape}), "
            f"the file has {len(content) - header}"
        )
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=header).copy()).view(shape)
