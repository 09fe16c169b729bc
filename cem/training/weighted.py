"""A term in a training: its weight, its seconds, and how its gradient is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cem.terms import Batch, Term
from cem.training.stopwatch import Stopwatch


class Answer(NamedTuple):
    """A term's answer to a batch; nothing of it is attached to a graph.

    Attributes:
        loss: 0-dim.
        monitors: 0-dim tensors by name.
        finite: 0-dim bool, whether ``loss`` and all gradients are.
        features_grad, sent_grad: of ``loss``, shaped like features; ``None`` where it does not depend on them.
        own_grads: of the term's own loss to each of its parameters with ``requires_grad``, in their order; ``None``
            where it does not depend on it.
    """

    loss: Tensor
    monitors: dict[str, Tensor]
    finite: Tensor
    features_grad: Tensor | None
    sent_grad: Tensor | None
    own_grads: list[Tensor | None]


def gradients_of(term: Term, batch: Batch) -> Answer:
    """Forward and backward of a term: all that it does in a step, apart from the encoder and the weight.

    Args:
        term: what is measured.
        batch: detached copies of its features are what gradients are taken to.
    """
    z, sent = batch.features.detach().requires_grad_(), batch.sent.detach().requires_grad_()
    with term.together(Batch(batch.images, batch.labels, z, sent)) as whole:
        loss, monitors, own_loss = term.measure(whole)
    own = trained_parameters(term)
    if own_loss is loss:  # one backward for both
        grads = gradients(loss, [z, sent, *own])
    else:
        grads = gradients(loss, [z, sent], retain_graph=own_loss is not None) + gradients(own_loss, own)
    detached = {name: value.detach() for name, value in monitors.items()}
    return Answer(loss.detach(), detached, all_finite(loss, grads), grads[0], grads[1], grads[2:])


@dataclass
class WeightedTerm:
    """What the trainer knows of a term.

    Attributes:
        key: what its parts are called in checkpoints: ``"surrogate"``, or ``"defenses.NAME"``.
        name: of the member that it belongs to.
        term: itself, on ``device``.
        weight: of an epoch, counted from 0.
        first: first epoch with a weight, counted from 0.
        device: where it computes.
        renamed: columns of ``metrics.csv`` that are not ``NAME.MONITOR``.
        answer: how its gradient is taken.
        watch: seconds in it.
        now: its weight in this epoch.
    """

    key: str
    name: str
    term: Term
    weight: Callable[[int], float]
    first: int
    device: torch.device
    renamed: Mapping[str, str] = field(default_factory=dict)
    answer: Callable[[Batch], Answer] = field(init=False)
    watch: Stopwatch = field(init=False)
    now: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.answer, self.watch = partial(gradients_of, self.term), Stopwatch(self.device)

    def before_epoch(self, epoch: int, epochs: int) -> None:
        """Move its weight and its schedules to ``epoch`` of ``epochs``, counted from 0."""
        self.now = self.weight(epoch)
        self.term.before_epoch(epoch - self.first, epochs - self.first)

    def before_step(self, batch: Batch) -> None:
        """Let it train an adversary, and take away the gradients of that."""
        if type(self.term).before_step is Term.before_step:
            return
        with self.term.together(batch) as whole:
            self.term.before_step(whole)
        for parameter in self.term.parameters():
            parameter.grad = None

    def columns(self, values: Mapping[str, float]) -> dict[str, float]:
        """What it measured, as columns of ``metrics.csv``."""
        return {self.renamed.get(name, f"{self.name}.{name}"): value for name, value in values.items()}


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def gradients(loss: Tensor | None, inputs: Sequence[Tensor], retain_graph: bool = False) -> list[Tensor | None]:
    """Gradients; ``None`` where ``loss``, if there is one, does not depend on an input."""
    if loss is None or not (inputs and loss.requires_grad):
        return [None] * len(inputs)
    return list(torch.autograd.grad(loss, inputs, retain_graph=retain_graph or None, allow_unused=True))


def all_finite(loss: Tensor, grads: Iterable[Tensor | None]) -> Tensor:
    # A sum over squares or absolute values could overflow where every element is finite; this cannot.
    return torch.stack([loss.isfinite(), *(grad.isfinite().all() for grad in grads if grad is not None)]).all()
