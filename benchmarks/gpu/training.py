"""What the surrogate adds to a training step of VGG-11 on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.errors import describe
from benchmarks.gpu.timing import quantiles
from benchmarks.interleaved import in_turns, quartiles
from benchmarks.training_step import training_step
from cem_kernels import BackendUnavailableError

SURROGATES = ("centroid", "attention")
BATCH, IMAGE_SHAPE = 512, (3, 32, 32)
NAME = f"training step vgg11_bn C8S1 B{BATCH} 3x32x32"
STEPS = 10  # between two looks at the clock


@contextmanager
def pytorch_defaults() -> Iterator[None]:
    """TF32 in convolutions, as a training has it unless it asks otherwise: without it steps would be long and our
    share of them small."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def measure_training(
    device: str, rounds: int, *, batch: int = BATCH, image_shape: tuple[int, int, int] = IMAGE_SHAPE, steps: int = STEPS
) -> dict[str, Any]:
    """Seconds of a step without a surrogate, with the default and with the original, and with each replayed from a CUDA
    graph, timed turn by turn.

    ``added`` is over the step without one, quartiles of neighboring rounds; ``absent`` says what could not run.
    """
    step_of = partial(training_step, batch=batch, image_shape=image_shape, device=device)
    record: dict[str, Any] = {"name": NAME, "batch": batch, "image_shape": list(image_shape), "backend": "triton"}
    absent: dict[str, str] = {}
    with pytorch_defaults():
        calls = {"none": step_of("none")}
        for name in SURROGATES:
            try:
                calls[name] = checked(step_of(name, backend=record["backend"]))
            except BackendUnavailableError as error:
                absent["triton"] = describe(error)
                record["backend"] = "eager"
                calls[name] = checked(step_of(name, backend="eager"))
            try:
                calls[f"{name} captured"] = checked(step_of(name, backend=record["backend"], captured=True))
            except Exception as error:
                absent[f"{name} captured"] = describe(error)
        found = in_turns({name: awaited(call, steps, device) for name, call in calls.items()}, rounds)
    times = {name: [seconds / steps for seconds in samples] for name, samples in found.items()}
    added = {
        name: quartiles([own / none - 1 for own, none in zip(samples, times["none"], strict=True)])
        for name, samples in times.items()
        if name != "none"
    }
    seconds = {name: quantiles(samples) for name, samples in times.items()}
    return record | {"step_seconds": seconds, "added": added, "absent": absent}


def checked(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step whose penalty is not finite would be timed for nothing."""
    if bool(step()):
        raise ArithmeticError("the penalty is not finite")
    return step


def awaited(step: Callable[[], Tensor], steps: int, device: str) -> Callable[[], None]:
    """So many steps, the host ahead of the device as in a training, and the device awaited at the end."""

    def play() -> None:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return play
