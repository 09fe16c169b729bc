"""Passes over a data set that leave the training run as it was: same mode, same random state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from cem.models import SplitModel

Batches = Iterable[tuple[Tensor, Tensor]]


@contextmanager
def isolated_random(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from PyTorch's generators as if seeded with ``seed``, and put their states back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, device: torch.device, seed: int, *, amp: bool = False) -> float:
    """Fraction of samples that ``model`` classifies correctly, under the defense's noise.

    Args:
        model: images ``[B, C, H, W]`` → logits ``[B, K]``.
        batches: pairs of images and labels ``[B]``.
        device: the model's.
        seed: of the noise; the same seed sees the same noise.
        amp: under bfloat16 autocast.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: if there are no samples.
    """
    correct, total = torch.zeros((), dtype=torch.int64, device=device), 0
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if amp else nullcontext()
    with eval_mode(model), isolated_random(seed, device), autocast:
        for images, labels in batches:
            logits = model(images.to(device, non_blocking=True))
            correct += (logits.argmax(dim=1) == labels.to(device, non_blocking=True)).sum()
            total += len(labels)
    if total == 0:
        raise ValueError("there are no samples to evaluate on")
    return correct.item() / total


@torch.no_grad()
def collect_features(
    model: SplitModel, batches: Batches, device: torch.device, seed: int, *, noisy: bool
) -> tuple[Tensor, Tensor]:
    """Features of a whole data set in evaluation mode.

    Args:
        model: has ``encoder`` and ``defense``.
        batches: pairs of images ``[B, C, H, W]`` and labels ``[B]``.
        device: the model's; the result lies there too.
        seed: of the noise.
        noisy: whether the features have passed the defense, as the server sees them, or are clean.

    Returns:
        Features ``[N, *feature_shape]`` and labels ``[N]``.
    """
    features, labels = [], []
    with eval_mode(model), isolated_random(seed, device):
        for images, targets in batches:
            z = model.encoder(images.to(device, non_blocking=True))
            features.append(model.defense(z) if noisy else z)
            labels.append(targets.to(device, non_blocking=True))
    return torch.cat(features), torch.cat(labels)
