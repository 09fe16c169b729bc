"""Image files as one array: of one size, read once, and kept where that took long."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch

from cem.data import cache
from cem.data.decode import DEEP_GRAY, Pixels, read_image
from cem.errors import DataError
from cem.progress import over

SIZE = 64  # pixels, of images whose sizes differ
LARGEST = 4 * 2**30  # bytes of all images; more are not kept in the size that they have
WORTH_KEEPING = 2.0  # seconds
_VERSION = 1  # to be raised when the same files give other pixels or facts


class Read(NamedTuple):
    """Images that were read.

    Attributes:
        images: uint8 ``[N, 3, H, W]``.
        facts: ``done``, how many images each phrase of :func:`~cem.data.decode.read_image` was said of; ``sizes``,
            ``[H, W]`` of each size that was found, sorted; ``brightest``, the highest of the 256 levels that 16-bit
            gray was scaled to.
        kept: the file that they were kept in, if they come from there.
    """

    images: Pixels
    facts: dict[str, Any]
    kept: Path | None


def read_images(paths: Sequence[str], owner: Path, image_size: int | None) -> Read:
    """Read ``paths``, or what was kept of them since they last changed.

    Args:
        paths: image files.
        owner: absolute folder; one set of images is kept for each ``owner`` and ``image_size``.
        image_size: resize to this height and width. Without it images keep the size that all of them have, unless they
            would take more than :data:`LARGEST`; otherwise they get :data:`SIZE`.

    Raises:
        DataError: a file is no image that can be read.
    """
    state = [(path, *_state(path)) for path in paths]
    wanted = [_VERSION, PIL.__version__, torch.__version__, image_size, state]
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    place = cache.place(f"{owner}\n{image_size}")
    found = place and cache.load(place, key)
    if found:
        return Read(*found, place)
    began = time.perf_counter()
    images, facts = _read(paths, image_size)
    if place and time.perf_counter() - began >= WORTH_KEEPING:
        cache.save(place, key, images, facts)
    return Read(images, facts, None)


def _state(path: str) -> tuple[int, int]:
    """Size and time of the last change."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise DataError(f"{path} is not a regular file")
    return found.st_size, found.st_mtime_ns


def _read(paths: Sequence[str], image_size: int | None) -> tuple[Pixels, dict[str, Any]]:
    done: Counter[str] = Counter()
    sizes, brightest, as_it_is = set(), 0, image_size is None
    images = np.empty(0, np.uint8)
    for position, path in enumerate(over(paths, "reading images")):
        pixels, said = read_image(path)
        done.update(said)
        sizes.add(pixels.shape[:2])
        if DEEP_GRAY in said:
            brightest = max(brightest, int(pixels.max()))
        if position == 0:
            as_it_is = as_it_is and pixels.nbytes * len(paths) <= LARGEST
            size = pixels.shape[:2] if as_it_is else 2 * (image_size or SIZE,)
            images = np.empty((len(paths), 3, *size), np.uint8)
        elif as_it_is and len(sizes) > 1:
            as_it_is = False
            before, images = images, np.empty((len(paths), 3, SIZE, SIZE), np.uint8)
            for each in range(position):
                images[each] = _resized(before[each], images.shape[2:])
        images[position] = _resized(pixels.transpose(2, 0, 1), images.shape[2:])
    return images, {"done": dict(done), "sizes": sorted(map(list, sizes)), "brightest": brightest}


def _resized(pixels: Pixels, size: tuple[int, ...]) -> Pixels:
    """``[3, H, W]`` stretched to ``size``."""
    if pixels.shape[1:] == size:
        return pixels
    from torchvision.transforms.v2.functional import resize

    resized: Pixels = resize(torch.from_numpy(np.array(pixels)), list(size), antialias=True).numpy()
    return resized
