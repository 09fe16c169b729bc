"""Interrupts: some wait, none is lost for good, and signals are handled afterwards as they were before."""

import signal
from contextlib import suppress

import pytest

from cem.interrupts import check, heeded, held


def interrupt():
    signal.raise_signal(signal.SIGINT)


def work(done):
    with held():
        with held():
            interrupt()
            done.append("inner")
        done.append("outer")


def test_what_an_interrupt_would_break_ends_before_it_comes():
    done = []
    with heeded(), pytest.raises(KeyboardInterrupt):
        work(done)
    assert done == ["inner", "outer"]


def test_what_breaks_by_itself_says_so_whatever_interrupts_it():
    with heeded(), pytest.raises(AttributeError):
        work(None)


def test_interrupt_that_was_dropped_comes_at_the_next_check_and_is_over_with_the_work():
    with heeded(signal.SIGTERM):
        check()
        with suppress(KeyboardInterrupt):  # as a destructor does
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            check()
    check()


def test_signals_are_handled_as_before_afterwards_and_those_of_others_always(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("own"))
    try:
        with heeded():
            interrupt()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["own"]
    with heeded(), heeded():
        pass
    assert signal.getsignal(signal.SIGINT) is before
