"""Class variance around running centroids, as the default surrogate has it: that of classes, and centroids move."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.operators.base import Call, Cost, Spec
from benchmarks.operators.class_variance import PENALTIES, RELU, ClassVarianceCase
from cem_kernels import RunningMoments
from cem_kernels.variance import centroid_variance
from cem_kernels.variance.running import least_shares

MOMENTUM = 0.99


class CentroidVarianceCase(ClassVarianceCase):
    """Features ``[B, T, D]`` to ``rob_loss``, and centroids and variances ``[K, T · D]`` moved.

    Every call moves the same ones. For a check they are set back, and what they have become is checked as well.
    """

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        found = super().draw(generator)
        s = self.spec
        centroids = self.normal(generator, s.K, s.T * s.D) + 3.0
        # Some classes are new, some were in few batches and some in many.
        batches = torch.arange(s.K, device=self.device) * 7 % 300
        self.start = RunningMoments(centroids, torch.full_like(centroids, 0.5), batches)
        self.running = RunningMoments(*(each.clone() for each in self.start))
        return found

    def draw_upstream(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.tensor(1.0, device=self.device),)

    def results(self, call: Call, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        for each, start in zip(self.running, self.start, strict=True):
            each.copy_(start)
        found = super().results(call, dtype)
        return found | {name: each.double() for name, each in self.running._asdict().items()}

    def public(self, backend: str) -> Call:
        def call(features: Tensor) -> tuple[Tensor, ...]:
            penalty = PENALTIES[self.spec.penalty]
            result = centroid_variance(features, self.groups, self.running, penalty, momentum=MOMENTUM, backend=backend)
            return (result.rob_loss,)

        return call

    def peer(self, moments: peers.Moments) -> Call:
        classes, running, shares = self.classes, self.running, least_shares(MOMENTUM)

        def peer(features: Tensor) -> tuple[Tensor, ...]:
            mean, squares = moments(features.flatten(1), classes)
            return (peers.running_loss(mean, squares, classes, running, shares, RELU),)

        return peer

    @staticmethod
    def cost(spec: Spec, direction: str) -> Cost:
        """As class variance, and fp32 statistics: forward reads and writes centroids and variances, and passes on to
        the backward the centroids that it found, which nobody can compute again."""
        statistic = 4 * spec.K * spec.T * spec.D
        times = {"forward": 5, "backward": 1, "both": 6}[direction]
        return ClassVarianceCase.cost(spec, direction) + Cost(times * statistic, 0)
