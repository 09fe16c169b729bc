"""Train one decoder until more training no longer helps it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from cem.attacks.config import AttackConfig
from cem.attacks.losses import LOSSES
from cem.attacks.metrics import ImageScores, score_images
from cem.attacks.observe import clean_features, defended, observe
from cem.attacks.splits import AttackSplits
from cem.data import ImageSet, make_loader
from cem.errors import DivergedError
from cem.models import SplitModel
from cem.progress import over
from cem.training.evaluation import eval_mode, isolated_random

SCORE_BATCH = 500  # images
LAST_LR = 0.01  # of the first in each cycle


@dataclass
class FittedDecoder:
    """What came of a decoder's training.

    Attributes:
        decoder: with the weights of ``best_epoch``, in evaluation mode.
        curve: per epoch ``epoch``, ``lr`` (of its last step), ``train_loss`` and ``val_mse``.
        best_epoch: with the smallest ``val_mse``, from 1.
        converged: the last cycle, twice as long as the one before, gained less than the tolerance.
        seconds: of training and validation.
    """

    decoder: nn.Module
    curve: list[dict[str, float]]
    best_epoch: int
    converged: bool
    seconds: float


def fit_decoder(
    model: SplitModel,
    decoder: nn.Module,
    loss: str,
    splits: AttackSplits,
    config: AttackConfig,
    report: Callable[[Mapping[str, float]], None] = lambda row: None,
) -> FittedDecoder:
    """Train ``decoder`` to invert what crosses the cut of ``model``.

    Adam under cosine cycles with warm restarts (Loshchilov & Hutter 2017), each twice as long as the one
    before: ``config.cycle_epochs``, twice that, and so on. Training ends after the first cycle that lowered the
    validation MSE by less than ``config.tolerance`` of it, or before the one that would exceed
    ``config.max_epochs``. A plateau at a constant rate would prove nothing: errors fall again when the rate does.

    Every pass sees new draws of the defense. Images of ``splits.test`` and ``splits.target_train`` are not
    touched.

    Args:
        model: the target, in evaluation mode, on its device.
        decoder: untrained, on that device; trained in place.
        loss: a name in :data:`~cem.attacks.losses.LOSSES`.
        splits: trains on ``attacker_train``, validates on ``attacker_val``.
        config: lengths, rates, ``queries``, ``seed``.
        report: called with the new row of the curve after every epoch.

    Raises:
        DivergedError: the loss of an epoch is not finite.
    """
    device = next(decoder.parameters()).device
    start = time.perf_counter()
    with isolated_random(config.seed, device):
        view, val = (_View(model, images, config.queries) for images in (splits.attacker_train, splits.attacker_val))
    train = make_loader(
        view.images,
        min(config.batch_size, len(splits.attacker_train)),
        shuffle=True,
        generator=torch.Generator().manual_seed(config.seed),
    )
    if config.amp:  # the layout for which processors have fast bfloat16 convolutions
        decoder = decoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=config.lr)
    # Never longer than the bound, so that a tiny one still ends its cosine.
    first = min(config.cycle_epochs, config.max_epochs)
    scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=first * len(train), T_mult=2, eta_min=LAST_LR * config.lr)
    curve: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    best_epoch, best_mse, before, length, converged = 0, math.inf, math.inf, first, False
    with isolated_random(config.seed, device):
        while not converged and len(curve) + length <= config.max_epochs:
            for _ in range(length):
                train_loss, lr = _epoch(view, decoder, loss, train, optimizer, scheduler, config, len(curve) + 1)
                row: dict[str, float] = {
                    "epoch": len(curve) + 1,
                    "lr": lr,
                    "train_loss": train_loss,
                    "val_mse": _mse(decoder, val, config.seed),
                }
                if not math.isfinite(row["val_mse"]):
                    raise DivergedError(f"the validation MSE of epoch {row['epoch']} is not finite; lower --lr")
                curve.append(row)
                report(row)
                if row["val_mse"] < best_mse:
                    best_mse, best_epoch = row["val_mse"], len(curve)
                    best = copy.deepcopy(decoder.state_dict())
            # From infinity the first cycle always gains: one alone says nothing of convergence.
            converged = best_mse > (1 - config.tolerance) * before
            before, length = best_mse, 2 * length
    decoder.load_state_dict(best)
    return FittedDecoder(decoder.eval(), curve, best_epoch, converged, time.perf_counter() - start)


class _View:
    """A set of images, and what the attacker sees of them.

    Attributes:
        images: as given, but every image's label is its position, by which its features are found again.
    """

    def __init__(self, model: SplitModel, images: ImageSet, queries: int) -> None:
        self.model, self.queries = model, queries
        self.images = replace(images, labels=torch.arange(len(images)))
        self._clean = clean_features(model, images)

    def __call__(self, images: Tensor, positions: Tensor) -> Tensor:
        """Features of ``images``, under new draws of the defense."""
        if self._clean is None:
            return observe(self.model, images, self.queries)
        return defended(self.model, self._clean[positions.to(self._clean.device)], self.queries)


def _epoch(
    view: _View, decoder: nn.Module, loss: str, batches: Any, optimizer: torch.optim.Optimizer,
    scheduler: CosineAnnealingWarmRestarts, config: AttackConfig, number: int,
) -> tuple[float, float]:  # fmt: skip
    """One pass over the attacker's images: the mean loss, and the learning rate of the last step."""
    decoder.train()
    device = next(decoder.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for images, positions in over(batches, f"epoch {number}"):
        images = images.to(device, non_blocking=True)
        z = view(images, positions)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.amp):
            reconstructions = decoder(z)
        value = LOSSES[loss](reconstructions.float(), images)
        value.backward()
        optimizer.step()
        lr = float(scheduler.get_last_lr()[0])
        scheduler.step()
        total += value.detach().double() * len(images)
        count += len(images)
    mean = total.item() / count
    if not math.isfinite(mean):
        raise DivergedError(f"the decoder's loss in epoch {number} is {mean}; lower --lr ({config.lr:g})")
    return mean, lr


