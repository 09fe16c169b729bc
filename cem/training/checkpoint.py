"""Checkpoint files: written atomically, checked bit by bit, read without running code, random states and all."""

from __future__ import annotations

import os
import random
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from cem.errors import CheckpointError
from cem.files import replacing
from cem.interrupts import held

NUMBER = 3
FORMAT = f"cem-checkpoint-{NUMBER}"
_START = 1024  # bytes; the format is the first of what is pickled
_WRITERS = {1: "version 0.1.0", 2: "a preview of version 0.2.0"}

_ABSENT = object()
_KINDS: dict[type, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", Tensor: "a tensor",
    dict: "a mapping", list: "a list", tuple: "a list",
}  # fmt: skip
_LIKE_PARAMETERS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""What of an optimizer's state has the shape of its parameter, which PyTorch finds out in the next step."""

RUN: Mapping[str, Any] = {
    "encoder": dict,
    "defense": dict,
    "server": dict,
    "optimizers": dict,
    "scheduler": dict,
    "config": dict,
    "data_facts": {
        "num_classes": int,
        "image_shape": (int, int, int),
        "mean": (float, ...),
        "std": (float, ...),
        "train_size": int,
    },
    "data_fingerprint": {str: int},
    "random": dict,
    "history": ({str: float}, ...),
    "skipped": {str: int},
    "best": (float, float),
    "best_epoch": int,
}
"""How what a run saves is built, see :func:`expect`; terms and whatever else there is come besides."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors and plain Python values) to ``path``, or leave what was there.

    The file is what ``torch.save`` writes, and a line with a CRC-32 of all before it, which any flipped bit breaks.
    ``torch.load`` overlooks that line, and so reads the file too.

    Raises:
        MachineError: the file cannot be written; a disk may be full.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        summed = _Summed(file)
        with held():
            torch.save({"format": FORMAT, **content}, summed)  # type: ignore[arg-type]
        file.write(_seal(summed.checksum))


def load(path: Path, expected: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read what :func:`save` wrote, with all tensors on the CPU.

    Nothing is unpickled before the checksum holds, and then only tensors and plain values (``weights_only=True``), so a
    checkpoint from elsewhere cannot run code.

    Args:
        path: the file.
        expected: what has to be in it, see :func:`expect`, such as :data:`RUN`; more may be.

    Raises:
        CheckpointError: if there is no such file, it cannot be read, is damaged, or is something else.
    """
    try:
        with open(path, "rb") as file:
            _check_seal(file, path)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # whoever wrote this checksum wrote what PyTorch refuses, in one of its many ways
        raise CheckpointError(f"{path} holds something other than tensors and plain values") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of cem (format {FORMAT!r})")
    for name, each in (expected or {}).items():
        expect(path, name, each, content.get(name, _ABSENT))
    return content


def expect(path: Path, name: str, expected: Any, found: Any) -> None:
    """Raise where ``found``, which is called ``name`` in the checkpoint ``path``, is not built like ``expected``.

    ``expected`` is an example, a tensor (whose shape counts), number, text, or a mapping or sequence of these with as
    many entries; or a type. ``(float, ...)`` is a sequence of any length, ``{str: int}`` a mapping of any names, and
    ``None`` anything.

    Raises:
        CheckpointError: naming the file, the place, what was expected and what came.
    """
    if expected is None:
        return
    if found is _ABSENT:
        raise CheckpointError(f"{path} does not fit: it has no {name}")
    kind: Any = next(kind for kind in _KINDS if isinstance(expected, kind) or expected is kind)
    exact = float if kind is int and expected is not int else kind  # as an example, one number is as good as another
    takes: Any = {float: (int, float), list: (list, tuple), tuple: (list, tuple)}.get(exact, exact)
    huge = isinstance(found, int) and found.bit_length() > 63
    if not isinstance(found, takes) or (isinstance(found, bool) and kind is not bool) or huge:
        raise CheckpointError(f"{path} does not fit: {name} must be {_KINDS[exact]}, got {_name_of(found)}")
    if isinstance(expected, Tensor) and expected.shape != found.shape:
        raise CheckpointError(f"{path} does not fit: {name} has shape {list(found.shape)}, not {list(expected.shape)}")
    if isinstance(expected, dict):
        wanted = dict.fromkeys(found, expected[str]) if str in expected else expected
        stranger = next((each for each in found if each not in wanted or not isinstance(each, str)), None)
        if stranger is not None:
            raise CheckpointError(f"{path} does not fit: nothing here is called {name}.{stranger}")
        for each, value in wanted.items():
            expect(path, f"{name}.{each}", value, found.get(each, _ABSENT))
    elif isinstance(expected, list | tuple):
        entries = expected[:1] * len(found) if expected[-1:] == (...,) else expected
        if len(entries) != len(found):
            raise CheckpointError(f"{path} does not fit: {name} has {len(found)} entries, not {len(entries)}")
        for number, (value, each) in enumerate(zip(entries, found, strict=True)):
            expect(path, f"{name}.{number}", value, each)


