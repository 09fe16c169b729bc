"""Problems of slot variance that its tests share, and its definition, number by number."""

import math
import statistics

import pytest
import torch
from problems import Problem, labels_with_holes

from cem_kernels import ClassGroups, slot_variance
from cem_kernels.class_variance import HINGES

both_backends = pytest.mark.parametrize("backend", ["eager", "reference"])
every_hinge = pytest.mark.parametrize("hinge", HINGES)
LABELS = labels_with_holes(13, 5)  # classes 1 and 3; the others are empty
OPTIONS = {"threshold": 0.05, "eps_var": 1e-4, "gamma": 1e-6, "min_samples": 2}
GROUPS = ClassGroups.from_labels(torch.tensor([0, 1, 1, 2]), 3)


def random_features(num_samples, T, D, seed=0):
    """Columns on both sides of the threshold and below the floor."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-3, 0.5, T * D, dtype=torch.float64).view(T, D)
    return torch.randn(num_samples, T, D, generator=generator, dtype=torch.float64) * spread + 3.0


def random_attention(num_samples, T, S, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed + 1)
    logits = torch.randn(num_samples, T, S, generator=generator, dtype=torch.float64)
    return torch.softmax(sharpness * logits, dim=2)


def variance_problem(
    labels, num_classes, *, T=1, D=6, S=3, seed=0, dtype=torch.float64, attention=None, bound=None, **options
):
    groups = ClassGroups.from_labels(labels, num_classes, max_class_size=bound)
    if attention is None:
        attention = random_attention(len(labels), T, S, seed)
    attention = attention.to(labels.device, dtype)

    def run(backend, features):
        weights = attention.double() if features.dtype == torch.float64 else attention
        return tuple(slot_variance(features, weights, groups, backend=backend, **(OPTIONS | options)))

    return Problem({"features": random_features(len(labels), T, D, seed).to(labels.device, dtype)}, run)


HINGE_OF_NUMBER = {
    "relu": lambda h: max(h, 0.0),
    "softplus": lambda h: math.log1p(math.exp(h)),
    "identity": lambda h: h,
}


def by_loops(x, p, labels, num_classes, hinge="relu", *, threshold, eps_var, gamma, min_samples):
    """The definition, number by number: ``(rob_loss, intra_mse, penalty of each class, mse of each class)``."""
    x, p, labels = x.tolist(), p.tolist(), labels.tolist()
    penalties, errors, weights = [0.0] * num_classes, [0.0] * num_classes, [0] * num_classes
    for c in range(num_classes):
        members = [n for n, label in enumerate(labels) if label == c]
        if len(members) < min_samples:
            continue
        weights[c] = len(members)
        T, D, S = len(x[0]), len(x[0][0]), len(p[0][0])
        for t in range(T):
            for s in range(S):
                W = math.fsum(p[n][t][s] for n in members)
                if W == 0:
                    continue
                n_eff = 1 / math.fsum((p[n][t][s] / W) ** 2 for n in members)  # p² may underflow
                for d in range(D):
                    mean = math.fsum(p[n][t][s] * x[n][t][d] for n in members) / W
                    mse = math.fsum(p[n][t][s] * (x[n][t][d] - mean) ** 2 for n in members) / W
                    of_class = statistics.variance([x[n][t][d] for n in members])
                    var = mse * n_eff / (n_eff - 1) if n_eff >= 2 else mse * n_eff + (2 - n_eff) * of_class
                    height = math.log(max(var, eps_var) + gamma) - math.log(threshold + gamma)
                    penalties[c] += W / len(members) * HINGE_OF_NUMBER[hinge](height) / (T * D)
                    errors[c] += W / len(members) * mse / (T * D)
    total = max(sum(weights), 1)
    rob_loss = math.fsum(w * penalty for w, penalty in zip(weights, penalties, strict=True)) / total
    intra_mse = math.fsum(w * error for w, error in zip(weights, errors, strict=True)) / total
    return rob_loss, intra_mse, penalties, errors


def assert_values_by_loops(result, *args, **options):
    for found, want in zip(result, by_loops(*args, **(OPTIONS | options)), strict=True):
        torch.testing.assert_close(found.cpu(), torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)
