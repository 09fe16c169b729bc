"""Which runs a comparison consists of."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from typing import Any, ClassVar

import yaml

from cem.errors import UsageError
from cem.models import parse_bottleneck
from cem.options import Composed, flag, hints, nearest, option
from cem.surrogates import COMPARED, CONTROL, RECOMMENDED, SURROGATES
from cem.terms import Family
from cem.training.config import TrainConfig

OF_CLIENT = ("cut_layer", "adapter", "bottleneck")
"""Options of a training that say what the client computes."""
NOT_OF_A_VARIANT = (*OF_CLIENT, "noise_std", "seed", "out", "device", "data", "data_root", "profile_steps")
"""Options of a training that the grid or the comparison decides, so that runs can be set against each other."""

_grid = partial(option, group="what varies")
_client = partial(option, group="what varies of the client")
_FORM = "such as 'strong: {surrogate: NAME, lambd: [1, 2]}'"


@dataclass(frozen=True, order=True)
class Client:
    """What the client computes: options of ``cem.train`` of the same names, with their defaults."""

    cut_layer: int = TrainConfig.cut_layer
    adapter: int = TrainConfig.adapter
    bottleneck: str = TrainConfig.bottleneck

    @property
    def parts(self) -> list[str]:
        """Those that are not at their defaults, in words: ``["cut 2", "adapter 1"]``."""
        default = Client()
        given = ((name, getattr(self, name)) for name in OF_CLIENT if getattr(self, name) != getattr(default, name))
        return [f"{name.removesuffix('_layer')} {value}" for name, value in given]

    def __str__(self) -> str:
        return ", ".join(self.parts) or "defaults"


@dataclass(frozen=True, order=True)
class Setting:
    """What is compared: one row of the table. Runs of one setting differ in their seed alone.

    Attributes:
        method: a surrogate's name, or that of a variant.
        lambd: weight λ of the penalty; 0 for the control.
        noise_std: standard deviation σ of the noise on the features.
        client: what computes the features.
    """

    method: str
    lambd: float
    noise_std: float
    client: Client = Client()

    @property
    def level(self) -> str:
        """What it shares with the settings that it can be set against: noise and client, as ``"σ 0.3, adapter 1"``."""
        return ", ".join([f"σ {self.noise_std:g}", *self.client.parts])

    @property
    def is_control(self) -> bool:
        """Whether it has no penalty, and the others are set against it."""
        return self.method == CONTROL

    def __str__(self) -> str:
        weight = f" λ {self.lambd:g}" if self.lambd else ""
        return f"{self.method}{weight}, {self.level}"


@dataclass(frozen=True)
class Run:
    """One training and the attack on it."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Name of its directory, such as ``"wide-lambd16-noise0.3-seed0"``.

        Without λ for the control; with what of the client is not at its default, as in ``"none-cut2-noise0.3-seed0"``.
        """
        setting = self.setting
        weight = f"-lambd{setting.lambd:g}" if setting.lambd else ""
        client = "".join(f"-{part}" for part in setting.client.parts).replace(" ", "")
        return f"{setting.method}{weight}{client}-noise{setting.noise_std:g}-seed{self.seed}"


@dataclass(frozen=True)
class GridOptions(Composed):
    """What varies between the runs, and how many of them run at a time.

    ``members`` holds the options of surrogates, which all runs of them share.

    Attributes:
        surrogates: Surrogates to compare, and names of --variants. The control is the one without a penalty: every
            other one is set against it at the same noise, client and seed, so without it those columns are empty.
        variants: Sets of options of cem.train under a name that --surrogates can take, as YAML, such as
            'strong: {surrogate: NAME, lambd: [1, 2]}'. One that sets lambd, a number or a list of them, is run with
            these weights instead of --lambds: surrogates differ in what a weight means.
        seeds: A setting is trained once with each; what the table calls ± is the spread over them.
        lambds: Weights λ of the penalty; every surrogate is run with each of them. Without it: each surrogate's own, as
            in cem.train. The control has no penalty and is run once, and variants may bring weights of their own.
        noise_stds: Standard deviations σ of the noise on z. Noise alone defends too: with several of them, the table
            and the trade-off plot show whether a surrogate is worth more than more noise.
        cut_layer: Stages of the network that the client keeps; as the next two, one or several. With several clients
            the report draws what each buys for what it costs, and methods are compared behind the same one.
        adapter: Residual 3x3 convolutions that the client has between cut and bottleneck.
        bottleneck: Narrow layers behind both, [noRELU_][Kk]CcSs (kernel k, channels c, stride s), or none.
        jobs: Runs at a time. Each gets its share of the processor cores (OMP_NUM_THREADS, unless that is set). On two
            cores, two processes of one thread are 1.2 times as fast as one of two threads after the other. Seconds in
            the table are then those of a run that had company.
    """

    families: ClassVar[Mapping[str, Family[Any]]] = {"surrogates": SURROGATES}

    surrogates: tuple[str, ...] = _grid(COMPARED)
    variants: tuple[str, ...] = _grid(())
    seeds: tuple[int, ...] = _grid((0, 1, 2), least=0)
    lambds: tuple[float, ...] = _grid((), least=0)
    noise_stds: tuple[float, ...] = _grid((0.3,), least=0)
    cut_layer: tuple[int, ...] = _client((Client.cut_layer,), least=1)
    adapter: tuple[int, ...] = _client((Client.adapter,), least=0, most=100)
    bottleneck: tuple[str, ...] = _client((Client.bottleneck,))
    jobs: int = option(1, least=1, group="how it is run")

    def chosen(self) -> dict[str, Any]:
        """The surrogates that runs are trained with by their own names; those of variants among them."""
        wanted = [own["surrogate"] for own in (*self.methods().values(), *self.defined().values())]
        return {member.name: member for member in (SURROGATES[name] for name in wanted)}

    def methods(self) -> dict[str, dict[str, Any]]:
        """What every method sets in a training, by its name: a variant's, or that of a surrogate."""
        variants = self.defined()
        return {_own_name(name, variants): variants.get(name, {"surrogate": name}) for name in self.surrogates}

    def defined(self) -> dict[str, dict[str, Any]]:
        """What every variant sets, by its name.

        Raises:
            UsageError: one cannot be read, or sets what it may not.
        """
        return dict(map(_variant, self.variants))

    def _own_names(self, place: str) -> Any:
        variants = self.defined()
        return tuple(name if ":" in name else _own_name(name, variants) for name in self.surrogates)

    def check(self) -> None:
        """What no option can say alone."""
        for name in ("surrogates", "seeds", "noise_stds", *OF_CLIENT):
            if not getattr(self, name):
                raise UsageError(f"{flag(name)} needs at least one value")
        for each in self.bottleneck:
            parse_bottleneck(each)
        unused = self.defined().keys() - {*self.surrogates}
        if unused:
            raise UsageError(f"--variants: no run has {min(unused)}; give it to --surrogates, or leave it out")
        for setting in self.settings():
            free = self.training_of(setting.method)["surrogate"] == CONTROL
            if not free and not 0 < setting.lambd < math.inf:
                name = "--lambds" if setting.lambd in self.lambds else f"lambd of {setting.method}"
                raise UsageError(
                    f"{name} must be finite and above 0, got {setting.lambd:g}; without a penalty is "
                    f"--surrogates {CONTROL}"
                )
        variants = [_variant(text)[0] for text in self.variants]
        given = ([run.name for run in self.runs()], self.surrogates, variants)
        twice = [name for names in given for name, times in Counter(names).items() if times > 1]
        if twice or len(self.methods()) < len(self.surrogates):
            twice = twice or list(self.methods())
            raise UsageError(f"two runs would be called {twice[0]}; give every value once, with at most 6 digits")

    def to_dict(self) -> dict[str, Any]:
        """See :class:`~cem.options.Options`; variants are a mapping."""
        return super().to_dict() | {"variants": self.defined()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], prefix: str = "") -> GridOptions:
        """Inverse of :meth:`to_dict`; variants may also be a list of texts, as on the command line, and what says what
        the client computes a single value, as for a training."""
        given = dict(values)
        given |= {name: [given[name]] for name in OF_CLIENT if isinstance(given.get(name), int | str)}
        if isinstance(given.get("variants"), Mapping):
            given["variants"] = tuple(
                yaml.safe_dump({name: own}, default_flow_style=True, width=math.inf).strip()
                for name, own in given["variants"].items()
            )
        return super().from_dict(given)

    def settings(self) -> list[Setting]:
        """The rows of the table: by client and noise, and within both in the order of ``surrogates`` and ``lambds``."""
        return [
            Setting(method, lambd, noise_std, Client(*client))
            for client in product(self.cut_layer, self.adapter, self.bottleneck)
            for noise_std in self.noise_stds
            for method in self.methods()
            for lambd in self._lambds_of(method)
        ]

    def training_of(self, method: str) -> dict[str, Any]:
        """What a method sets in a training, with the options that all runs of its surrogate share."""
        own = dict(self.methods()[method])
        name = SURROGATES[own["surrogate"]].name
        shared = self.members[name].to_dict() if name in self.members else {}
        options = shared | dict(own.pop(name, {}))
        return own | ({name: options} if options else {})

    def _lambds_of(self, method: str) -> tuple[float, ...]:
        training = self.training_of(method)
        if training["surrogate"] == CONTROL:
            return (0.0,)
        own = training.get("lambd")
        if own is None:
            return self.lambds or (SURROGATES[training["surrogate"]].Options.weight,)
        try:
            weights = tuple(map(float, own if isinstance(own, list) else [own]))
            return weights or (math.nan,)
        except (TypeError, ValueError):
            raise UsageError(f"lambd of {method} takes a number or a list of them, got {own!r}") from None

    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that a comparison that is stopped early has whole seeds to show."""
        return [Run(setting, seed) for seed in self.seeds for setting in self.settings()]


def _own_name(method: str, variants: Iterable[str]) -> str:
    """What a method is called: a variant, or a surrogate that may have been given by another name.

    Raises:
        UsageError: there is none.
    """
    if method in variants:
        return method
    try:
        return SURROGATES[method].name
    except UsageError as error:
        raise UsageError(f"{error}{nearest(method, variants)}") from None


def _variant(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a variant.

    Raises:
        UsageError: it is not YAML of this form, its name cannot be a file's, or it sets what it may not.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--variants takes YAML {_FORM}, got {text!r}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or len(content) != 1 or not isinstance(next(iter(content.values())), dict):
        raise UsageError(f"--variants takes a name and its options, {_FORM}, got {text!r}")
    ((name, options),) = content.items()
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.]*", name) or name in SURROGATES:
        raise UsageError(
            f"--variants: a name has letters, digits, _ and ., begins with a letter, and is none of "
            f"{', '.join(SURROGATES)}; got {name!r}"
        )
    surrogate = options.get("surrogate", RECOMMENDED)
    if not isinstance(surrogate, str):
        raise UsageError(f"--variants: surrogate of {name} must be a name, got {surrogate!r}")
    # Options of members are judged where the training's are.
    known = {each.name for each in fields(TrainConfig)} - set(NOT_OF_A_VARIANT)
    for key, value in options.items():
        if key not in known and not isinstance(value, Mapping):
            why = ": it is set for the whole comparison" if key in NOT_OF_A_VARIANT else nearest(str(key), known)
            if surrogate in SURROGATES and key in hints(SURROGATES[surrogate].Options):
                why = f": it is an option of its surrogate, so write {surrogate}: {{{key}: {value}}}"
            raise UsageError(f"--variants: {name} cannot set {key!r}{why}")
    return name, {"surrogate": surrogate, **options}
