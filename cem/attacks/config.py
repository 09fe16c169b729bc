"""What every attack on a run has in common: which attacks, with what knowledge, judged on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from cem.attacks import ATTACKS, DEFAULT
from cem.errors import UsageError
from cem.options import Composed, differences, option, resolve_device
from cem.terms import Family

_attacks = partial(option, group="attacks")
_images = partial(option, group="what the attacker has")
_run = partial(option, group="run")


@dataclass(frozen=True)
class AttackConfig(Composed):
    """The options of the attacks on one trained run.

    Constructing one checks nothing; :meth:`checked` does.

    Attributes:
        attacks: Attacks to try; the worst case over them counts, metric by metric. Or package.module:Class, one of
            yours.
        knowledge: Which images attackers learn from: auxiliary, images of the same kind that the target never trained
            on; training, the target's own training images, as published tables assume. With both, each has a directory.
        queries: The attacker sees every image this many times and averages: independent noise falls to σ²/QUERIES. A
            defense that is noise alone gives way; one that keeps little of the image does not.
        aux_size: Learn from this many images; without it, from all that there are.
        score_size: Every attack reconstructs and is scored on this many unseen images, and on a quarter as many that
            the target was trained on; all, if there are fewer.
        control: A run without a penalty under the same noise, attacked before in the same way, whose figures stand
            beside this one's, and to which the information is related. Without it: one beside this run, if there is
            any.
        data_root: Folder of the data set, if it is no longer where the run had it.
        seed: Seed of networks' weights, order of images, noise, and everything else that is random.
        device: Where to compute: auto (CUDA if there is one), cpu, cuda, cuda:1, ...
    """

    families: ClassVar[Mapping[str, Family[Any]]] = {"attacks": ATTACKS}

    attacks: tuple[str, ...] = _attacks(DEFAULT)
    knowledge: tuple[Literal["auxiliary", "training"], ...] = _images(("auxiliary",))
    queries: int = _images(1, least=1)
    aux_size: int | None = _images(None, least=1)
    score_size: int = _run(500, least=1)
    control: Path | None = _run(None, harmless=True)
    data_root: Path | None = _run(None, harmless=True)
    seed: int = _run(0, least=0, below=2**32)
    device: str = _run("auto", harmless=True)

    def check(self) -> None:
        """What no option can say alone."""
        for place in ("attacks", "knowledge"):
            if not getattr(self, place):
                raise UsageError(f"--{place} needs at least one")
        if len({*self.knowledge}) < len(self.knowledge):
            raise UsageError(f"--knowledge takes every name once, got {' '.join(self.knowledge)}")
        for name, member in self.chosen().items():
            if member.required and (missing := [each for each in member.needs if each not in self.chosen()]):
                raise UsageError(f"--attacks {name} starts from {missing[0]}; give --attacks {missing[0]} {name}")
        resolve_device(self.device)

    @property
    def trained_size(self) -> int:
        """How many images that the target was trained on are scored: a quarter as many as unseen ones."""
        return max(1, self.score_size // 4)

    def first_look(self) -> AttackConfig:
        """The same, each attack with the options with which it is soon done."""
        chosen = self.chosen()
        own = {name: replace(self.options_of(name), **member.first_look) for name, member in chosen.items()}
        return replace(self, members=own)

    def of_each_knowledge(self) -> list[AttackConfig]:
        """The options of one attack for every kind of knowledge."""
        return [replace(self, knowledge=(each,)) for each in self.knowledge]

    @property
    def directory(self) -> str:
        """Name of the directory inside the run's, unless it is asked for elsewhere; of one kind of knowledge."""
        (knowledge,) = self.knowledge
        return (
            "attack"
            + ("" if knowledge == "auxiliary" else f"-{knowledge}")
            + ("" if self.queries == 1 else f"-queries{self.queries}")
        )

    def changed(self, after: AttackConfig) -> list[str]:
        """Describe the options that decide numbers and differ: ``["--seed (was 0, got 1)"]``.

        More attacks, and larger bounds of those that there are, go on from what there is, and do not count.
        """
        before = self
        if {*self.attacks} <= {*after.attacks}:
            old = {name: own for name, own in after.members.items() if name not in self.attacks}
            before = replace(self, attacks=after.attacks, members={**old, **self.members})
        for name, member in self.chosen().items():
            if name in after.chosen():
                ours, theirs = before.options_of(name), after.options_of(name)
                grown = {each: max(getattr(ours, each), getattr(theirs, each)) for each in member.bounds}
                before = replace(before, members={**before.members, name: replace(ours, **grown)})
        return differences(before, after, ("device", "data_root", "control"))
