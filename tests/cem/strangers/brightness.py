"""A surrogate by somebody who installed the library: features must not tell how bright an image is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

import cem
from cem.options import Options, option


class Brightness(cem.Surrogate):
    """Squared correlation of every feature with the brightness of its image, by running moments of the brightness."""

    name = "brightness"
    summary = "correlation of features with the brightness of their image"
    needs_images = True

    @dataclass(frozen=True)
    class Options(Options):
        """Of ``--surrogate strangers.brightness:Brightness``.

        Attributes:
            decay: What is kept of the running mean in a step.
        """

        weight: ClassVar[float] = 0.5
        decay: float = option(0.9, least=0, below=1)

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("variance", torch.tensor(1.0))
        self.register_buffer("epochs", torch.tensor(0))

    @classmethod
    def build(cls, options: Options, context: cem.Context) -> Brightness:
        return cls(options.decay)

    def before_epoch(self, epoch: int, epochs: int) -> None:
        self.epochs += 1

    def measure(self, batch: cem.Batch) -> cem.Measured:
        brightness = batch.images.flatten(1).mean(1)
        if self.training:
            self.mean.lerp_(brightness.mean(), 1 - self.decay)
            self.variance.lerp_(brightness.var(correction=0), 1 - self.decay)
        z = batch.features.flatten(1)
        away = (z - z.mean(0)) / (z.std(0) + 1e-3)
        correlation = ((brightness - self.mean) / (self.variance.sqrt() + 1e-3)) @ away / len(z)
        loss = correlation.square().mean()
        return cem.Measured(loss, {"intra_mse": z.var(0).mean(), "strongest": correlation.abs().max()})
