"""A surrogate by somebody who installed the library: features must not tell how bright an image is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

import cem
from cem.options import Options, option


class Brightness(cem.Surrogate):
    """Squared covariance of every feature with the brightness of its image, around a running mean of the brightness."""

    name = "brightness"
    needs_images = True

    @dataclass(frozen=True)
    class Options(Options):
        weight: ClassVar[float] = 0.5
        decay: float = option(0.9, least=0, below=1)

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.tensor(0.0))

    @classmethod
    def build(cls, options: Options, context: cem.Context) -> Brightness:
        return cls(options.decay)

    def measure(self, batch: cem.Batch) -> cem.Measured:
        brightness = batch.images.flatten(1).mean(1)
        if self.training:
            self.mean.lerp_(brightness.mean(), 1 - self.decay)
        z = batch.features.flatten(1)
        covariance = (brightness - self.mean) @ (z - z.mean(0)) / len(z)
        loss = covariance.square().mean()
        return cem.Measured(loss, {"intra_mse": z.var(0).mean(), "strongest": covariance.abs().max()})
