"""A defense by somebody who installed the library: features are squashed, and a linear attacker is played against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import cem
from cem.options import Options, option


class Attacker(cem.Term):
    """Minus the error of a linear decoder, bounded, which learns for some steps in every batch."""

    needs_images = True

    def __init__(self, width: int, pixels: int, steps: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(width, pixels)
        self.steps = steps

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        self.adam = torch.optim.Adam(self.decoder.parameters(), lr=1e-2)
        return {"adam": self.adam}

    def before_step(self, batch: cem.Batch) -> None:
        for _ in range(self.steps):
            self.adam.zero_grad()
            self.error(batch).backward()
            self.adam.step()

    def measure(self, batch: cem.Batch) -> cem.Measured:
        error = self.error(batch)
        return cem.Measured(-error.clamp(max=0.2), {"error": error})

    def error(self, batch: cem.Batch) -> torch.Tensor:
        return F.mse_loss(self.decoder(batch.sent.flatten(1)), batch.images.flatten(1))


class Rival(cem.Defense):
    """Hyperbolic tangent at the cut, and an attacker in training."""

    name = "rival"
    summary = "squashed features, and a linear attacker that the encoder works against"

    @dataclass(frozen=True)
    class Options(Options):
        """Of ``--defenses strangers.rival:Rival``.

        Attributes:
            weight: Weight of the attacker's error.
            steps: Steps of the attacker in every batch.
        """

        weight: float = option(1.0, least=0)
        steps: int = option(2, least=0)

    def __init__(self, attacker: Attacker) -> None:
        super().__init__()
        self.attacker = attacker

    @classmethod
    def build(cls, options: Options, context: cem.Context) -> Rival:
        width, pixels = (torch.Size(shape).numel() for shape in (context.feature_shape, context.image_shape))
        return cls(Attacker(width, pixels, options.steps))

    def transform(self, z: torch.Tensor) -> torch.Tensor:
        return z.tanh()

    def term(self) -> cem.Term:
        return self.attacker
