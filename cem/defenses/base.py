"""What a defense may do, and several of them in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from cem.options import Options as BaseOptions
from cem.terms import Context, Term


class Defense(nn.Module):
    """A change of features or of training that is to make inversion harder; overrides what it needs.

    Attributes:
        name: what ``--defenses`` calls it.
        summary: one line for ``--help``.
        Options: its options; ``weight``, which may be one of them, weighs its term.

    Example::

        >>> import torch, cem
        >>> class Half(cem.Defense):
        ...     def transform(self, z):
        ...         return z / 2
        >>> Half()(torch.tensor([2.0]))
        tensor([1.])
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of a defense without options."""

        weight: ClassVar[float] = 1.0

    @classmethod
    def build(cls, options: Any, context: Context) -> Defense:
        """The defense of a run; by default ``cls()``."""
        return cls()

    def transform(self, z: Tensor) -> Tensor:
        """What leaves the client for features ``z [B, ...]``, in training and in use; the same shape and dtype."""
        return z

    def sigma(self) -> float | None:
        """Standard deviation of the Gaussian noise that it adds, if that is all that :meth:`transform` does."""
        return 0.0 if type(self).transform is Defense.transform else None

    def log_likelihood(self, sent: Tensor, z: Tensor) -> Tensor | None:
        """``log p(sent | z)``, ``[B]``, for attackers who know the defense; ``None``: they take the squared error."""
        return None

    def term(self) -> Term | None:
        """What it adds to the training loss; asked once, when the model is built, for training or for use."""
        return None

    def prepare(self, model: nn.Module, epoch: int) -> None:
        """Change the model's parameters before ``epoch``, counted from 0; in place, or an optimizer loses them."""

    def forward(self, z: Tensor) -> Tensor:
        """:meth:`transform`."""
        return self.transform(z)


class Chain(Defense):
    """Defenses one after the other.

    Args:
        members: by name, in the order in which features pass through them.
        weights: of their terms, by the same names.

    Attributes:
        terms: what members add to the loss, by their names.
    """

    name = "chain"

    def __init__(self, members: Mapping[str, Defense], weights: Mapping[str, float] = {}) -> None:
        super().__init__()
        for name, member in members.items():
            self._modules[name] = member  # add_module refuses what modules have already, such as "half"
        self.weights = dict(weights)
        self.terms = {name: term for name, member in members.items() if (term := member.term()) is not None}

    def members(self) -> dict[str, Defense]:
        """The defenses by name, in their order."""
        # named_children would drop a defense that occurs twice.
        return {name: each for name, each in self._modules.items() if isinstance(each, Defense)}

    def transform(self, z: Tensor) -> Tensor:
        """All transforms in a row."""
        for member in self.members().values():
            z = member.transform(z)
        return z

    def sigma(self) -> float | None:
        """Of independent Gaussian noises together; ``None`` where a member does something else."""
        stds = [member.sigma() for member in self.members().values()]
        return None if None in stds else math.sqrt(sum(std**2 for std in stds if std))

    def log_likelihood(self, sent: Tensor, z: Tensor) -> Tensor | None:
        """Of the one member that changes features, if it is one."""
        changing = [member for member in self.members().values() if member.sigma() != 0]
        return changing[0].log_likelihood(sent, z) if len(changing) == 1 else None

    def prepare(self, model: nn.Module, epoch: int) -> None:
        """All members', in their order."""
        for member in self.members().values():
            member.prepare(model, epoch)
