"""A picture of a few training steps: what ran when, on the host and on the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 3  # steps; the first ones compile kernels and set up libraries


@contextmanager
def traced_steps(
    path: Path, log: logging.Logger, device: torch.device, *, steps: int, begin: int, total: int
) -> Iterator[Callable[[], None]]:
    """Trace some of a training's steps, of which every one ends with a call to what this yields.

    The trace shows the regions that :mod:`cem.training.injection` and the trainer name, and every operator below them.
    It draws no random number and changes none. The steps it covers are slower, and on CUDA perhaps all after them:
    PyTorch leaves CUPTI attached (pytorch/pytorch#144455).

    Args:
        path: the trace, a file that chrome://tracing and https://ui.perfetto.dev open. Written when the last of
            ``steps`` has ended, or on the way out with what there is until then.
        log: says where it is.
        device: where the steps compute.
        steps: number of steps in the trace; 0 traces nothing.
        begin: steps before its warm-up.
        total: steps that there will be. The warm-up is shorter, or the trace, where too few are left after ``begin``.
    """

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        log.info("trace of training steps: %s; open it in chrome://tracing or https://ui.perfetto.dev", path)

    steps = min(steps, total - begin)
    if steps < 1:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    warm_up = min(WARM_UP, total - begin - steps)
    windows = schedule(wait=begin, warmup=warm_up, active=steps, repeat=1)
    with profile(activities=activities, schedule=windows, on_trace_ready=write) as profiler:
        yield profiler.step
