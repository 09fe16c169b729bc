"""The surrogate's part of a training step as a CUDA graph: recorded once, launched whole in every step.

The attention surrogate is a long row of small kernels, forward and backward. Launched one by one, the device may wait
for the host between them; a graph is one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from cem.options import ConfigError
from cem.surrogates.base import Surrogate
from cem.training.injection import Penalty, penalty_of

T = TypeVar("T")
WARM_UP = 3


class CapturedPenalty:
    """:func:`~cem.training.injection.penalty_of` for one surrogate, replayed from a CUDA graph.

    Every replay draws random numbers of its own, and those that the ordinary way would have drawn: kernels in a graph
    take their place in PyTorch's generator from the device. Parameters are read where they lie, so optimizers and
    checkpoints must write to them in place, as PyTorch's do; which of them are trained is settled by now.

    Construction runs the surrogate a few times, which draws random numbers too.

    Args:
        surrogate: on ``device``, in the mode in which it is to be captured; fp32 features, labels from 0.
        shape: ``[B, D]`` or ``[B, C, H, W]`` of the features to capture it for.
        device: a CUDA device.

    Raises:
        ConfigError: the surrogate waits for the device, which a graph cannot.
    """

    def __init__(self, surrogate: Surrogate, shape: tuple[int, ...], device: torch.device) -> None:
        self._surrogate, self._training = surrogate, surrogate.training
        # What lies in them while recording decides nothing: the graph has no branch that depends on values.
        self._z = z = torch.zeros(shape, device=device)
        self._labels = labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
        before = {name: value.clone() for name, value in surrogate.state_dict().items()}
        self._penalty, self._replay = record(lambda: penalty_of(surrogate, z, labels), device)
        surrogate.load_state_dict(before)  # in place: a memory would have filled with what was recorded

    def __call__(self, z: Tensor, labels: Tensor) -> Penalty:
        """The penalty of a batch, see :func:`~cem.training.injection.penalty_of`.

        A batch of another shape, such as the last one of an epoch, and a surrogate in the other mode take the ordinary
        way. The result of a replay is overwritten by the next one: whatever is to stay must be copied.
        """
        if z.shape != self._z.shape or self._surrogate.training != self._training:
            return penalty_of(self._surrogate, z, labels)
        self._z.copy_(z.detach())
        self._labels.copy_(labels)
        self._replay()
        return self._penalty


def record(work: Callable[[], T], device: torch.device) -> tuple[T, Callable[[], None]]:
    """Record in a CUDA graph what ``work`` does on ``device``.

    Returns:
        What ``work`` returned while it was recorded, and what runs it again, into the same memory.

    Raises:
        ConfigError: ``work`` waits for the device.
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
        raise ConfigError(
            "--capture: this surrogate waits for the device in every call, which a CUDA graph cannot. Let all of its "
            "operators run as kernels (--backend triton) and leave CEM_KERNELS_DEBUG unset"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
