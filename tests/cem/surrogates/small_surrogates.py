"""Small surrogates, batches for them, and what they make of these."""

import copy
from dataclasses import replace
from typing import NamedTuple

import torch

import cem

WIDTH, CLASSES = 16, 5
CONTEXT = cem.Context(feature_shape=(4, 2, 2), image_shape=(3, 8, 8), num_classes=CLASSES, noise_std=0.5)


def build(name, options=None, **run):
    """A member of these options, for a run that differs in this from ``CONTEXT``."""
    torch.manual_seed(0)
    chosen = cem.SURROGATES[name].Options(**(options or {})).checked(f"{name}.")
    return cem.SURROGATES.build(name, replace(CONTEXT, **run), chosen)


def attention(feature_dim=WIDTH, **options):
    torch.manual_seed(0)
    options = {"num_slots": 4, "reg_strength": 0.5, "num_classes": CLASSES, **options}
    return cem.SlotCrossAttentionCEM(feature_dim, **options)


def batch(num_samples=24, width=WIDTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, width, generator=generator)
    return features, torch.randint(0, CLASSES, (num_samples,), generator=generator)


class Seen(NamedTuple):
    rob_loss: torch.Tensor
    intra_mse: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, torch.Tensor]


def seen(surrogate, features, labels, unique_labels=None):
    """What a copy makes of a batch, with the same random numbers every time; the gradient is that of ``rob_loss``."""
    surrogate = copy.deepcopy(surrogate)
    features = features.detach().requires_grad_()
    torch.manual_seed(0)
    rob_loss, intra_mse = surrogate(features, labels, unique_labels)
    (gradient,) = torch.autograd.grad(rob_loss, features)
    return Seen(rob_loss.detach(), intra_mse.detach(), gradient, dict(surrogate.state_dict()))
