"""Seconds on the device that did the work, without waiting for it."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds spent inside ``with stopwatch:`` blocks, on the device that did the work.

    On CUDA a block only records two events, so the host runs ahead as before; reading waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start = 0.0
        self._seconds = 0.0

    def __enter__(self) -> Stopwatch:
        if self._device.type == "cuda":
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record(torch.cuda.current_stream(self._device))
            self._events.append(pair)
        else:
            self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self._events[-1][1].record(torch.cuda.current_stream(self._device))
        else:
            self._seconds += time.perf_counter() - self._start

    def read(self) -> float:
        """Seconds since the last reading, and start again from zero."""
        if self._events:
            torch.cuda.synchronize(self._device)
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1e3
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
