"""Files that cannot be used, in the working directory: each function gives one that makes them."""

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from cem.training import checkpoint


def file(path, content=b""):
    """A file, and the folders above it; only those where the path ends with a slash."""

    def make():
        Path(path if path.endswith("/") else os.path.dirname(path)).mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def gone(path):
    return lambda: shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def edited(path, edit):
    return lambda: Path(path).write_bytes(edit(Path(path).read_bytes()))


def cut(path, size=1000):
    """Only the first bytes of a file."""
    return edited(path, lambda old: old[:size])


def flipped(path):
    """One bit in the middle of a file is another."""
    return edited(path, lambda old: old[: (at := len(old) // 2)] + bytes([old[at] ^ 1]) + old[at + 1 :])


def options(path, **changes):
    """Other options in a YAML file."""
    return edited(path, lambda old: yaml.safe_dump(yaml.safe_load(old) | changes).encode())


def entries(path, *without, **changes):
    """Entries of a checkpoint that are missing or others, under a checksum that fits."""

    def make():
        content = checkpoint.load(Path(path)) | changes
        checkpoint.save(Path(path), {name: content[name] for name in content if name not in ("format", *without)})

    return make


def header(*sizes):
    """That of an idx file of bytes."""
    return bytes((0, 0, 8, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes)


IMAGES, LABELS, TESTED = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"
IDX = {
    IMAGES: header(40, 28, 28) + bytes(40 * 28 * 28),
    LABELS: header(40) + bytes(range(10)) * 4,
    TESTED: header(20, 28, 28) + bytes(20 * 28 * 28),
    "t10k-labels-idx1-ubyte": header(20) + bytes(range(10)) * 2,
}


def idx(name, content, end=""):
    """The files of a small MNIST in ``mnist``, of which one has this content, and ``end`` behind its name."""
    return lambda: [
        file(f"mnist/{each}{end * (each == name)}", content if each == name else usual)() for each, usual in IDX.items()
    ]


def pictures(*folders, count=10):
    """Folders of images below ``pets``, no two alike."""

    def make():
        random = np.random.default_rng(0)
        for path in (Path("pets", each, f"{number}.png") for each in folders for number in range(count)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)

    return make


def bomb():
    """An image whose header claims 65,544 by 1,048,584 pixels."""
    Image.new("RGB", (8, 8)).save("pets/cat/huge.bmp")
    edited("pets/cat/huge.bmp", lambda old: old[:20] + b"\1" + old[21:24] + b"\x10" + old[25:])()
