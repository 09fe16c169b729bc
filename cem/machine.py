"""What a machine cannot give, in words of its user's: memory, and processes that live on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cem.errors import MachineError

_WANTED = re.compile(r"tried to allocate (\d+) bytes|(?:tried|unable) to allocate ([\d.]+ ?[KMGTPE]i?B)", re.IGNORECASE)
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|unable to allocate|Storage size calculation overflowed"
    r"|Overflow when unpacking long|array is too big",
    re.IGNORECASE,
)
_LOST = re.compile(r"DataLoader worker \(pid.*")


def check_fits(wanted: int, device: torch.device, what: str, turn: str) -> None:
    """Raise :class:`MachineError` if ``what`` takes more bytes than ``device`` has; where that is known."""
    there = total_memory(device)
    if there is not None and wanted > there:
        raise MachineError(
            f"out of memory: {what} takes at least {wanted / 1e9:,.1f} GB of {there / 1e9:,.1f} GB; lower {turn}"
        )


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory that a device has, or the machine; ``None`` where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@contextmanager
def enough(what: str, turn: str) -> Iterator[None]:
    """Around what takes much of a machine, such as ``what``; ``turn`` are the options that it takes less with.

    Raises:
        MachineError: memory ran out, on the CPU or on a GPU, or a process that loads images was killed.
    """
    try:
        yield
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:
        message = str(error)
        if isinstance(error, MemoryError) or _NO_MEMORY.search(message):
            found = _WANTED.search(message)
            wanted = "more than there is"
            if found is not None:
                wanted = f"{int(found[1]) / 1e9:,.1f} GB" if found[1] else found[2]
            raise MachineError(f"out of memory: {what} wanted {wanted} at once; lower {turn}") from error
        if lost := _LOST.search(message):
            raise MachineError(
                f"a process that loads images is gone ({lost[0].strip(' .')}), as a rule for want of memory; "
                "lower --num-workers"
            ) from error
        raise
