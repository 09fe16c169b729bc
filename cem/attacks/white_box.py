"""The white-box attack: whoever has the client's weights searches for images that may well have given the features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cem.attacks.base import VAL, Attack, Exposed, Own, Progress, Record, seconds_of
from cem.attacks.decoder import Decoder
from cem.attacks.networks import Average
from cem.data import ImageSet
from cem.options import Options as BaseOptions
from cem.options import option
from cem.training.evaluation import isolated_random

NEAR = (math.inf, 10.0, 3.0, 1.0, 0.3, 0.1, 0.01, 0.0)
MEAN = "mean image"
WEIGHTS = {"decoder": NEAR, "its best network": NEAR, MEAN: (10.0, 3.0, 1.0, 0.3, 0.1)}
"""By start, weights of the prior that are tried. At 1, pixels as far from a network's answer as usual cost half a nat
each, pixels as unlike their neighbors as usual a nat."""

SEARCH_IMAGES = 64  # of the attacker's validation images
FIRST = 4  # all weights are tried with this part of the steps,
FINALISTS = 2  # and so many of each start with all of them
BATCH, PIXELS = 64, 2**16  # in a batch: so many images, or more until they have so many pixels
LARGE = 0.5  # of all gray levels: the first steps from the mean image
TICK = 10  # steps between two reports
OWN_SEED = 0x5EED  # makes another seed of the attack's
TINY = 1e-8  # in place of a scale of 0


def total_variation(images: Tensor) -> Tensor:
    """``[N]``: sum over neighboring pixels of their absolute difference."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().flatten(1).sum(1)
    right = (images[..., 1:] - images[..., :-1]).abs().flatten(1).sum(1)
    return down + right


