"""The best decoder as the generator of a GAN: images that look like images, where the mean of what may be is a blur."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cem.attacks.base import VAL, Attack, Exposed, Own, Progress, Record, seconds_of
from cem.attacks.decoder import Decoder
from cem.attacks.fit import decode
from cem.attacks.metrics import ssim, ssim_window
from cem.attacks.networks import Average, build_network
from cem.attacks.observe import clean_features, defended
from cem.data import make_loader
from cem.errors import DivergedError, UsageError
from cem.models.split import ImageShape
from cem.options import Options as BaseOptions
from cem.options import option
from cem.training.evaluation import isolated_random

PENALTY = 10.0  # of the critic's gradient, as published
BETAS = (0.5, 0.9)  # of Adam; more momentum and the two chase each other
SMALLEST_SIDE = 4  # pixels; the critic halves maps down to this
TYPICAL = "preactN4C64"  # stands for the decoder where a step is timed before there is one

_KEPT = {"generator": dict, "critic": dict, "optimizers": (dict, dict), "best": dict, "curve": ({str: float}, ...)}


class Gan(Attack["Gan.Options"]):
    """Fine-tunes the best decoder against a critic of images: a Wasserstein GAN's loss plus the squared error.

    The posterior mean, which a decoder estimates, has the smallest squared error that there is; no critic lowers it.
    Sharpness is what can be had: SSIM, by which the epoch is chosen on validation images, and *identified*.

    Source: the GAN attack of arXiv:2503.00383; the critic as in Gulrajani et al., "Improved Training of Wasserstein
    GANs", 2017.
    """

    name = "gan"
    summary = "the best decoder, fine-tuned against a critic; for sharpness, on MSE the posterior mean cannot be beaten"
    needs = (Decoder.name,)
    required = True
    bounds = ("epochs",)

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of the GAN.

        Attributes:
            epochs: Passes over the attacker's images, the generator validated after each. With more, the same command
                goes on from there.
            critic_steps: Batches that the critic learns from before the generator takes a step.
            mse_weight: Of the squared error beside the critic's judgment.
            batch_size: Images in a step.
            lr: Learning rate of both.
        """

        epochs: int = option(50, least=1)
        critic_steps: int = option(10, least=1)
        mse_weight: float = option(1500.0, least=0)
        batch_size: int = option(64, least=1)
        lr: float = option(5e-4, above=0)

    def check(self, target: Exposed, own: Own, options: Options) -> None:
        """SSIM is not defined for tiny images."""
        if ssim_window(*target.image_shape[1:]) is None:
            raise UsageError(f"--attacks {self.name}: there is no SSIM for images of {target.image_shape[1:]} pixels")

    def forecast(self, target: Exposed, own: Own, options: Options) -> float:
        """See :class:`Attack`; as if the decoder were of the usual size."""
        with isolated_random(target.seed, target.device):
            network = build_network(TYPICAL, target.model.feature_shape, target.image_shape).to(target.device)
            game = _Game(network, target.image_shape, options)
            images = own.train.images[: options.batch_size].to(target.device).float() / 255
            z = target.observe(images)
            step = seconds_of(lambda: game.criticize(images, z))
            step += seconds_of(lambda: game.generate(images, z)) / options.critic_steps
        batches = math.ceil(len(own.train) / options.batch_size)
        # A validation image costs a forward pass, a fifth of a step at most.
        return options.epochs * step * (batches + len(own.val) / options.batch_size / 5)

    def run(self, target: Exposed, own: Own, options: Options, progress: Progress) -> Record:
        """See :class:`Attack`."""
        decoder = progress.earlier[Decoder.name].network
        assert decoder is not None
        if isinstance(decoder, Average):
            decoder = decoder.members[0]
        with isolated_random(target.seed, target.device):
            game = _Game(copy.deepcopy(decoder), target.image_shape, options)
        curve = [{"epoch": 0, **game.validated(target, own)}]
        best: dict[str, Any] = {}
        kept = progress.kept(self.name, _KEPT)
        if kept is not None and len(kept["curve"]) <= options.epochs + 1:
            game.restore(kept)
            curve, best = kept["curve"], kept["best"]
        clean = clean_features(target.model, own.train)
        for epoch in range(len(curve), options.epochs + 1):
            distance = self._epoch(target, own, options, game, clean, epoch)
            curve.append({"epoch": epoch, **game.validated(target, own), "distance": distance})
            if not all(map(math.isfinite, curve[-1].values())):
                raise DivergedError(f"--attacks {self.name}: epoch {epoch} is not finite; lower --{self.name}.lr")
            if _best(curve) == epoch:
                best = copy.deepcopy(game.generator.state_dict())
            progress.keep(self.name, {**game.state(), "best": best, "curve": curve})
            progress.show(epoch / options.epochs, f"epoch {epoch}/{options.epochs}")
        game.generator.load_state_dict(best)
        before, after = curve[0], curve[_best(curve)]
        progress.log.info(
            f"validation SSIM {after['val_ssim']:.4f} after epoch {after['epoch']}, {before['val_ssim']:.4f} before"
        )
        trained = {"name": self.name, "curve": curve, "best_epoch": after["epoch"], "converged": None}
        return Record(
            {self.name: {each: decode(game.generator, sent) for each, sent in target.sent.items() if each != VAL}},
            {"converged": None, "note": "", "curves": [trained]},
        )

    def _epoch(
        self, target: Exposed, own: Own, options: Options, game: _Game, clean: Tensor | None, epoch: int
    ) -> float:
        """A pass over the attacker's images; how far apart the critic held images and reconstructions, on average."""
        images = replace(own.train, labels=torch.arange(len(own.train)))  # by which their features are found again
        seed = (target.seed << 20) + epoch  # one of its own: an epoch that is run again draws what it drew
        order = torch.Generator().manual_seed(seed)
        batches = make_loader(images, min(options.batch_size, len(images)), shuffle=True, generator=order)
        total = torch.zeros((), device=target.device)
        with isolated_random(seed, target.device):
            for number, (x, positions) in enumerate(batches, start=(epoch - 1) * len(batches) + 1):
                x = x.to(target.device)
                if clean is None:
                    z = target.observe(x)
                else:
                    z = defended(target.model, clean[positions.to(clean.device)], target.queries)
                total += game.criticize(x, z)
                if number % options.critic_steps == 0:
                    game.generate(x, z)
        return total.item() / len(batches)


