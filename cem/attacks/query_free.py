"""Inversion by whoever has the server's part and listens: neither the encoder nor an answer of it is needed."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cem.attacks.base import VAL, Attack, Exposed, Own, Progress, Record, seconds_of
from cem.attacks.fit import Schedule, decode, fit_network, one_step, seconds_of_training, usual_cycle
from cem.attacks.networks import build_network
from cem.attacks.observe import observe
from cem.data import make_loader
from cem.errors import DivergedError, UsageError
from cem.models import SplitModel
from cem.models.split import ImageShape
from cem.options import Options as BaseOptions
from cem.options import option
from cem.training.evaluation import accuracy, isolated_random

BATCH = 500  # images, where nothing is learned
BETAS = (0.5, 0.99)  # of Adam; more momentum and the two chase each other
LAST_LR = 0.02  # of the first
WIDTH = 64  # channels of what the attacker builds

_KEPT = {"shadow": dict, "judge": dict, "optimizers": (dict, dict), "curve": ({str: float}, ...)}


class QueryFree(Attack["QueryFree.Options"]):
    """Trains a shadow of the encoder, and a decoder against the shadow.

    The attacker has images of its own with their labels, the server's weights, the kind of defense, and features that
    went by, never the images behind them. The shadow's features must serve the server (cross entropy) and look like
    those that went by: a discriminator, told the class (for the latter the server's guess), learns to tell them apart,
    and the shadow to deceive it. Nothing is chosen: its rate falls to next to nothing, and the last epoch counts.

    Source: the query-free attack of He et al., "Model Inversion Attacks Against Collaborative Inference", ACSAC 2019,
    is the shadow without a discriminator (``alignment`` 0); aligning features is from Xu et al., "A Stealthy Wrongdoer:
    Feature-Oriented Reconstruction Attack against Split Learning" (FORA), CVPR 2024; the penalty on the discriminator's
    slope is R1 of Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018.
    """

    name = "query-free"
    summary = "a decoder of a shadow encoder, by whoever has the server and listens, but cannot ask the client"
    bounds = ("decoder_cycles",)

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of the query-free attack.

        Attributes:
            shadow: Its architecture. same: the encoder's, known to the attacker; other: a plain convolutional network.
            steps: Steps of its training at least; it ends with a whole pass over the attacker's images.
            alignment: Weight of deceiving the discriminator beside the server's cross entropy; 0: no discriminator.
            batch_size: Images in a step.
            lr: Learning rate of Adam at the start; it falls along a cosine.
            network: Network that is trained to invert the shadow, named as in --decoder.networks.
            decoder_cycles: Bound on the cycles of its training, which are those of decoders.
        """

        shadow: Literal["same", "other"] = option("same")
        steps: int = option(800, least=1)
        alignment: float = option(1.0, least=0)
        batch_size: int = option(64, least=1)
        lr: float = option(1e-3, above=0)
        network: str = option("preactN4C64")
        decoder_cycles: int = option(4, least=1, most=20)

        def check(self) -> None:
            """What no option can say alone."""
            try:
                build_network(self.network, (1, 4, 4), (1, 4, 4))
            except ValueError as error:
                raise UsageError(f"--query-free.network: {error}") from None

        def of_decoder(self, images: int) -> Schedule:
            """Of the decoder, for so many images to learn from."""
            return Schedule(usual_cycle(images, Schedule.batch_size), self.decoder_cycles)

    def check(self, target: Exposed, own: Own, options: Options) -> None:
        """The encoder's architecture must be one that can begin anew, and some features must have gone by."""
        if options.shadow == "same" and (stranger := _without_reset(target.model.encoder)):
            raise UsageError(
                f"--query-free.shadow same: a {stranger} has no reset_parameters(), so it cannot begin anew; take other"
            )
        if len(target.intercepted) < 2:
            raise UsageError(f"--attacks {self.name} listens to features of others, and there are none to be had")

    def forecast(self, target: Exposed, own: Own, options: Options) -> float:
        """See :class:`Attack`."""
        return sum(self._costs(target, own, options))

    def run(self, target: Exposed, own: Own, options: Options, progress: Progress) -> Record:
        """See :class:`Attack`."""
        shadowing, inverting = self._costs(target, own, options)
        share = shadowing / (shadowing + inverting)
        training = _Training(target, own, options)
        curve: list[dict[str, float]] = []
        kept = progress.kept(f"{self.name}-shadow", _KEPT)
        if kept is not None:
            training.restore(kept)
            curve = kept["curve"]
        epochs = training.epochs
        for epoch in range(len(curve) + 1, epochs + 1):
            curve.append({"epoch": epoch, **training.epoch(epoch)})
            if not all(map(math.isfinite, curve[-1].values())):
                raise DivergedError(f"--attacks {self.name}: epoch {epoch} is not finite; lower --{self.name}.lr")
            progress.keep(f"{self.name}-shadow", {**training.state(), "curve": curve})
            progress.show(share * epoch / epochs, f"shadow, epoch {epoch}/{epochs}")
        shadow = training.model.eval().requires_grad_(False)
        served = accuracy(shadow, make_loader(own.val, BATCH, shuffle=False), target.device, target.seed)
        progress.log.info(f"the server is right on {served:.1%} of what the shadow makes of validation images")
        with isolated_random(target.seed, target.device):
            images = own.val.images.float() / 255
            sent = torch.cat([observe(shadow, x.to(target.device), target.queries).cpu() for x in images.split(BATCH)])
        schedule = options.of_decoder(len(own.train))
        bound = schedule.epochs()
        fit = fit_network(
            shadow, _decoder(target, options), "mse", own, sent, schedule, queries=target.queries,
            seed=target.seed, progress=progress, name=f"{self.name}-decoder",
            report=lambda epoch: progress.show(share + (1 - share) * epoch / bound, f"decoder, epoch {epoch}/{bound}"),
        )  # fmt: skip
        inverted = {"name": self.name, "curve": fit.curve, "best_epoch": fit.best_epoch, "converged": fit.converged}
        return Record(
            # Features of own images that crossed the cut would be answers of the encoder.
            {self.name: {each: decode(fit.network, z) for each, z in target.sent.items() if each != VAL}},
            {
                "converged": fit.converged,
                "note": "" if fit.converged else f"its decoder had not converged within {bound} epochs",
                "served": served,
                "shadow_curve": curve,
                "curves": [inverted],
            },
        )

    def _costs(self, target: Exposed, own: Own, options: Options) -> tuple[float, float]:
        """Seconds of the shadow's training, and of the decoder's."""
        training, schedule = _Training(target, own, options), options.of_decoder(len(own.train))
        with isolated_random(target.seed, target.device):
            x = own.train.images[: options.batch_size].to(target.device).float() / 255
            labels = own.train.labels[: options.batch_size].to(target.device)
            step = seconds_of(lambda: training.step(x, labels))
            training.model.eval()
            inverting = one_step(training.model, _decoder(target, options), "mse", own.train, schedule, target.queries)
            return training.epochs * training.batches * step, seconds_of_training(own, schedule, seconds_of(inverting))


class _Training:
    """Of a shadow, in ``model``, against a discriminator."""

    def __init__(self, target: Exposed, own: Own, options: QueryFree.Options) -> None:
        self.target, self.own, self.options = target, own, options
        self.batches = math.ceil(len(own.train) / options.batch_size)
        self.epochs = math.ceil(options.steps / self.batches)
        real, shape = target.model, target.model.feature_shape
        with isolated_random(target.seed, target.device):
            if options.shadow == "same":
                encoder = _begun_anew(real.encoder)
            else:
                encoder = _plain(target.image_shape, shape, _bounded(target))
            encoder, self.judge = encoder.to(target.device), _Judge(shape, target.num_classes).to(target.device)
            self.heard = target.intercepted.to(target.device)
            with torch.no_grad():
                self.classes = torch.cat([real.server(z).argmax(1) for z in self.heard.split(BATCH)])
        self.model = SplitModel(encoder, real.server, image_shape=target.image_shape, defense=real.defense)
        columns = (0, 2, 3) if len(shape) == 3 else (0,)
        self.center, spread = self.heard.mean(columns, keepdim=True), self.heard.std(columns, keepdim=True)
        self.scale = spread.clamp(min=1e-3 * spread.max().item() + 1e-12)  # features that never move say nothing
        self.optimizers = [
            torch.optim.Adam(encoder.parameters(), lr=options.lr, betas=BETAS),
            torch.optim.Adam(self.judge.parameters(), lr=2 * options.lr, betas=BETAS),
        ]

    def epoch(self, number: int) -> dict[str, float]:
        """A pass over the attacker's images; mean losses."""
        seed = (self.target.seed << 20) + number  # one of its own: an epoch that is run again draws what it drew
        order, options = torch.Generator().manual_seed(seed), self.options
        size = min(options.batch_size, len(self.own.train))
        batches = make_loader(self.own.train, size, shuffle=True, generator=order)
        total = torch.zeros(2, device=self.target.device)
        with isolated_random(seed, self.target.device):
            for step, (x, labels) in enumerate(batches, start=(number - 1) * len(batches)):
                height = (1 + math.cos(math.pi * step / (self.epochs * len(batches)))) / 2
                self.optimizers[0].param_groups[0]["lr"] = options.lr * (LAST_LR + (1 - LAST_LR) * height)
                total += self.step(x.to(self.target.device), labels.to(self.target.device))
        return dict(zip(("cross_entropy", "judge_loss"), (total / len(batches)).tolist(), strict=True))

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """On images ``[B, C, H, W]``; the server's loss and the discriminator's, ``[2]``."""
        self.model.encoder.train()
        z = self.model.encoder(images)
        queries = self.target.queries
        sent = sum((self.model.defense(z) for _ in range(queries - 1)), self.model.defense(z)) / queries
        served = F.cross_entropy(self.model.server(sent), labels)
        loss, judged = served, torch.zeros_like(served)
        if self.options.alignment:
            judged = self._judge_step(sent.detach(), labels)
            deceived = F.softplus(-self.judge((sent - self.center) / self.scale, labels)).mean()
            loss = served + self.options.alignment * deceived
        self._move(0, loss)
        return torch.stack([served, judged]).detach()

    def _judge_step(self, sent: Tensor, labels: Tensor) -> Tensor:
        drawn = torch.randint(len(self.heard), (len(sent),), device=sent.device)
        true = ((self.heard[drawn] - self.center) / self.scale).requires_grad_()
        verdict = self.judge(true, self.classes[drawn])
        (slope,) = torch.autograd.grad(verdict.sum(), true, create_graph=True)
        lie = self.judge((sent - self.center) / self.scale, labels)
        told = F.softplus(-verdict).mean() + F.softplus(lie).mean()
        self._move(1, told + slope.flatten(1).square().sum(1).mean() / 2)
        return told

    def _move(self, which: int, loss: Tensor) -> None:
        parameters = self.optimizers[which].param_groups[0]["params"]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.optimizers[which].step()

    def state(self) -> dict[str, Any]:
        """All that changes."""
        networks = {"shadow": self.model.encoder.state_dict(), "judge": self.judge.state_dict()}
        return {**networks, "optimizers": [each.state_dict() for each in self.optimizers]}

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self.model.encoder.load_state_dict(state["shadow"])
        self.judge.load_state_dict(state["judge"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


class _Judge(nn.Module):
    """Scores ``[B]`` of standardized features ``[B, *shape]`` given their class: high for those that went by."""

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        active = lambda layer: (layer, nn.LeakyReLU(0.2))  # noqa: E731
        if len(shape) == 3:
            channels, *side = shape
            self.body = nn.Sequential(
                *active(nn.Conv2d(channels, WIDTH, 3, padding=1)),
                *active(nn.Conv2d(WIDTH, WIDTH, 3, padding=1)),
                *active(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, stride=2)),
                nn.Flatten(),
            )
            width = WIDTH * math.prod(math.ceil(length / 2) for length in side)
        else:
            width = 4 * WIDTH
            self.body = nn.Sequential(*active(nn.Linear(shape[0], width)), *active(nn.Linear(width, width)))
        self.head = nn.Linear(width, 1 + num_classes)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        scores = self.head(self.body(z))
        return scores[:, 0] + scores.gather(1, 1 + labels[:, None])[:, 0]


def _begun_anew(encoder: nn.Sequential) -> nn.Sequential:
    """The same layers with weights of their own; of the target's, constants alone remain."""
    fresh = copy.deepcopy(encoder).requires_grad_(True)
    for module in fresh.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return fresh


def _without_reset(encoder: nn.Module) -> str | None:
    """The class of a layer whose own parameters would stay the target's, if there is one."""
    strangers = (
        module
        for module in encoder.modules()
        if next(module.parameters(recurse=False), None) is not None and not hasattr(module, "reset_parameters")
    )
    return next((type(module).__name__ for module in strangers), None)


def _bounded(target: Exposed) -> bool:
    """Whether the features that went by lie in [0, 1] but for the noise."""
    slack = 6 * (target.model.defense.sigma() or 0.0) / math.sqrt(target.queries)
    low, high = target.intercepted.aminmax()
    return -slack <= low.item() and high.item() <= 1 + slack


def _plain(image_shape: ImageShape, feature_shape: tuple[int, ...], bounded: bool) -> nn.Sequential:
    """A convolutional network from images to features, a map or a vector."""
    colors, *side = image_shape
    block = lambda inside, stride: (  # noqa: E731
        nn.Conv2d(inside, WIDTH, 3, stride, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
    )  # fmt: skip
    size = feature_shape[1:] or (4, 4)
    layers = [*block(colors, 1)]
    while all(length >= 2 * goal for length, goal in zip(side, size, strict=True)):
        layers, side = [*layers, *block(WIDTH, 2)], [math.ceil(length / 2) for length in side]
    layers += [*block(WIDTH, 1), nn.AdaptiveAvgPool2d(size)]
    if len(feature_shape) == 3:
        layers += [nn.Conv2d(WIDTH, feature_shape[0], 3, padding=1)]
    else:
        layers += [nn.Flatten(), nn.Linear(WIDTH * math.prod(size), feature_shape[0])]
    return nn.Sequential(*layers, *([nn.Sigmoid()] if bounded else []))


def _decoder(target: Exposed, options: QueryFree.Options) -> nn.Module:
    """Untrained."""
    with isolated_random(target.seed, target.device):
        return build_network(options.network, target.model.feature_shape, target.image_shape).to(target.device)
