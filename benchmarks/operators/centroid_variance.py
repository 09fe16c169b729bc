"""Class variance around running centroids, as `centroid` has it: that of classes, and centroids move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.operators.base import Call, Cost, Spec
from benchmarks.operators.class_variance import PENALTIES, RELU, ClassVarianceCase
from cem_kernels import RunningMoments
from cem_kernels.variance import centroid_variance
from cem_kernels.variance.running import MOMENTUM


class CentroidVarianceCase(ClassVarianceCase):
    """Features ``[B, T, D]`` to ``rob_loss``, and centroids and variances ``[K, T · D]`` moved.

    This library moves ``running`` in place. Peers get ``replaced`` and return what takes its place: of a function that
    moves its own inputs in place PyTorch 2.15 compiles a backward which reads them after they have moved, so that
    padded and compiled it was 4 % off, and the same function uncompiled was not. For a check both are set back, and
    what has become of them is checked as well.
    """

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        found = super().draw(generator)
        s = self.spec
        centroids = self.normal(generator, s.K, s.T * s.D) + 3.0
        # Some classes are new, some were in few batches and some in many.
        batches = torch.arange(s.K, device=self.device) * 7 % 300
        self.start = RunningMoments(centroids, torch.full_like(centroids, 2.0), batches, torch.zeros_like(batches))
        self.running, self.replaced = (RunningMoments(*(each.clone() for each in self.start)) for _ in range(2))
        return found

    def draw_upstream(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.tensor(1.0, device=self.device),)

    def results(self, call: Call, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        for each, start in zip(self.running, self.start, strict=True):
            each.copy_(start)
        self.replaced = self.start
        found = super().results(call, dtype)
        moved = self.running if self.replaced is self.start else self.replaced
        return found | {name: each.double() for name, each in moved._asdict().items()}

    def public(self, backend: str) -> Call:
        def call(features: Tensor) -> tuple[Tensor, ...]:
            penalty = PENALTIES[self.spec.penalty]
            result = centroid_variance(features, self.groups, self.running, penalty, backend=backend)
            return (result.rob_loss,)

        return call

    def peer(self, variant: str) -> Call:
        return self.replacing(self.loss_and_moved(variant))

    def build(self, variant: str) -> Call:
        base = variant.removesuffix("-compiled")
        if base == variant or base not in peers.MOMENTS:
            return super().build(variant)
        return self.replacing(torch.compile(self.loss_and_moved(base), fullgraph=True, dynamic=False))

    def loss_and_moved(self, variant: str) -> Callable[..., tuple[Tensor, RunningMoments]]:
        classes, moments = self.classes, peers.MOMENTS[variant]

        def peer(features: Tensor, running: RunningMoments) -> tuple[Tensor, RunningMoments]:
            return peers.running_loss(*moments(features.flatten(1), classes), classes, running, MOMENTUM, RELU)

        return peer

    def replacing(self, loss_and_moved: Callable[..., tuple[Tensor, RunningMoments]]) -> Call:
        def call(features: Tensor) -> tuple[Tensor, ...]:
            loss, self.replaced = loss_and_moved(features, self.replaced)
            return (loss,)

        return call

    @staticmethod
    def cost(spec: Spec, direction: str) -> Cost:
        """As class variance, and fp32 statistics: forward reads and writes centroids and variances, and passes on to
        the backward the centroids that it found, which nobody can compute again."""
        statistic = 4 * spec.K * spec.T * spec.D
        times = {"forward": 5, "backward": 1, "both": 6}[direction]
        return ClassVarianceCase.cost(spec, direction) + Cost(times * statistic, 0)
