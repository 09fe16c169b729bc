"""Means and times of an epoch, gathered on the device without waiting for it in every step."""

from __future__ import annotations

import time

import torch

from cem.training.injection import Step


class EpochMeter:
    """Sums what the steps of an epoch measured; :meth:`read` is the only thing that waits for the device.

    Means weigh each step by its samples. Steps whose penalty was skipped count for the classification figures
    and not for ``rob_loss`` and ``intra_mse``.
    """

    def __init__(self, device: torch.device) -> None:
        # fp64: the sum of an epoch of fp32 steps must not lose the digits that a bitwise resume would show.
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)
        self._samples = 0

    def add(self, step: Step, samples: int) -> None:
        """Count a step over ``samples`` samples."""
        means = torch.stack([step.cross_entropy, step.rob_loss, step.intra_mse, ~step.skipped])
        counts = torch.stack([step.correct, step.skipped])
        self._sums += torch.cat([means.double() * samples, counts.double()])
        self._samples += samples

    def read(self) -> dict[str, float]:
        """The four means, named as in ``metrics.csv``, and ``skipped``, the number of such steps."""
        cross_entropy, rob_loss, intra_mse, kept, correct, skipped = self._sums.tolist()
        return {
            "cross_entropy": cross_entropy / max(self._samples, 1),
            "rob_loss": rob_loss / max(kept, 1),
            "intra_mse": intra_mse / max(kept, 1),
            "train_accuracy": correct / max(self._samples, 1),
            "skipped": skipped,
        }


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
