"""Random inputs for the operators, and the comparison of two backends on outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cem_kernels import (
    ClassGroups,
    CrossAttentionWeights,
    LogHinge,
    Nats,
    Penalty,
    RunningMoments,
    SlotAttentionWeights,
)
from cem_kernels.cross_attention import cross_attention
from cem_kernels.slot_attention import slot_attention
from cem_kernels.variance import centroid_variance, class_variance

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

    def results(self, backend: str, forward_under: Any = None, **replaced: Tensor) -> dict[str, Tensor]:
        """Outputs and the gradient of every leaf for fixed random upstream gradients."""
        leaves = {n: t.detach().clone().requires_grad_() for n, t in (self.leaves | replaced).items()}
        with forward_under or nullcontext():
            outputs = self.run(backend, **leaves)
        generator = torch.Generator().manual_seed(1)
        graph = [o for o in outputs if o.requires_grad]
        upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in graph]
        grads = torch.autograd.grad(graph, list(leaves.values()), upstream, allow_unused=True)
        found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            found[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
        return found


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


def random_slot_weights(width: int, generator: torch.Generator, dtype: torch.dtype) -> SlotAttentionWeights:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    d, small = width, width**-0.5
    return SlotAttentionWeights(
        *(draw(d, d, scale=2 * small) for _ in range(3)),
        draw(3 * d, d, scale=small), draw(3 * d, d, scale=small), draw(3 * d), draw(3 * d),
        draw(2 * d, d, scale=small), draw(2 * d), draw(d, 2 * d, scale=small), draw(d),
        *(1 + draw(d, scale=0.3) if i % 2 == 0 else draw(d, scale=0.3) for i in range(6)),
    )  # fmt: skip


def random_cross_weights(width: int, generator: torch.Generator, dtype: torch.dtype) -> CrossAttentionWeights:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    d, small = width, width**-0.5
    return CrossAttentionWeights(
        *(draw(d, d, scale=2 * small) for _ in range(4)), draw(d), draw(), draw(),
        draw(4 * d, d, scale=small), draw(4 * d), draw(d, 4 * d, scale=small), draw(d),
        *(1 + draw(d, scale=0.3) if i % 2 == 0 else draw(d, scale=0.3) for i in range(6)),
    )  # fmt: skip


def slot_problem(labels, num_classes, *, T=1, D=8, S=4, J=2, bound=None, seed=0, dtype=torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    groups = ClassGroups.from_labels(labels, num_classes, max_class_size=bound)
    leaves = {
        "tokens": torch.randn(len(labels), T, D, generator=generator, dtype=torch.float64).to(dtype),
        "slots": torch.randn(num_classes, S, D, generator=generator, dtype=torch.float64).to(dtype),
        **random_slot_weights(D, generator, dtype)._asdict(),
    }
    leaves = {name: leaf.to(labels.device) for name, leaf in leaves.items()}

    def run(backend, tokens, slots, **weights):
        weights = SlotAttentionWeights(**weights)
        return (slot_attention(tokens, slots, groups, weights, num_iterations=J, backend=backend),)

    return Problem(leaves, run)


def cross_problem(labels, num_classes, *, T=1, D=8, S=4, H=2, bound=None, seed=0, dtype=torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    groups = ClassGroups.from_labels(labels, num_classes, max_class_size=bound)
    leaves = {
        "tokens": torch.randn(len(labels), T, D, generator=generator, dtype=torch.float64).to(dtype),
        "slots": torch.randn(num_classes, S, D, generator=generator, dtype=torch.float64).to(dtype),
        **random_cross_weights(D, generator, dtype)._asdict(),
    }
    leaves = {name: leaf.to(labels.device) for name, leaf in leaves.items()}

    def run(backend, tokens, slots, **weights):
        weights = CrossAttentionWeights(**weights)
        return (cross_attention(tokens, slots, groups, weights, num_heads=H, backend=backend),)

    return Problem(leaves, run)


def variance_problem(
    labels, num_classes, *, T=1, D=8, bound=None, seed=0, dtype=torch.float64, penalty=RELU, min_samples=2
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    groups = ClassGroups.from_labels(labels, num_classes, max_class_size=bound)
    # Columns on both sides of the threshold and below the floor.
    spread = torch.logspace(-3, 0.5, T * D, dtype=torch.float64).view(T, D)
    features = torch.randn(len(labels), T, D, generator=generator, dtype=torch.float64) * spread + 3.0

    def run(backend, features):
        return tuple(class_variance(features, groups, penalty, min_samples=min_samples, backend=backend))

    return Problem({"features": features.to(labels.device, dtype)}, run)


def centroid_problem(
    labels, num_classes, *, T=1, D=8, bound=None, seed=0, dtype=torch.float64, penalty=RELU, momentum=0.95, batches=None
) -> Problem:
    """Classes that were in 0, 1, 2, ... batches before, or all of them in ``batches``."""
    generator = torch.Generator().manual_seed(seed)
    groups = ClassGroups.from_labels(labels, num_classes, max_class_size=bound)
    spread = torch.logspace(-3, 0.5, T * D, dtype=torch.float64)
    features = torch.randn(len(labels), T * D, generator=generator, dtype=torch.float64) * spread + 3.0
    counted = torch.arange(num_classes) if batches is None else torch.full((num_classes,), batches)
    generator.manual_seed(seed + 1)  # the same centroids however many samples there are
    # Of classes that were in no batch it is not looked at, whatever it is.
    centroids = torch.randn(num_classes, T * D, generator=generator, dtype=torch.float64) * spread + 3.0
    variances = torch.rand(num_classes, T * D, generator=generator, dtype=torch.float64) * spread**2
    variances = torch.where(counted[:, None] > 0, variances, 0)

    def run(backend, features):
        kept = torch.float64 if features.dtype == torch.float64 else torch.float32
        # Rounded to what is kept in training, or they would not be the same for all dtypes.
        state = (centroids.float().to(features.device, kept), variances.float().to(features.device, kept))
        running = RunningMoments(*state, counted.to(features.device, copy=True))
        result = centroid_variance(features, groups, running, penalty, momentum=momentum, backend=backend)
        monitors = result.intra_mse, result.class_mse, *running[:2], running.batches.to(kept)
        return result.rob_loss, *monitors, result.class_penalty

    return Problem({"features": features.unflatten(1, (T, D)).to(labels.device, dtype)}, run)


OPERATORS = {
    "slot_attention": slot_problem,
    "cross_attention": cross_problem,
    "class_variance": variance_problem,
    "centroid_variance": centroid_problem,
}
