"""A term in a training: its weight, its seconds, and how its gradient is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from cem.terms import Batch, Term
from cem.training.injection import Answer, gradients_of
from cem.training.meter import Stopwatch


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
        self.term.before_step(batch)
        for parameter in self.term.parameters():
            parameter.grad = None

    def columns(self, values: Mapping[str, float]) -> dict[str, float]:
        """What it measured, as columns of ``metrics.csv``."""
        return {self.renamed.get(name, f"{self.name}.{name}"): value for name, value in values.items()}