def surprise(target: Exposed, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``(pixels, sent) -> −log p(sent | pixels)``, ``[B]``, in nats, up to a constant.

    Of several observations there is only the mean: where the noise is Gaussian, so is the mean's, with σ/√queries.
    Without a density, the squared error counts as if there were Gaussian noise of the standard deviation ``scale``, and
    what the defense does is done to the guess too.

    Args:
        target: model and number of queries.
        scale: in units of the features.
    """
    encoder, defense = target.model.encoder, target.model.defense
    sigma = defense.sigma()
    std = sigma / math.sqrt(target.queries) if sigma else scale

    def energy(pixels: Tensor, sent: Tensor) -> Tensor:
        z = encoder(pixels)
        if sigma is None:
            known = defense.log_likelihood(sent, z) if target.queries == 1 else None
            if known is not None:
                return -known
            z = defense(z)
        return ((z - sent) / std).flatten(1).square().sum(1) / 2

    return energy


def descend(
    energy: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int,
    lr: float,
    after: Callable[[int], object] = lambda steps: None,
) -> Tensor:
    """Images in [0, 1] of small energy, ``[N, C, H, W]``: of all that a search has met, for each image the best.

    Adam on the pixels, which are put back into [0, 1] after each step; the rate falls along a cosine to 0. No image
    influences another.

    Args:
        energy: images to ``[N]``.
        start: ``[N, C, H, W]``, in [0, 1].
        steps: gradients that are followed.
        lr: the largest step of a pixel, about.
        after: called now and then with the number of steps since the last call.
    """
    pixels = start.detach().clone().requires_grad_()
    best, lowest = start.detach().clone(), start.new_full((len(start),), math.inf)
    adam = torch.optim.Adam([pixels], betas=(0.9, 0.99))  # 0.999 would remember more steps than there are

    def keep(energies: Tensor) -> None:
        better = energies < lowest
        lowest[better], best[better] = energies[better], pixels.detach()[better]

    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.enable_grad():
            energies = energy(pixels)
            # A sum, so that an image's gradient does not depend on the others.
            (pixels.grad,) = torch.autograd.grad(energies.sum(), pixels)
        keep(energies.detach())
        adam.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
        if (step + 1) % TICK == 0 or step + 1 == steps:
            after(step % TICK + 1)
    with torch.no_grad():
        keep(energy(pixels))
    return best


class WhiteBox(Attack["WhiteBox.Options"]):
    """Searches for pixels ``x`` in [0, 1] that minimize ``−log p(sent | x)`` and a prior of what images are like.

    From the best decoder's answer ``D``, and from that of the best of the networks that it averages, the prior is
    ``w · Σ (x − D)² / 2s²``, where ``s²`` is the mean squared error of ``D`` in that pixel on validation images; at
    ``w = ∞`` nothing is searched and the answer stays. From the mean image it is ``w · TV(x) / b``, where ``b`` is the
    total variation of a pixel of the attacker's images (He et al., "Model Inversion Attacks Against Collaborative
    Inference", ACSAC 2019: their rMLE). Start and weight with the smallest MSE on validation images are taken.

    A failure says little: the search follows gradients, and an encoder that has saturated has none.
    """

    name = "white-box"
    summary = "pixels searched by gradients through the encoder, from the best decoder's answer and from the mean image"
    needs = (Decoder.name,)
    first_look: ClassVar[Mapping[str, Any]] = {"steps": 60}

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of the search.

        Attributes:
            steps: Steps of Adam on the pixels of every image.
        """

        steps: int = option(200, least=1)

    def forecast(self, target: Exposed, own: Own, options: Options) -> float:
        """See :class:`~cem.attacks.base.Attack`."""
        sent, few = target.sent[VAL][:SEARCH_IMAGES].to(target.device), 3
        energy, start = surprise(target, 1.0), _pixels(own.val, len(sent)).to(target.device)
        seconds = seconds_of(lambda: descend(lambda x: energy(x, sent), start, few, 0.1))
        return _work(target, WEIGHTS, options.steps) * seconds / (few * len(sent))

    def run(self, target: Exposed, own: Own, options: Options, progress: Progress) -> Record:
        """See :class:`~cem.attacks.base.Attack`; what was found is kept batch by batch."""
        search = _Search(target, own, options.steps, progress)
        chosen = search.choose()
        start, weight = chosen["start"], chosen["weight"]
        guesses = {VAL: chosen["found"]}
        guesses |= {name: search.guess(name, start, weight) for name in target.sent if name != VAL}
        facts = {
            "start": start,
            "weight": _plain(weight),
            "steps": options.steps if math.isfinite(weight) else 0,
            "grid": [{**row, "weight": _plain(row["weight"])} for row in chosen["grid"]],
            "converged": None,
            "note": "",
        }
        return Record({f"{start}, weight {weight:g}": guesses}, facts)


class _Search:
    """One run of the attack: what its searches share, and how far they are."""

    def __init__(self, target: Exposed, own: Own, steps: int, progress: Progress) -> None:
        self.target, self.steps, self.progress = target, steps, progress
        self.sent = target.sent[VAL][:SEARCH_IMAGES]
        self.images = _pixels(own.val, len(self.sent))
        known = _pixels(own.train, 1000)
        self.mean = known.mean(0).to(target.device)
        self.variation = max(total_variation(known).mean().item() / self.mean.numel(), TINY)
        self.energy = surprise(target, max(0.1 * self.sent.var(0, correction=0).mean().sqrt().item(), TINY))
        self.networks = _networks(progress)
        self.errors: dict[str, Tensor] = {}
        for start in self.networks:
            answers = [self._start(start, part.to(target.device)).cpu() for part in target.sent[VAL].split(BATCH)]
            errors = (torch.cat(answers) - _pixels(own.val, len(own.val))).square().mean(0)
            self.errors[start] = errors.clamp(min=max(0.01 * errors.mean().item(), TINY)).to(target.device)
        self.weights = {start: each for start, each in WEIGHTS.items() if start in self.networks or start == MEAN}
        self.done, self.work = 0, _work(target, self.weights, steps)

    def choose(self) -> dict[str, Any]:
        """``start`` and ``weight`` with the smallest MSE on validation images, what is ``found`` of those, and the
        ``grid`` of all that were tried."""
        layout = {"start": str, "weight": float, "found": Tensor, "grid": list}
        chosen = self.progress.kept("white-box-choice", layout)
        if chosen is None:
            first = max(1, self.steps // FIRST)
            tried = [self._try(start, weight, first) for start, each in self.weights.items() for weight in each]
            for start in self.weights:
                half = [row for row in tried if row["start"] == start and 0 < row["steps"] < self.steps]
                best = sorted(half, key=lambda row: row["mse"])[:FINALISTS]
                tried += [self._try(start, row["weight"], self.steps) for row in best]
            ended = (row for row in tried if row["steps"] in (0, self.steps))
            chosen = dict(min(ended, key=lambda row: row["mse"]))
            chosen["grid"] = [{name: value for name, value in row.items() if name != "found"} for row in tried]
            self.progress.keep("white-box-choice", chosen)
        self.done = len(self.images) * _choosing(self.weights, self.steps)
        return chosen

    def guess(self, name: str, start: str, weight: float) -> Tensor:
        """Of all images of one set that is judged."""
        sent, file = self.target.sent[name], f"white-box-{name}"
        kept = self.progress.kept(file, {"found": Tensor})
        found: Tensor = kept["found"] if kept else torch.empty(0, *self.mean.shape)
        self.done += len(found) * self.steps
        batch = max(BATCH, PIXELS // self.mean.numel())
        while len(found) < len(sent):
            part = sent[len(found) : len(found) + batch]
            found = torch.cat([found, self._search(part, start, weight, self.steps, name)])
            self.progress.keep(file, {"found": found})
        return found

    def _try(self, start: str, weight: float, steps: int) -> dict[str, Any]:
        found = self._search(self.sent, start, weight, steps, "choosing")
        steps = steps if math.isfinite(weight) else 0
        return {"start": start, "weight": weight, "steps": steps, "mse": self._mse(found), "found": found}

    def _search(self, sent: Tensor, start: str, weight: float, steps: int, what: str) -> Tensor:
        """From the start, or the start itself at an infinite weight; on the CPU."""

        def after(steps: int) -> None:
            self.done += steps * len(sent)
            self.progress.show(min(1.0, self.done / self.work), what)

        # Some defenses draw, but nobody can draw again what was drawn for the features sent.
        with isolated_random(self.target.seed ^ OWN_SEED, self.target.device):
            sent = sent.to(self.target.device)
            begin = self._start(start, sent)
            if math.isinf(weight):
                return begin.cpu()

            def energy(x: Tensor) -> Tensor:
                if start in self.errors:
                    prior = ((x - begin).square() / (2 * self.errors[start])).flatten(1).sum(1)
                else:
                    prior = total_variation(x) / self.variation
                return self.energy(x, sent) + weight * prior

            lr = self.errors[start].mean().sqrt().item() if start in self.errors else LARGE
            return descend(energy, begin, steps, lr, after).cpu()

    @torch.no_grad()
    def _start(self, start: str, sent: Tensor) -> Tensor:
        if start in self.networks:
            return self.networks[start](sent).clamp(0, 1)
        return self.mean.repeat(len(sent), 1, 1, 1)

    def _mse(self, found: Tensor) -> float:
        return (found - self.images).square().mean().item()


def _networks(progress: Progress) -> dict[str, nn.Module]:
    """By start, what gives it: where the decoder is an average of several networks, also the best of them.

    An average has the smaller error, and yet not always the better prior.
    """
    earlier = progress.earlier.get(Decoder.name)
    if earlier is None or earlier.network is None:
        return {}
    starts = {"decoder": earlier.network}
    if isinstance(earlier.network, Average) and len(earlier.network.members) > 1:
        starts["its best network"] = earlier.network.members[0]
    return starts


def _pixels(images: ImageSet, count: int) -> Tensor:
    """The first ``count``, in [0, 1]."""
    return images.images[:count].float() / 255


def _plain(weight: float) -> float | None:
    """For JSON, which has no infinity: ``None``."""
    return weight if math.isfinite(weight) else None


def _choosing(weights: Mapping[str, Sequence[float]], steps: int) -> int:
    """Steps for each validation image, at most."""
    tried = sum(map(math.isfinite, chain(*weights.values())))
    return tried * max(1, steps // FIRST) + FINALISTS * len(weights) * steps


def _work(target: Exposed, weights: Mapping[str, Sequence[float]], steps: int) -> int:
    """Steps of single images, all together."""
    val = len(target.sent[VAL])
    return min(val, SEARCH_IMAGES) * _choosing(weights, steps) + (sum(map(len, target.sent.values())) - val) * steps
