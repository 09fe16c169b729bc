"""Which runs a comparison consists of."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import yaml

from cem.options import ConfigError, Options, option
from cem.surrogates import SURROGATES
from cem.training.config import OWN_WEIGHT, TrainConfig
from cem.training.presets import PRESETS

NOT_OF_A_VARIANT = ("noise_std", "seed", "out", "device", "data", "data_root", "profile_steps")
"""Options of a training that the grid or the comparison decides, so that runs can be set against each other."""


@dataclass(frozen=True, order=True)
class Setting:
    """What is compared: one row of the table. Runs of one setting differ in their seed alone.

    Attributes:
        surrogate: ``"none"``, ``"gmm"``, ``"attention"``, or the name of a preset or a variant.
        lambd: weight λ of the penalty; 0 for ``"none"``.
        noise_std: standard deviation σ of the noise on the features.
    """

    surrogate: str
    lambd: float
    noise_std: float

    def __str__(self) -> str:
        weight = "" if self.surrogate == "none" else f" λ {self.lambd:g}"
        return f"{self.surrogate}{weight}, σ {self.noise_std:g}"


@dataclass(frozen=True)
class Run:
    """One training and the attack on it."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Name of its directory: ``"gmm-lambd16-noise0.1-seed0"``; λ is left out for ``none``."""
        surrogate, lambd, noise = self.setting.surrogate, self.setting.lambd, self.setting.noise_std
        weight = "" if surrogate == "none" else f"-lambd{lambd:g}"
        return f"{surrogate}{weight}-noise{noise:g}-seed{self.seed}"


@dataclass
class GridOptions(Options):
    """What varies between the runs, and how many of them run at a time."""

    surrogates: tuple[str, ...] = ("none", "gmm", "attention")
    """Surrogates to compare: none, gmm, attention, seed (the preset of cem.train), or one of VARIANTS. none is the
    control: every other one is set against it at the same noise and seed, so leaving it out leaves those columns
    empty."""
    variants: tuple[str, ...] = ()
    """More of them, each a name and what it sets in cem.train, as YAML: "wide: {preset: seed, tokens: spatial}".
    They are attention unless they set surrogate or preset. One that sets lambd, a number or a list of them, is run with
    these weights instead of LAMBDS: surrogates differ in what a weight means."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds. A setting is trained once with each; what the table calls ± is the spread over them."""
    lambds: tuple[float, ...] = ()
    """Weights λ of the penalty; none: that which each surrogate has in cem.train. Not of those that bring their own:
    seed, and VARIANTS that set lambd or preset. The surrogate none has no penalty and is run once."""
    noise_stds: tuple[float, ...] = (0.1,)
    """Standard deviations σ of the noise on z. Noise alone defends too: with several of them, the table and
    the trade-off plot show whether a surrogate is worth more than more noise."""
    jobs: int = 1
    """Runs at a time. Each gets its share of the processor cores (OMP_NUM_THREADS, unless that is set).
    On two cores, two processes of one thread are 1.2 times as fast as one of two threads after the other.
    Seconds in the table are then those of a run that had company."""

    def validate(self) -> None:
        """Check values and their types.

        Raises:
            ConfigError: naming the option, what it takes and what it got.
        """
        self.convert()
        for surrogate in self.surrogates:
            self.options_of(surrogate)
        for name in ("surrogates", "seeds", "noise_stds"):
            if not getattr(self, name):
                raise ConfigError(f"{option(name)} needs at least one value")
        for setting in self.settings():
            if setting.surrogate != "none" and not 0 < setting.lambd < math.inf:
                name = "--lambds" if setting.lambd in self.lambds else f"lambd of {setting.surrogate}"
                raise ConfigError(
                    f"{name} must be finite and above 0, got {setting.lambd:g}; without a penalty is --surrogates none"
                )
        if self.jobs < 1:
            raise ConfigError(f"--jobs must be at least 1, got {self.jobs}")
        twice = [name for name, times in Counter(run.name for run in self.runs()).items() if times > 1]
        if twice:
            raise ConfigError(f"two runs would be called {twice[0]}; give every value once, with at most 6 digits")

    def settings(self) -> list[Setting]:
        """The rows of the table: by noise, and within a noise in the order of ``surrogates`` and ``lambds``."""
        return [
            Setting(surrogate, lambd, noise_std)
            for noise_std in self.noise_stds
            for surrogate in self.surrogates
            for lambd in self._lambds_of(surrogate)
        ]

    def options_of(self, surrogate: str) -> dict[str, Any]:
        """What a surrogate's name sets in a training.

        Raises:
            ConfigError: there is no such surrogate, preset or variant, or a variant cannot be read.
        """
        variants = dict(map(_variant, self.variants))
        if surrogate in variants:
            own = dict(variants[surrogate])
            return {"surrogate": "attention", **PRESETS.get(own.pop("preset", ""), {}), **own}
        if surrogate in SURROGATES:
            return {"surrogate": surrogate}
        if surrogate in PRESETS:
            return PRESETS[surrogate]
        known = ", ".join(dict.fromkeys((*reversed(SURROGATES), *PRESETS, *variants)))
        raise ConfigError(f"--surrogates takes {known}, got {surrogate!r}; --variants defines others")

    def _lambds_of(self, surrogate: str) -> tuple[float, ...]:
        if surrogate == "none":
            return (0.0,)
        options = self.options_of(surrogate)
        own = options.get("lambd")
        if own is None:
            # An unknown surrogate is refused where its options are judged.
            return self.lambds or (OWN_WEIGHT.get(options["surrogate"], 1.0),)
        try:
            return tuple(map(float, own if isinstance(own, list) else [own]))
        except (TypeError, ValueError):
            raise ConfigError(f"lambd of {surrogate} takes a number or a list of them, got {own!r}") from None

    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that a comparison that is stopped early has whole seeds to show."""
        return [Run(setting, seed) for seed in self.seeds for setting in self.settings()]


def _variant(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a variant.

    Raises:
        ConfigError: it is not YAML of this form, its name cannot be a file's, or it sets what it may not.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--variants takes YAML such as 'wide: {{preset: seed, tokens: spatial}}', got {text!r}: {error}"
        ) from error
    if not isinstance(content, dict) or len(content) != 1 or not isinstance(next(iter(content.values())), dict):
        raise ConfigError(
            f"--variants takes a name and its options, such as 'wide: {{preset: seed, tokens: spatial}}', got {text!r}"
        )
    ((name, options),) = content.items()
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.]*", name) or name in SURROGATES:
        raise ConfigError(
            f"--variants: a name has letters, digits, _ and ., begins with a letter, and is none of "
            f"{', '.join(SURROGATES)}; got {name!r}"
        )
    known = {"preset", *(each.name for each in fields(TrainConfig))} - set(NOT_OF_A_VARIANT)
    if wrong := [key for key in options if key not in known]:
        raise ConfigError(f"--variants: {name} cannot set {wrong[0]!r}")
    if "preset" in options and options["preset"] not in PRESETS:
        raise ConfigError(
            f"--variants: preset of {name} must be one of {', '.join(PRESETS)}, got {options['preset']!r}"
        )
    return name, options
