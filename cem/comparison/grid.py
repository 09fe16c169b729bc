"""Which runs a comparison consists of."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from cem.options import ConfigError, Options, option


@dataclass(frozen=True, order=True)
class Setting:
    """What is compared: one row of the table. Runs of one setting differ in their seed alone.

    Attributes:
        surrogate: ``"none"``, ``"gmm"`` or ``"attention"``.
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

    surrogates: tuple[Literal["none", "gmm", "attention"], ...] = ("none", "gmm", "attention")
    """Surrogates to compare. none is the control: every other one is set against it at the same noise and
    seed, so leaving it out leaves those columns empty."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds. A setting is trained once with each; what the table calls ± is the spread over them."""
    lambds: tuple[float, ...] = (16.0,)
    """Weights λ of the penalty. The surrogate none has no penalty and is run once, whatever is given here."""
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
        for name in ("surrogates", "seeds", "lambds", "noise_stds"):
            if not getattr(self, name):
                raise ConfigError(f"{option(name)} needs at least one value")
        for lambd in self.lambds:
            if not 0 < lambd < math.inf:
                raise ConfigError(
                    f"--lambds must be finite and above 0, got {lambd:g}; without a penalty is --surrogates none"
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
            for lambd in ((0.0,) if surrogate == "none" else self.lambds)
        ]

    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that a comparison that is stopped early has whole seeds to show."""
        return [Run(setting, seed) for seed in self.seeds for setting in self.settings()]
