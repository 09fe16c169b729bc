"""Random inputs for the operators, and the comparison of two backends on outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cem_kernels import (
    ClassGroups,
    CrossAttentionWeights,
    LogHinge,
    Nats,
    Penalty,
    RunningMoments,
    RunningSlots,
    SlotAttentionWeights,
)
from cem_kernels.cross_attention import cross_attention
from cem_kernels.slot_attention import slot_attention
from cem_kernels.slot_variance import slot_variance
from cem_kernels.variance import centroid_variance, class_variance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RELU = LogHinge(threshold=0.05)
PENALTIES: dict[str, Penalty] = {
    "relu": RELU,
    "softplus": LogHinge(threshold=0.05, hinge="softplus"),
    "nats": Nats(noise_std=0.05),
}


@dataclass
class Problem:
    """Inputs of one operator: leaves that take gradients, and the call that maps them to outputs."""

    leaves: dict[str, Tensor]
    run: Callable[..., tuple[Tensor, ...]]  # run(backend, **leaves)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same with rounded leaves."""
        return Problem({name: leaf.to(dtype) for name, leaf in self.leaves.items()}, self.run)

    def results(self, backend: str, forward_under: Any = None, **replaced: Tensor) -> dict[str, Tensor]:
        """Outputs and the gradient of every leaf for fixed random upstream gradients."""
        leaves = {n: t.detach().clone().requires_grad_() for n, t in (self.leaves | replaced).items()}
        with forward_under or nullcontext():
            outputs = self.run(backend, **leaves)
        generator = torch.Generator().manual_seed(1)
        graph = [o for o in outputs if o.requires_grad]
        upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in graph]
        grads = torch.autograd.grad(graph, list(leaves.values()), upstream, materialize_grads=True)
        found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        return found | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Largest difference at most ``tolerance`` of the largest entry (or of 1), tensor by tensor."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        error = float((found[name] - want).abs().max()) if want.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: error {error:.3g} at scale {scale:.3g}"