@torch.no_grad()
def _mse(decoder: nn.Module, view: _View, seed: int) -> float:
    """Mean squared error over all images of ``view``; the same seed sees the same noise."""
    device, total = next(decoder.parameters()).device, 0.0
    with eval_mode(decoder), isolated_random(seed, device):
        for images, positions in over(make_loader(view.images, SCORE_BATCH, shuffle=False), "validation"):
            images = images.to(device)
            total += F.mse_loss(decoder(view(images, positions)), images).item() * len(images)
    return total / len(view.images)


@torch.no_grad()
def reconstruct(model: SplitModel, decoder: nn.Module, images: ImageSet, queries: int, seed: int) -> Tensor:
    """What ``decoder`` makes of images after the defense: float32 ``[N, C, H, W]`` in [0, 1], on the CPU.

    The same ``seed`` draws the same noise, whatever was drawn before; the caller's random state stays.
    """
    device = next(decoder.parameters()).device
    with eval_mode(decoder), eval_mode(model), isolated_random(seed, device):
        batches = over(make_loader(images, SCORE_BATCH, shuffle=False), "reconstructing")
        return torch.cat([decoder(observe(model, batch.to(device), queries)).cpu() for batch, _ in batches])


def score_decoder(model: SplitModel, decoder: nn.Module, images: ImageSet, queries: int, seed: int) -> ImageScores:
    """Compare :func:`reconstruct` with the originals, image by image."""
    originals = images.images.float() / 255
    reconstructions = reconstruct(model, decoder, images, queries, seed)
    parts = list(zip(reconstructions.split(SCORE_BATCH), originals.split(SCORE_BATCH), strict=True))
    return ImageScores.concatenate([score_images(one, other) for one, other in over(parts, "scoring")])
