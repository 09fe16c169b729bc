"""The white-box attack: whoever has the client's weights searches for the image that gives the features seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cem.attacks.metrics import ImageScores, mean_scores, score_images
from cem.attacks.observe import observe
from cem.attacks.splits import AttackSplits, pick
from cem.data import ImageSet
from cem.models import SplitModel
from cem.progress import bar
from cem.training.evaluation import eval_mode, isolated_random

TV_WEIGHTS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Weights of the total variation that the attacker tries, in units of the mean variance of the features seen."""

CYCLE = 100  # steps after which the learning rate is back to the full; long enough to settle
SEARCH_IMAGES = 16  # enough to tell weights apart that differ by factors of three
BATCH = 64  # images


def total_variation(images: Tensor) -> Tensor:
    """``[N]``: sum over neighboring pixels of their absolute difference, per pixel and channel."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().flatten(1).sum(1)
    right = (images[..., 1:] - images[..., :-1]).abs().flatten(1).sum(1)
    return (down + right) / math.prod(images.shape[1:])


def white_box_attack(
    model: SplitModel,
    observed: Tensor,
    start: Tensor,
    *,
    steps: int = 300,
    lr: float = 0.5,
    tv_weight: float,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Images ``x`` in [0, 1] that minimize ``mean over features of (E(x) - observed)² + tv_weight · TV(x)``.

    Adam on the pixels through the frozen encoder ``E``, in evaluation mode; after each step pixels are put back
    into the box. The rate falls along a cosine to 0 and starts again about every 100 steps: behind max-pooling
    and ReLU the search gets caught where a stripe is a pixel off, and large steps free it. Each image keeps
    the best it has had. Images do not influence one another.

    A failure says little: it follows gradients, and an encoder that has saturated or whose units are dead has
    none, though its features may well tell a trained decoder something.

    Source: He et al., "Model Inversion Attacks Against Collaborative Inference", ACSAC 2019 (their rMLE).

    Args:
        model: the target; not changed.
        observed: ``[N, *feature_shape]``, the noisy features that the attacker saw.
        start: ``[C, H, W]``, in [0, 1]: where every search begins.
        steps: Adam steps.
        lr: largest step of a pixel, about.
        tv_weight: in squared feature units.
        progress: called after each step with the number of images that it moved.

    Returns:
        ``[N, C, H, W]`` with the dtype of ``start``.

    Raises:
        ValueError: ``steps`` is below 1, or ``tv_weight`` negative.
    """
    if steps < 1 or not tv_weight >= 0:
        raise ValueError(f"steps must be at least 1 and tv_weight not negative, got {steps=} {tv_weight=}")
    with eval_mode(model):
        found = [_search(model, z, start, steps, lr, tv_weight, progress) for z in observed.split(BATCH)]
    return torch.cat(found) if found else start.new_empty(0, *start.shape)


def _search(
    model: SplitModel,
    observed: Tensor,
    start: Tensor,
    steps: int,
    lr: float,
    tv_weight: float,
    progress: Callable[[int], object] | None,
) -> Tensor:
    """One batch of :func:`white_box_attack`."""
    pixels = start.detach().repeat(len(observed), 1, 1, 1).requires_grad_()
    best, lowest = pixels.detach().clone(), observed.new_full((len(observed),), math.inf)
    # The usual 0.999 would remember the gradients of a whole cycle.
    adam = torch.optim.Adam([pixels], betas=(0.9, 0.99))
    cycle = math.ceil(steps / max(1, round(steps / CYCLE)))

    def losses() -> Tensor:
        z = model.encoder(pixels)
        # Noise is not to be guessed; whatever else the defense does, the attacker does too.
        sent = z if model.defense.sigma() is not None else model.defense(z)
        error = (sent - observed).flatten(1).square().mean(1)
        return error + tv_weight * total_variation(pixels)

    def keep(losses: Tensor) -> None:
        better = losses < lowest
        lowest[better] = losses.detach()[better]
        best[better] = pixels.detach()[better]

    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * (step % cycle) / cycle)) / 2
        with torch.enable_grad():
            now = losses()
            # A sum, so that an image's gradient does not depend on the others; for the pixels alone, so that
            # the encoder's weights neither get gradients nor cost any.
            (pixels.grad,) = torch.autograd.grad(now.sum(), pixels)
        keep(now)
        adam.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
        if progress is not None:
            progress(len(pixels))
    with torch.no_grad():
        keep(losses())
    return best


def run_white_box(
    model: SplitModel,
    splits: AttackSplits,
    *,
    images: int,
    steps: int = 300,
    queries: int = 1,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Attack some of the target's training images and some unseen ones, and score what comes out.

    The attacker starts from the mean of its own images, and takes that weight of :data:`TV_WEIGHTS` which gives
    the smallest MSE on images of its own (a single cycle of steps on 16 of its validation images).

    Args:
        model: the target, on ``device``.
        splits: whose images are whose.
        images: how many to attack of either set, always the same ones; fewer if a set has fewer.
        steps: see :func:`white_box_attack`.
        queries: how often the attacker sees each image; see :func:`cem.attacks.observe.observe`. The noise is
            drawn once, before the search.
        seed: of the noise. Random states stay as they are.
        device: where to compute.

    Returns:
        Plain numbers: ``images`` of each set were attacked with ``steps`` steps and ``tv_weight``, all of it in
        ``seconds``; ``train_target`` and ``test_target`` are the :func:`~cem.attacks.metrics.mean_scores` on images
        that the target was trained on and on unseen ones.

    Raises:
        ValueError: ``images``, ``steps`` or ``queries`` is below 1.
    """
    if min(images, steps, queries) < 1:
        raise ValueError(f"images, steps and queries must be at least 1, got {images=} {steps=} {queries=}")
    began = time.perf_counter()
    images = min(images, len(splits.target_train), len(splits.test))
    search_images, search_steps = min(SEARCH_IMAGES, len(splits.attacker_val)), min(steps, CYCLE)
    start = (splits.attacker_train.images.float().mean(0) / 255).to(device)
    work = len(TV_WEIGHTS) * search_images * search_steps + 2 * images * steps

    with (
        eval_mode(model),
        isolated_random(seed, device),
        bar(work, "white box") as shown,
    ):

        def attack(x: Tensor, z: Tensor, steps: int, tv_weight: float) -> ImageScores:
            found = white_box_attack(model, z, start, steps=steps, tv_weight=tv_weight, progress=shown.update)
            return score_images(found, x)

        def some(image_set: ImageSet, count: int) -> Tensor:
            return (pick(image_set, count).images.float() / 255).to(device)

        def seen(x: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.cat([observe(model, part, queries) for part in x.split(BATCH)])

        x, z = seen(some(splits.attacker_val, search_images))
        unit = z.var(0, correction=0).mean().item()
        weights = [unit * weight for weight in TV_WEIGHTS]
        errors = [attack(x, z, search_steps, weight).mse.mean().item() for weight in weights]
        tv_weight = weights[errors.index(min(errors))]
        train_target = mean_scores(attack(*seen(some(splits.target_train, images)), steps, tv_weight))
        test_target = mean_scores(attack(*seen(some(splits.test, images)), steps, tv_weight))
    return {
        "images": images, "steps": steps, "tv_weight": tv_weight, "seconds": time.perf_counter() - began,
        "train_target": train_target, "test_target": test_target,
    }  # fmt: skip
