"""Interrupts, by Ctrl-C or by what a scheduler sends: some wait, and none is lost for good.

Python raises ``KeyboardInterrupt`` wherever the main thread happens to be. While TensorBoard holds its lock, that
leaves everyone waiting who needs the lock later; inside a C++ destructor, which writes the end of a file, it ends the
process; in a destructor, or where a library passes over every error, as ``copyreg`` does in pickling, it is dropped.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came = 0  # since the outermost heeded() began
_holding = 0


@contextmanager
def heeded(*numbers: signal.Signals) -> Iterator[None]:
    """Around work for which :func:`held` and :func:`check` shall hold; in the main thread, others get no signals.

    Args:
        numbers: signals that shall interrupt as Ctrl-C does, unless they are ignored, as ``nohup`` has it, or handled
            by other programs than Python.
    """
    global _came
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        ours = [each for each in numbers if signal.getsignal(each) not in (signal.SIG_IGN, None, _interrupt)]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            ours.append(signal.SIGINT)
        handlers = {each: signal.signal(each, _interrupt) for each in ours}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if handlers:
            _came = 0


@contextmanager
def held() -> Iterator[None]:
    """Around what an interrupt would break: it comes once the block has ended."""
    global _holding
    before = _came
    _holding += 1
    try:
        yield
    finally:
        _holding -= 1
    if _came > before and not _holding:
        raise KeyboardInterrupt


def check() -> None:
    """Raise an interrupt that has come and was dropped; to be called where long work goes on."""
    if _came:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _came
    _came += 1
    if not _holding:
        raise KeyboardInterrupt
