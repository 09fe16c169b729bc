"""Networks that learn from the attacker's own images what features look like, and invert them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from cem.attacks.base import VAL, Attack, Exposed, Own, Progress, Record, seconds_of
from cem.attacks.fit import (
    PUBLISHED,
    Fitted,
    Schedule,
    decode,
    fit_network,
    one_step,
    seconds_of_training,
    usual_cycle,
)  # fmt: skip
from cem.attacks.losses import LOSSES
from cem.attacks.metrics import ssim_window
from cem.attacks.networks import NETWORK_NAMES, build_network, parse_network
from cem.errors import UsageError
from cem.options import Options as BaseOptions
from cem.options import option
from cem.training.evaluation import isolated_random


class Decoder(Attack["Decoder.Options"]):
    """Trains networks on pairs of image and features, and takes the one that does best on validation images.

    Under the squared error a decoder estimates the posterior mean, which no attacker who sees the same features can
    beat in that error; what it lacks is training and capacity.
    """

    name = "decoder"
    summary = "networks trained from features back to images"
    bounds = ("max_cycles",)
    first_look: ClassVar[Mapping[str, Any]] = {"networks": ("preactN2C32",), "cycle_epochs": 10, "max_cycles": 2}

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of decoders.

        Attributes:
            networks: Networks to train, as NETWORK or NETWORK:LOSS. preactN8C64 has 8 pre-activation residual blocks of
                64 channels, other numbers make smaller and larger ones; res_normN8C64 is the published one, layer for
                layer, deconvC64 has transposed convolutions only. Losses: mse (without LOSS), l1, ssim (1 - SSIM +
                MSE).
            schedule: How they are trained. cycles: Adam under cosine cycles, each twice as long as the one before,
                until one gains next to nothing. published: as in the CEM paper's code, 50 epochs of Adam from 1e-3 to
                1e-5, weight decay 1e-4, batch 256; the other options of decoders are not used.
            cycle_epochs: Passes over the attacker's images in the first cycle; without it, as many as make some 500
                steps, 1 to 5.
            max_cycles: Bound on the cycles: 5 of them are 31 times as long as the first. A network whose error was
                falling when the bound came is reported as not converged; with a larger bound, the same command goes on
                from there.
            tolerance: A network has converged when a cycle, twice as long as the one before, lowered the validation MSE
                by less than this fraction.
            batch_size: Images in a step.
            lr: Learning rate of Adam at the start of every cycle; it falls to a hundredth.
            amp: Train under bfloat16 autocast: up to three times faster where the processor has the instructions.
                Validation and scores are in fp32 all the same.
        """

        networks: tuple[str, ...] = option(("preactN4C64", "preactN4C64:ssim"))
        schedule: Literal["cycles", "published"] = option("cycles")
        cycle_epochs: int | None = option(None, least=1)
        max_cycles: int = option(5, least=1, most=20)
        tolerance: float = option(0.03, above=0)
        batch_size: int = option(64, least=1)
        lr: float = option(0.002, above=0)
        amp: bool = option(False)

        def check(self) -> None:
            """What no option can say alone."""
            if not self.networks:
                raise UsageError("--decoder.networks needs at least one NETWORK or NETWORK:LOSS")
            parsed = [parse(name) for name in self.networks]
            twice = next((each for each in parsed if parsed.count(each) > 1), None)
            if twice is not None:
                raise UsageError(f"--decoder.networks takes every network and loss once, got {':'.join(twice)} twice")

        def training(self, images: int) -> Schedule:
            """The schedule that they describe, for so many images to learn from."""
            if self.schedule == "published":
                return PUBLISHED
            first = self.cycle_epochs or usual_cycle(images, self.batch_size)
            rest = self.max_cycles, self.tolerance, self.batch_size, self.lr, self.lr / 100
            return Schedule(first, *rest, amp=self.amp)

    def check(self, target: Exposed, own: Own, options: Options) -> None:
        """SSIM is not defined for tiny images."""
        if ssim_window(*target.image_shape[1:]) is None and "ssim" in {parse(each)[1] for each in options.networks}:
            raise UsageError(f"--decoder.networks: there is no SSIM for images of {target.image_shape[1:]} pixels")

    def forecast(self, target: Exposed, own: Own, options: Options) -> float:
        """See :class:`Attack`."""
        return sum(self._costs(target, own, options).values())

    def run(self, target: Exposed, own: Own, options: Options, progress: Progress) -> Record:
        """See :class:`Attack`."""
        costs, schedule, done = self._costs(target, own, options), options.training(len(own.train)), 0.0
        fitted: dict[str, Fitted] = {}
        guesses, facts = {}, []
        for name in options.networks:
            share = costs[name] / sum(costs.values())

            def report(epoch: int, start: float = done, share: float = share, name: str = name) -> None:
                progress.show(start + share * epoch / schedule.epochs(), f"{name}, epoch {epoch}/{schedule.epochs()}")

            network = self._untrained(target, name)
            fit = fitted[name] = fit_network(
                target.model, network, parse(name)[1], own, target.sent[VAL], schedule, queries=target.queries,
                seed=target.seed, progress=progress, name=f"{self.name}-{_slug(name)}", report=report,
            )  # fmt: skip
            done += share
            progress.show(done, name)
            guesses[name] = {each: decode(fit.network, sent) for each, sent in target.sent.items()}
            facts.append(_facts(name, fit))
            progress.log.info(
                f"{name}: validation MSE {fit.val_mse:.5f} after {len(fit.curve)} epochs; {_state(fit, options)}"
            )
        best = min(fitted, key=lambda each: fitted[each].val_mse)
        network, note = fitted[best].network, _state(fitted[best], options)
        return Record(
            guesses,
            {
                "network": best,
                "converged": fitted[best].converged,
                "note": "" if fitted[best].converged else f"{best} {note}",
                "extrapolated_gain": fitted[best].extrapolated_gain,
                "curves": facts,
            },
            network,
        )

    def _untrained(self, target: Exposed, name: str) -> nn.Module:
        with isolated_random(target.seed, target.device):
            return build_network(parse(name)[0], target.model.feature_shape, target.image_shape).to(target.device)

    def _costs(self, target: Exposed, own: Own, options: Options) -> dict[str, float]:
        """Seconds by network."""
        schedule, costs = options.training(len(own.train)), {}
        for name in options.networks:
            with isolated_random(target.seed, target.device):
                network = self._untrained(target, name)
                step = one_step(target.model, network, parse(name)[1], own.train, schedule, target.queries)
                costs[name] = seconds_of_training(own, schedule, seconds_of(step))
        return costs