def labels_with_holes(num_samples: int, num_classes: int, seed: int = 0) -> Tensor:
    """Random labels that leave the first, a middle and the last class empty where there are enough classes."""
    generator = torch.Generator().manual_seed(seed)
    used = torch.arange(num_classes)
    if num_classes >= 5:
        used = used[(used != 0) & (used != num_classes // 2) & (used != num_classes - 1)]
    return used[torch.randint(0, len(used), (num_samples,), generator=generator)]


def drawing(generator: torch.Generator) -> Callable[..., Tensor]:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    return draw


def random_slot_weights(width: int, generator: torch.Generator) -> SlotAttentionWeights:
    draw = drawing(generator)
    d, small = width, width**-0.5
    return SlotAttentionWeights(
        *(draw(d, d, scale=2 * small) for _ in range(3)),
        draw(3 * d, d, scale=small), draw(3 * d, d, scale=small), draw(3 * d), draw(3 * d),
        draw(2 * d, d, scale=small), draw(2 * d), draw(d, 2 * d, scale=small), draw(d),
        *(1 + draw(d, scale=0.3) if i % 2 == 0 else draw(d, scale=0.3) for i in range(6)),
    )  # fmt: skip


def random_cross_weights(width: int, generator: torch.Generator) -> CrossAttentionWeights:
    draw = drawing(generator)
    d, small = width, width**-0.5
    return CrossAttentionWeights(
        *(draw(d, d, scale=2 * small) for _ in range(4)), draw(d), draw(), draw(),
        draw(4 * d, d, scale=small), draw(4 * d), draw(d, 4 * d, scale=small), draw(d),
        *(1 + draw(d, scale=0.3) if i % 2 == 0 else draw(d, scale=0.3) for i in range(6)),
    )  # fmt: skip


def attention_problem(
    operator: Callable[..., Tensor], draw_weights: Callable[..., Any], labels: Tensor, num_classes: int, *,
    T: int = 1, D: int = 8, S: int = 2, bound: int | None = None, seed: int = 0, **options: Any,
) -> Problem:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    groups = ClassGroups.from_labels(labels, num_classes, max_class_size=bound)
    leaves = {
        "tokens": torch.randn(len(labels), T, D, generator=generator, dtype=torch.float64),
        "slots": torch.randn(num_classes, S, D, generator=generator, dtype=torch.float64),
    }
    weights = draw_weights(D, generator)
    leaves |= weights._asdict()

    def run(backend: str, tokens: Tensor, slots: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
        return (operator(tokens, slots, groups, type(weights)(**named), backend=backend, **options),)

    return Problem({name: leaf.to(labels.device) for name, leaf in leaves.items()}, run)


def slot_problem(labels, num_classes, *, J=2, **options) -> Problem:
    return attention_problem(slot_attention, random_slot_weights, labels, num_classes, num_iterations=J, **options)


def cross_problem(labels, num_classes, *, H=2, **options) -> Problem:
    return attention_problem(cross_attention, random_cross_weights, labels, num_classes, num_heads=H, **options)


def spread_over(T: int, D: int) -> Tensor:
    """Deviations of columns on both sides of the threshold and below the floor."""
    return torch.logspace(-3, 0.5, T * D, dtype=torch.float64).view(T, D)


def variance_problem(labels, num_classes, *, T=1, D=8, bound=None, seed=0, penalty=RELU, min_samples=2) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    groups = ClassGroups.from_labels(labels, num_classes, max_class_size=bound)
    features = torch.randn(len(labels), T, D, generator=generator, dtype=torch.float64) * spread_over(T, D) + 3.0

    def run(backend, features):
        return tuple(class_variance(features, groups, penalty, min_samples=min_samples, backend=backend))

    return Problem({"features": features.to(labels.device)}, run)


def centroid_problem(
    labels, num_classes, *, T=1, D=8, bound=None, seed=0, penalty=RELU, momentum=0.95, batches=None
) -> Problem:
    """Classes that were in 0, 1, 2, ... batches before, or all of them in ``batches``; none sees an outlier."""
    groups = ClassGroups.from_labels(labels, num_classes, max_class_size=bound)
    counted = torch.arange(num_classes) if batches is None else torch.full((num_classes,), batches)
    generator = torch.Generator().manual_seed(seed + 1)  # the same centroids however many samples there are
    # Of classes that were in no batch it is not looked at, whatever it is.
    centroids = torch.randn(num_classes, T, D, generator=generator, dtype=torch.float64) * spread_over(T, D) + 3.0
    variances = (2 + torch.rand(num_classes, T, D, generator=generator, dtype=torch.float64)) * spread_over(T, D) ** 2
    variances = torch.where(counted[:, None, None] > 0, variances, 0)

    def run(backend, features):
        kept = torch.float64 if features.dtype == torch.float64 else torch.float32
        # Rounded to what is kept in training, or they would not be the same for all dtypes.
        state = (each.float().flatten(1).to(features.device, kept, copy=True) for each in (centroids, variances))
        counters = counted.to(features.device, copy=True), torch.zeros_like(counted, device=features.device)
        running = RunningMoments(*state, *counters)
        result = centroid_variance(features, groups, running, penalty, momentum=momentum, backend=backend)
        monitors = result.intra_mse, result.class_mse, *running[:2], *(each.to(kept) for each in running[2:])
        return result.rob_loss, *monitors, result.class_penalty

    return Problem(variance_problem(labels, num_classes, T=T, D=D, seed=seed).leaves, run)


def slots_problem(labels, num_classes, *, T=1, D=8, S=3, bound=None, seed=0, penalty=PENALTIES["nats"]) -> Problem:
    """Classes that were in 1, 0, 1, 2, ... batches before; the first slot of each third has died, if it has begun."""
    groups = ClassGroups.from_labels(labels, num_classes, max_class_size=bound)
    counted = (torch.arange(num_classes, device=labels.device) - 1).abs()
    # Two samples are as far from their mean as each other: which is a slot depends on the precision.
    counted = torch.where(groups.counts == 2, 1, counted)
    draw = drawing(torch.Generator().manual_seed(seed + 1))
    variances = (2 + draw(num_classes, S, T, D).abs()) * spread_over(T, D) ** 2
    centroids = draw(num_classes, S, T, D) * spread_over(T, D) + 3.0
    shares = draw(num_classes, S).softmax(dim=1)
    shares[::3, 0] = 1e-4

    def run(backend, features):
        kept = torch.float64 if features.dtype == torch.float64 else torch.float32
        slots = centroids.flatten(2), variances.flatten(2), shares
        state = (each.float().to(features.device, kept, copy=True) for each in slots)
        running = RunningSlots(*state, counted.clone(), torch.zeros_like(counted))
        result = slot_variance(features, groups, running, penalty, backend=backend)
        monitors = result.intra_mse, result.class_mse, *running[:3], *(each.to(kept) for each in running[3:])
        return result.rob_loss, *monitors, result.class_penalty

    return Problem(variance_problem(labels, num_classes, T=T, D=D, seed=seed).leaves, run)


OPERATORS = {
    "slot_attention": slot_problem,
    "cross_attention": cross_problem,
    "class_variance": variance_problem,
    "centroid_variance": centroid_problem,
    "slot_variance": slots_problem,
}

every_operator = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
every_penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())
every_backend = pytest.mark.parametrize("backend", ["reference", "eager", "triton"])

# Two classes of four without a sample, and an odd width.
FEW = torch.tensor([1, 3, 1, 1, 3, 3, 1], device=DEVICE)


def few(make: Callable[..., Problem], labels: Tensor = FEW, **options: Any) -> Problem:
    """A problem in fp32 that is as small as kernels take, for what does not depend on size."""
    once = {"J": 1} if make is slot_problem else {}
    return make(labels, 4, **{"T": 2, "D": 18, **once, **options}).to(torch.float32)
