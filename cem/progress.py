"""What a command shows while it works, on a terminal only: bars with what remains, or how long something has taken."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

DELAY = 2.0  # seconds; a pass that is over sooner flashes no bar
# The mean rate so far foretells the end: the latest would forget what happens between steps, such as validation.
_STYLE: dict[str, Any] = {"leave": False, "disable": None, "dynamic_ncols": True, "smoothing": 0, "miniters": 0}
_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"


def bar(total: float, what: str, **options: Any) -> tqdm[Any]:
    """A bar of ``total`` units on stderr, moved by ``update`` and gone once closed; nothing where that is no terminal.

    ``options`` are tqdm's.
    """
    return tqdm(total=total, desc=what, bar_format=_FORMAT, **_STYLE, **options)


def over(items: Iterable[T], what: str) -> Iterable[T]:
    """``items`` one after the other, under a bar where they take more than two seconds."""
    return tqdm(items, desc=what, bar_format=_FORMAT, delay=DELAY, **_STYLE)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """For what cannot be counted: a line with a clock as long as the block lasts."""
    with tqdm(desc=what, bar_format="{desc} {elapsed}", **_STYLE) as line:
        done = Event()

        def tick() -> None:
            while not done.wait(1):
                line.refresh()

        clock = Thread(target=tick, daemon=True)
        if not line.disable:
            clock.start()
        try:
            yield
        finally:
            done.set()
            if not line.disable:
                clock.join()


def say(line: str) -> None:
    """Print to stderr, above a bar if there is one; whoever reads it no longer is no reason to stop working."""
    with suppress(BrokenPipeError):
        tqdm.write(line, file=sys.stderr)


def about(seconds: float) -> str:
    """A duration for people, no more exact than a forecast is: ``"40 s"``, ``"12 min"``, ``"3.5 h"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
