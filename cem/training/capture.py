"""A term's part of a training step as a CUDA graph: recorded once, launched whole in every step.

A term may be a long row of small kernels, forward and backward. Launched one by one, the device may wait
for the host between them; a graph is one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from cem.errors import UsageError
from cem.terms import Batch, Term
from cem.training.weighted import Answer, gradients_of

T = TypeVar("T")
WARM_UP = 3
WAITS = (
    "--capture: a term waits for the device in every call, which a CUDA graph cannot. Let all of its operators run as "
    "kernels (--backend triton) and leave CEM_KERNELS_DEBUG unset"
)


class CapturedTerm:
    """:func:`~cem.training.weighted.gradients_of` for one term, replayed from a CUDA graph.

    Every replay draws random numbers of its own, and those that the ordinary way would have drawn: kernels in a graph
    take their place in PyTorch's generator from the device. Parameters are read where they lie, so optimizers and
    checkpoints must write to them in place, as PyTorch's do; which of them are trained is settled by now.

    Construction measures a few times, which draws random numbers too.

    Args:
        term: on ``device``, in the mode in which it is to be captured.
        feature_shape: ``[B, D]`` or ``[B, C, H, W]`` of the features to capture it for, fp32.
        image_shape: ``[B, C, H, W]`` of the images.
        device: a CUDA device.

    Raises:
        UsageError: the term waits for the device, which a graph cannot.
    """

    def __init__(
        self, term: Term, feature_shape: tuple[int, ...], image_shape: tuple[int, ...], device: torch.device
    ) -> None:
        if not term.capturable:
            raise UsageError(WAITS)
        self._term, self._training = term, term.training
        # What lies in them while recording decides nothing: the graph has no branch that depends on values.
        self._batch = batch = Batch(
            torch.zeros(image_shape, device=device) if term.needs_images else None,
            torch.zeros(feature_shape[0], dtype=torch.int64, device=device),
            torch.zeros(feature_shape, device=device),
            torch.zeros(feature_shape, device=device),
        )
        before = {name: value.clone() for name, value in term.state_dict().items()}
        self._answer, self._replay = record(lambda: gradients_of(term, batch), device)
        term.load_state_dict(before)  # in place: running moments have moved by what was recorded

    def __call__(self, batch: Batch) -> Answer:
        """The term's answer to a batch, see :func:`~cem.training.weighted.gradients_of`.

        A batch of another shape, such as the last one of an epoch, and a term in the other mode take the ordinary way.
        The result of a replay is overwritten by the next one: whatever is to stay must be copied.
        """
        kept = self._batch
        if batch.features.shape != kept.features.shape or self._term.training != self._training:
            return gradients_of(self._term, batch)
        kept.features.copy_(batch.features.detach())
        kept.sent.copy_(batch.sent.detach())
        kept.labels.copy_(batch.labels)
        if kept.images is not None and batch.images is not None:
            kept.images.copy_(batch.images)
        self._replay()
        return self._answer


def record(work: Callable[[], T], device: torch.device) -> tuple[T, Callable[[], None]]:
    """Record in a CUDA graph what ``work`` does on ``device``.

    Returns:
        What ``work`` returned while it was recorded, and what runs it again, into the same memory.

    Raises:
        UsageError: ``work`` waits for the device.
    """
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Kernels are compiled and libraries set up in the first calls, and a capture must find that done.
            for _ in range(WARM_UP):
                work()
            _check_never_waits(work)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            result = work()
    return result, graph.replay


def _check_never_waits(work: Callable[[], object]) -> None:
    """The capture would fail as well, but with a CUDA error that names no cause."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        raise UsageError(WAITS) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
