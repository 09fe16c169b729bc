"""Small surrogates and defenses, chosen by module and class as a user's are."""

from dataclasses import dataclass

import torch
from torch import nn

import cem
from cem.options import Options, option


class Scale(cem.Surrogate):
    """A penalty with a parameter, that pulls features to zero and draws random numbers."""

    name = "scale"
    taught = False

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def measure(self, batch):
        z = batch.features
        size = (z * (1 + 0.1 * torch.rand_like(z))).square().mean()
        loss, monitors = self.weight.square() * size, {"intra_mse": size, "weight_now": self.weight}
        return cem.Measured(loss, monitors, own_loss=loss if self.taught else None)


class SharedScale(Scale):
    """The network's optimizer trains its parameter on the penalty."""

    taught = True

    def shared_parameters(self):
        return [self.weight]


class OwnScale(Scale):
    """It trains its parameter on the penalty with its own optimizer."""

    taught = True

    def optimizers(self):
        return {"adam": torch.optim.Adam(self.parameters(), lr=3e-4)}


class Watched(Scale):
    """Keeps what it is told of epochs and steps, and its refits."""

    needs_epoch_features = True

    def __init__(self):
        super().__init__()
        self.epochs, self.steps, self.refits = [], [], []

    def before_epoch(self, epoch, epochs):
        self.epochs.append((epoch, epochs))

    def before_step(self, batch):
        self.steps.append((batch, self.training))

    def after_epoch(self, features, labels):
        torch.rand(())  # a draw that must not shift the run's
        self.refits.append((features, labels))
        return {"information_nats": 123.4}


class Ignores(Scale):
    """A penalty that ignores outliers."""

    def measure(self, batch):
        loss, monitors, _ = super().measure(batch)
        return cem.Measured(loss, {**monitors, "outliers": torch.tensor(2)})


class Broken(Scale):
    """A penalty that is never finite."""

    def measure(self, batch):
        return cem.Measured((batch.features * torch.nan).sum(), {"intra_mse": batch.features.mean()})


class Size(cem.Term):
    """Mean square of what is sent, and a parameter that learns it."""

    def __init__(self):
        super().__init__()
        self.guess = nn.Parameter(torch.zeros(()))

    def measure(self, batch):
        size = batch.sent.square().mean()
        return cem.Measured(size, {"guess": self.guess}, own_loss=(self.guess - size.detach()).square())

    def optimizers(self):
        return {"sgd": torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)}


class Gain(cem.Defense):
    """Sends features twice as large, and penalizes how large they are."""

    name = "gain"

    @dataclass(frozen=True)
    class Options(Options):
        weight: float = option(0.25, least=0)
        factor: float = option(2.0, above=0)

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.size = Size()
        self.prepared: list[int] = []

    @classmethod
    def build(cls, options, context):
        return cls(options.factor)

    def transform(self, z):
        return self.factor * z

    def term(self):
        return self.size

    def prepare(self, model, epoch):
        self.prepared.append(epoch)


def surrogate(kind):
    """What ``--surrogate`` takes for one of these."""
    return f"{__name__}:{kind.__name__}"


GAIN = f"{__name__}:{Gain.__name__}"
