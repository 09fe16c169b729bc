"""Class variance: the loop, padded batches, two-pass ``index_add``, ``segment_reduce``, and this library."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.operators.base import Call, Case, Cost, Spec
from cem_kernels import LogHinge, Nats, Penalty
from cem_kernels.variance import class_variance

RELU = LogHinge(threshold=0.05)  # what peers compute
PENALTIES: dict[str, Penalty] = {
    "relu": RELU,
    "softplus": LogHinge(threshold=0.05, hinge="softplus"),
    "nats": Nats(noise_std=0.1),
}


class ClassVarianceCase(Case):
    """Features ``[B, T, D]`` to ``rob_loss`` and ``intra_mse``; ``C = T · D`` columns."""

    variants = (
        "triton", "padded-compiled", "index-add-compiled", "eager", "eager-compiled", "padded", "index-add",
        "segment-reduce", "loop",
    )  # fmt: skip

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        s = self.spec
        # Columns on both sides of the threshold and below the floor, and a mean that E[x²] − E[x]² would not survive.
        spread = torch.logspace(-3, 0.5, s.T * s.D, device=self.device).view(s.T, s.D)
        return {"features": self.normal(generator, s.B, s.T, s.D) * spread + 3.0}

    def draw_upstream(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        return torch.tensor(1.0, device=self.device), torch.tensor(0.5, device=self.device)

    def public(self, backend: str) -> Call:
        def call(features: Tensor) -> tuple[Tensor, ...]:
            result = class_variance(features, self.groups, PENALTIES[self.spec.penalty], backend=backend)
            return result.rob_loss, result.intra_mse

        return call

    def yardsticks(self) -> list[Call]:
        return [self.reference]  # statistics are fp32 whatever the features are

    def peer(self, variant: str) -> Call:
        classes, moments = self.classes, peers.MOMENTS[variant]

        def peer(features: Tensor) -> tuple[Tensor, ...]:
            _, squares = moments(features.flatten(1), classes)
            return peers.variance_losses(squares, classes, RELU)

        return peer

    @staticmethod
    def cost(spec: Spec, direction: str) -> Cost:
        """Forward reads the features; backward reads them again and writes their gradient.

        Every element is added, centered and squared and added; and once more centered and scaled. Class statistics
        ``[K, C]`` that travel from forward to backward are not counted: they could be computed again.
        """
        if direction == "both":
            return ClassVarianceCase.cost(spec, "forward") + ClassVarianceCase.cost(spec, "backward")
        elements = spec.B * spec.T * spec.D
        index = 8 * spec.B
        if direction == "forward":
            return Cost(elements * spec.item + index, 4 * elements)
        return Cost(2 * elements * spec.item + index, 2 * elements)

    @staticmethod
    def trips(spec: Spec, direction: str) -> int:
        """A program walks the rows of a class, or of a part of it, 16 at a time: which they are, what they hold."""
        blocks = math.ceil(spec.T * spec.D * spec.item / 512)
        parts = max(1, min(math.ceil(spec.B / 64 / spec.K), math.ceil(2112 / blocks / spec.K)))
        rows = spec.B / parts / (1 if spec.labels == "one" else spec.K)
        return (Case.trips(spec, "forward") + 2 * math.ceil(rows / 16)) * (2 if direction == "both" else 1)
