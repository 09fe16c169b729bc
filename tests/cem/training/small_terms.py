"""Small surrogates and defenses, chosen by module and class as a user's are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import cem
from cem.options import Options, option


class Scale(cem.Surrogate):
    """A penalty with a parameter, that pulls features to zero and draws random numbers."""

    name = "scale"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def measure(self, batch: cem.Batch) -> cem.Measured:
        z = batch.features
        size = (z * (1 + 0.1 * torch.rand_like(z))).square().mean()
        return cem.Measured(self.weight.square() * size, {"intra_mse": size, "weight_now": self.weight})


class Learned(Scale):
    """Its parameter is trained on the penalty."""

    def measure(self, batch: cem.Batch) -> cem.Measured:
        measured = super().measure(batch)
        return measured._replace(own_loss=measured.loss)


class SharedScale(Learned):
    """The network's optimizer trains its parameter."""

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.weight]


class OwnScale(Learned):
    """It trains its parameter with its own optimizer."""

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"adam": torch.optim.Adam(self.parameters(), lr=3e-4)}


class Watched(Scale):
    """Keeps what it is told of epochs and steps."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[tuple[int, int]] = []
        self.steps: list[tuple[cem.Batch, bool]] = []

    def before_epoch(self, epoch: int, epochs: int) -> None:
        self.epochs.append((epoch, epochs))

    def before_step(self, batch: cem.Batch) -> None:
        self.steps.append((batch, self.training))


class Refitted(Scale):
    """A penalty that records its refits."""

    needs_epoch_features = True

    def __init__(self) -> None:
        super().__init__()
        self.refits: list[tuple[Tensor, Tensor]] = []

    def after_epoch(self, features: Tensor, labels: Tensor) -> Mapping[str, float]:
        torch.rand(())  # a draw that must not shift the run's
        self.refits.append((features, labels))
        return {"information_nats": 123.4}


class Broken(Scale):
    """A penalty that is never finite."""

    def measure(self, batch: cem.Batch) -> cem.Measured:
        return cem.Measured((batch.features * torch.nan).sum(), {"intra_mse": batch.features.mean()})


class Size(cem.Term):
    """Mean square of what is sent, and a parameter that learns it."""

    def __init__(self) -> None:
        super().__init__()
        self.guess = nn.Parameter(torch.zeros(()))

    def measure(self, batch: cem.Batch) -> cem.Measured:
        size = batch.sent.square().mean()
        return cem.Measured(size, {"guess": self.guess}, own_loss=(self.guess - size.detach()).square())

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"sgd": torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)}


class Gain(cem.Defense):
    """Sends features twice as large, and penalizes how large they are."""

    name = "gain"

    @dataclass(frozen=True)
    class Options(Options):
        weight: float = option(0.25, least=0)
        factor: float = option(2.0, above=0)

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.size = Size()
        self.prepared: list[int] = []

    @classmethod
    def build(cls, options: Any, context: cem.Context) -> Gain:
        return cls(options.factor)

    def transform(self, z: Tensor) -> Tensor:
        return self.factor * z

    def term(self) -> cem.Term:
        return self.size

    def prepare(self, model: nn.Module, epoch: int) -> None:
        self.prepared.append(epoch)


def surrogate(kind: type[cem.Surrogate]) -> str:
    """What ``--surrogate`` takes for one of these."""
    return f"{__name__}:{kind.__name__}"


GAIN = f"{__name__}:{Gain.__name__}"