def load_state(module: nn.Module, content: Mapping[str, Any], part: str, path: Path) -> None:
    """Load ``content[part]`` into ``module``.

    Raises:
        CheckpointError: if the checkpoint has no such part, or its names or shapes are those of another network.
    """
    # What a module saves beside tensors is its own affair.
    own = {name: value if isinstance(value, Tensor) else None for name, value in module.state_dict().items()}
    expect(path, part, own, content.get(part, _ABSENT))
    with fitting(path, part):
        module.load_state_dict(content[part])


def load_optimizer(optimizer: torch.optim.Optimizer, content: Mapping[str, Any], name: str, path: Path) -> None:
    """Load ``content["optimizers"][name]`` into ``optimizer``, which alone would take the state of nearly any other.

    Raises:
        CheckpointError: if there is no such part, or it is of another optimizer or of other parameters.
    """
    found, whole = content["optimizers"].get(name, _ABSENT), f"optimizers.{name}"
    expect(path, whole, {"state": dict, "param_groups": optimizer.state_dict()["param_groups"]}, found)
    parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    for number, state in found["state"].items():
        place = f"{whole}.state.{number}"
        if number not in range(len(parameters)):
            raise CheckpointError(f"{path} does not fit: {place} is of no parameter, there are {len(parameters)}")
        expect(path, place, dict, state)
        for key in [key for key in state if key in _LIKE_PARAMETERS and state[key] is not None]:
            expect(path, f"{place}.{key}", parameters[number], state[key])
    with fitting(path, whole):
        optimizer.load_state_dict(found)


def check_random_state(state: Any, loader: torch.Generator, device: torch.device, path: Path) -> None:
    """Raise where :func:`restore_random_state` could not use ``state``; all random states stay as they are.

    Raises:
        CheckpointError: naming the file and the place.
    """
    own = random_state(loader, device)
    expect(path, "random", own | {"python": (int, (int, ...), None), "cuda": None}, state)
    with fitting(path, "random"):
        if not 0 <= state["numpy"]["rest"][0] <= len(state["numpy"]["keys"]):  # where NumPy would read on
            raise ValueError(f"position {state['numpy']['rest'][0]}")
        try:
            restore_random_state(state, loader, device)
            random.gauss(0.0, 1.0)
        finally:
            restore_random_state(own, loader, device)


@contextmanager
def fitting(path: Path, name: str) -> Iterator[None]:
    """Around what uses the part ``name`` of the checkpoint ``path``: what goes wrong is the checkpoint's fault."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"{path} does not fit: {name} cannot be used ({type(error).__name__}: {reason})"
        ) from error


def random_state(loader: torch.Generator, device: torch.device) -> dict[str, Any]:
    """Every random state that a run draws from, as tensors and plain values."""
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the state libraries draw from
    return {
        "python": random.getstate(),
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "rest": (int(position), int(has_gauss), float(cached)),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "loader": loader.get_state(),
    }


def restore_random_state(state: dict[str, Any], loader: torch.Generator, device: torch.device) -> None:
    """Inverse of :func:`random_state`. A CUDA state is left alone by a run that continues on the CPU."""
    random.setstate(state["python"])
    keys = state["numpy"]["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *state["numpy"]["rest"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    loader.set_state(state["loader"])


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, on all devices."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


class _Summed:
    """A file to write to, and the checksum of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.checksum = file, 0

    def write(self, data: bytes) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _seal(checksum: int) -> bytes:
    """The last line of a file whose other bytes have this checksum."""
    return f"\n{FORMAT} crc32 {checksum:08x}\n".encode()


def _check_seal(file: BinaryIO, path: Path) -> None:
    """Raise :class:`CheckpointError` where ``file`` is not what :func:`save` wrote; leave it at its beginning."""
    sealed = file.seek(0, os.SEEK_END) - len(_seal(0))
    file.seek(0)
    start, checksum, left = file.read(_START), 0, max(sealed, 0)
    file.seek(0)
    while left > 0 and (block := file.read(min(left, 2**20))):
        checksum, left = zlib.crc32(block, checksum), left - len(block)
    if file.read() == _seal(checksum):
        file.seek(0)
        return
    said = re.search(rb"cem-checkpoint-(\d+)", start)
    if said is None:
        raise CheckpointError(f"{path} is not a checkpoint of cem" + (": it is empty" if not start else ""))
    if int(said[1]) != NUMBER:
        writer = _WRITERS.get(int(said[1]), "another version")
        raise CheckpointError(f"{path} was written by {writer} ({said[0].decode()}); this one reads {FORMAT}")
    raise CheckpointError(f"{path} is damaged: it does not have the checksum that it was written with")


def _name_of(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 63:
        return "one beyond 2**63"
    return next((words for kind, words in _KINDS.items() if isinstance(value, kind)), type(value).__name__)