class _Game:
    """Generator and critic, and what each of them does in a step on images ``[B, C, H, W]`` and their features."""

    def __init__(self, generator: nn.Module, image_shape: ImageShape, options: Gan.Options) -> None:
        device = next(generator.parameters()).device
        self.generator, self.critic, self.weight = generator, _critic(image_shape).to(device), options.mse_weight
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=options.lr, betas=BETAS) for network in (generator, self.critic)
        ]

    def criticize(self, images: Tensor, z: Tensor) -> Tensor:
        """A step of the critic; returns how far apart it holds images and reconstructions."""
        self.generator.train()
        with torch.no_grad():
            guesses = self.generator(z)
        share = torch.rand(len(images), 1, 1, 1, device=images.device)
        between = (share * images + (1 - share) * guesses).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        distance = (self.critic(images) - self.critic(guesses)).mean()
        self._step(1, PENALTY * (slope.flatten(1).norm(dim=1) - 1).square().mean() - distance)
        return distance.detach()

    def generate(self, images: Tensor, z: Tensor) -> None:
        """A step of the generator."""
        self.generator.train()
        guesses = self.generator(z)
        self._step(0, self.weight * F.mse_loss(guesses, images) - self.critic(guesses).mean())

    def _step(self, mover: int, loss: Tensor) -> None:
        optimizer = self.optimizers[mover]
        parameters = optimizer.param_groups[0]["params"]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()

    def validated(self, target: Exposed, own: Own) -> dict[str, float]:
        """On the attacker's validation images."""
        guesses, images = decode(self.generator, target.sent[VAL]), own.val.images.float() / 255
        return {"val_mse": F.mse_loss(guesses, images).item(), "val_ssim": ssim(guesses, images).mean().item()}

    def state(self) -> dict[str, Any]:
        """All that goes on changing."""
        networks = {"generator": self.generator.state_dict(), "critic": self.critic.state_dict()}
        return {**networks, "optimizers": [each.state_dict() for each in self.optimizers]}

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self.generator.load_state_dict(state["generator"])
        self.critic.load_state_dict(state["critic"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


def _best(curve: list[dict[str, float]]) -> int:
    """The epoch with the largest SSIM; epoch 0 is the decoder itself, and no GAN."""
    return max(range(1, len(curve)), key=lambda epoch: curve[epoch]["val_ssim"])


def _critic(image_shape: ImageShape) -> nn.Module:
    """Images to a number each. The penalty is on single images, so nothing may normalize over a batch."""
    channels, *side = image_shape
    layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, padding=1), nn.LeakyReLU(0.2)]
    width = 32
    while max(side) > SMALLEST_SIDE:
        layers += [nn.Conv2d(width, min(2 * width, 128), 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width, side = min(2 * width, 128), [math.ceil(length / 2) for length in side]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * math.prod(side), 1))