def parse(name: str) -> tuple[str, str]:
    """``"preactN8C64:ssim"`` → ``("preactN8C64", "ssim")``; the loss is ``mse`` if it is left out.

    Raises:
        UsageError: there is no such network or loss.
    """
    network, _, loss = name.partition(":")
    loss = loss or "mse"
    if loss not in LOSSES:
        raise UsageError(f"--decoder.networks {name}: the loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    try:
        parse_network(network)
    except ValueError:
        raise UsageError(f"--decoder.networks {name}: networks are named like {NETWORK_NAMES}") from None
    return network, loss


def _slug(name: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", name)


def _facts(name: str, fit: Fitted) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in fit.network.members[0].parameters()),
        "averaged": len(fit.network.members),
        "epochs": len(fit.curve),
        "best_epoch": fit.best_epoch,
        "val_mse": fit.val_mse,
        "converged": fit.converged,
        "gains": fit.gains,
        "extrapolated_gain": fit.extrapolated_gain,
        "seconds": fit.seconds,
        "curve": fit.curve,
    }


def _state(fit: Fitted, options: Decoder.Options) -> str:
    """Whether a network had converged, and what to do if not."""
    if fit.converged is None:
        return "was trained for the published number of epochs, converged or not"
    if fit.converged:
        return "converged"
    more, gain = options.max_cycles + 1, fit.extrapolated_gain
    hope = "" if gain is None else f", and endless training might lower its MSE by {gain:.0%}"
    return f"had not converged: --decoder.max-cycles {more} would give it another one{hope}"
