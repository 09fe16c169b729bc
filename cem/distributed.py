"""The batch of all processes of a group, put together so that a term measures it as one process would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from cem.terms import Batch

_SAID = 256  # bytes of what a process says of its samples


class Group:
    """The processes that a module shares its batches with; a copy of the module shares them with the same ones.

    Args:
        chosen: a process group; ``None`` is all processes, where ``torch.distributed`` is initialized.
    """

    def __init__(self, chosen: dist.ProcessGroup | None) -> None:
        self._chosen, self._alone, self._agreed = chosen, False, False

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        twin = Group(self._chosen)  # a process group itself cannot be copied
        twin._alone, twin._agreed = self._alone, self._agreed
        return twin

    def leave(self) -> None:
        """Share nothing from now on."""
        self._alone = True

    @property
    def shares(self) -> bool:
        """Whether there is another process to share with."""
        if self._alone or not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size(self._chosen) > 1

    @contextmanager
    def together(self, module: nn.Module, batch: Batch, problem: Exception | None) -> Iterator[Batch]:
        """The batches of all processes as one, in the order of processes; all of them must come here.

        Features carry gradients to this process's own, times the number of processes. Where every process takes the
        gradient of the same loss, the mean over processes, which DistributedDataParallel makes, is then that of one
        process with the whole batch. Random numbers drawn inside are in all of them those of the first. When a module
        comes for the first time, its parameters and buffers become those of the first process.

        Args:
            module: what is about to measure.
            batch: of this process, which may have no samples.
            problem: why this process cannot take part. It is raised here; the others, which would wait for ever, end
                with an error too.

        Raises:
            ValueError: another process has a problem, or samples of another shape or dtype.
        """
        link = _Link(self._chosen, batch.labels.device)
        sizes, states = link.exchange(batch, problem)
        if not self._agreed:
            for tensor in (*module.parameters(), *module.buffers()):
                link.become_the_first(tensor.detach())
            self._agreed = True
        whole = link.in_a_row(batch, sizes)
        if link.rank == 0:
            yield whole
            return
        with torch.random.fork_rng([link.device] if link.device.type == "cuda" else []):
            torch.set_rng_state(states[0])
            if link.device.type == "cuda":
                torch.cuda.set_rng_state(states[1], link.device)
            yield whole


class _Link:
    """The collectives of a group, for tensors on ``device``. All of them move bytes: backends know few dtypes."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.rank, self.size, self.device, self._group = dist.get_rank(group), dist.get_world_size(group), device, group
        self._meeting = torch.device("cpu") if dist.get_backend(group) == "gloo" else device

    def become_the_first(self, tensor: Tensor) -> None:
        """Make ``tensor`` what it is in the first process."""
        sent = _bytes(tensor).to(self._meeting, copy=True)
        dist.broadcast(sent, 0 if self._group is None else dist.get_global_rank(self._group, 0), self._group)
        tensor.copy_(sent.to(self.device).view(tensor.dtype).view(tensor.shape))

    def exchange(self, batch: Batch, problem: Exception | None) -> tuple[list[int], list[Tensor]]:
        """How many samples every process has; the first one's random states, of the CPU and of a CUDA device.

        Raises:
            ValueError: samples are not alike, or another process has a problem.
            Exception: ``problem``, if there is one.
        """
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        said = b"" if problem else f"{len(batch.labels)} samples of {_described(batch)}".encode()[:_SAID]
        parts = self._from_all(torch.cat([torch.tensor([*said.ljust(_SAID)], dtype=torch.uint8), *states]))
        words = [bytes(part[:_SAID].tolist()).decode(errors="replace").strip() for part in parts]
        if problem is not None:
            raise problem
        for rank, theirs in enumerate(words):
            if not theirs:
                raise ValueError(f"process {rank} of the group cannot take part, and says why itself")
            if theirs.partition(" ")[2] != words[self.rank].partition(" ")[2]:
                raise ValueError(
                    f"processes of a group must have samples of one kind, got {words[self.rank]} in process "
                    f"{self.rank}, {theirs} in process {rank}"
                )
        sizes = [int(theirs.partition(" ")[0]) for theirs in words]
        of_first = parts[0][_SAID:].cpu().split([len(state) for state in states])
        return sizes, [state.clone() for state in of_first]

    def in_a_row(self, batch: Batch, sizes: list[int]) -> Batch:
        """The batches of all processes, of ``sizes`` samples, as one."""
        images = None if batch.images is None else self._rows(batch.images, sizes)
        features = self._rows(batch.features, sizes)
        sent = features if batch.sent is batch.features else self._rows(batch.sent, sizes)
        return replace(batch, images=images, labels=self._rows(batch.labels, sizes), features=features, sent=sent)

    def _rows(self, own: Tensor, sizes: list[int]) -> Tensor:
        longest, rest = max(sizes), own.shape[1:]
        if longest == 0:
            return own
        sent = own.detach().new_zeros(longest, *rest)
        sent[: len(own)] = own.detach()
        parts = [part.view(own.dtype).view(longest, *rest) for part in self._from_all(_bytes(sent))]
        rows = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        if own.requires_grad:
            rows[self.rank] = _Times.apply(own, self.size)
        return torch.cat(rows)

    def _from_all(self, sent: Tensor) -> list[Tensor]:
        """What every process sends, equally long."""
        sent = sent.to(self._meeting)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self._group)
        return [part.to(self.device) for part in parts]


class _Times(torch.autograd.Function):
    """The same tensor; its gradient is multiplied by a number."""

    @staticmethod
    def forward(x: Tensor, number: int) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        _, ctx.number = inputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.number, None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _described(batch: Batch) -> str:
    """Shape and dtype of a process's samples; labels are compared as int64."""
    named = {"features": batch.features, "sent": batch.sent, "images": batch.images}
    return ", ".join(
        f"{name} [B{''.join(f', {size}' for size in tensor.shape[1:])}] {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in named.items()
        if tensor is not None
    )
