"""Variance around running slots of a class, all of which a sample attends to; the slots move."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.operators.base import Call, Case, Cost, Spec
from benchmarks.operators.centroid_variance import CentroidVarianceCase
from benchmarks.operators.class_variance import ClassVarianceCase
from cem_kernels import Nats, RunningSlots
from cem_kernels.slot_variance import slot_variance

PENALTY = Nats(noise_std=0.1)


class SlotVarianceCase(CentroidVarianceCase):
    """Features ``[B, T, D]`` to ``rob_loss``, and slots ``[K, S, T · D]`` moved, as in the case of centroids.

    All classes have begun, which is all that peers know, but for one where there are holes: those cases have no peers.
    """

    variants = ("triton", "padded-compiled", "eager", "eager-compiled", "padded", "loop")

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        found, s = ClassVarianceCase.draw(self, generator), self.spec
        centroids = self.normal(generator, s.K, s.S, s.T * s.D) + 3.0
        shares = self.normal(generator, s.K, s.S).softmax(dim=1)
        batches = 1 + torch.arange(s.K, device=self.device) * 7 % 300
        if s.labels == "holes":
            batches[1] = 0
        self.start = RunningSlots(
            centroids, torch.full_like(centroids, 2.0), shares, batches, torch.zeros_like(batches)
        )
        self.running, self.replaced = (RunningSlots(*(each.clone() for each in self.start)) for _ in range(2))
        return found

    def public(self, backend: str) -> Call:
        def call(features: Tensor) -> tuple[Tensor, ...]:
            return (slot_variance(features, self.groups, self.running, PENALTY, backend=backend).rob_loss,)

        return call

    def loss_and_moved(self, variant: str) -> Callable[..., tuple[Tensor, RunningSlots]]:
        def peer(features: Tensor, running: RunningSlots) -> tuple[Tensor, RunningSlots]:
            return peers.padded_slots_loss(features.flatten(1), self.classes, running, PENALTY)

        return peer

    @staticmethod
    def cost(spec: Spec, direction: str) -> Cost:
        """Statistics as around centroids, of every slot; distances are computed and weighed for every slot."""
        around_one = CentroidVarianceCase.cost(spec, direction)
        features = ClassVarianceCase.cost(spec, direction)
        elements = spec.B * spec.T * spec.D * spec.S
        operations = {"forward": 8, "backward": 4, "both": 12}[direction] * elements
        return Cost(features.bytes + spec.S * (around_one.bytes - features.bytes), operations)

    @staticmethod
    def trips(spec: Spec, direction: str) -> int:
        """Forward, one program walks a class twice, 16 rows and a block of columns at a time, and its slots twice;
        backward, programs share columns and rows."""
        slots = 2 ** math.ceil(math.log2(spec.S))
        rows = spec.B / (1 if spec.labels == "one" else spec.K)
        blocks, tiles = math.ceil(spec.T * spec.D * slots / 512), math.ceil(rows / 16)
        parts = max(1, min(math.ceil(spec.B / 64 / spec.K), math.ceil(528 / (2 * blocks) / spec.K)))
        forward = Case.trips(spec, "forward") + tiles * (1 + 3 * blocks) + 2 * blocks
        backward = Case.trips(spec, "backward") + 2 * math.ceil(rows / parts / 16)
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]
