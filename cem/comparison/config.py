"""The options of a comparison: what varies, what every training shares, what every attack shares."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from cem.attacks import ATTACKS
from cem.attacks.config import AttackConfig
from cem.comparison.grid import OF_CLIENT, GridOptions, Run
from cem.defenses import DEFENSES
from cem.errors import CemError, UsageError
from cem.files import write_text
from cem.options import FORMAT, hints, read_yaml
from cem.surrogates import CONTROL
from cem.training.config import TrainConfig

SET_BY_THE_GRID = {"surrogate": "surrogates", "lambd": "lambds", "noise_std": "noise_stds", "seed": "seeds"}
"""Options of a training that the grid replaces, and what replaces them."""
NOT_SHARED = (*SET_BY_THE_GRID, *OF_CLIENT, "out")
"""Options of a training that a comparison does not have."""


@dataclass(frozen=True)
class Comparison:
    """Everything that defines a comparison.

    Attributes:
        grid: what varies.
        train: options that all trainings share; those in :data:`NOT_SHARED` are ignored.
        attack: options that all attacks share, with those of the attacks themselves; ``control`` is ignored: every run
            has its own.
        out: folder of the runs, the tables and the report.
    """

    grid: GridOptions = field(default_factory=GridOptions)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(surrogate=CONTROL))
    attack: AttackConfig = field(default_factory=AttackConfig)
    out: Path = Path("runs/compare")

    def run_dir(self, run: Run) -> Path:
        """Directory of one run."""
        return self.out / run.name

    def train_config(self, run: Run) -> TrainConfig:
        """The options of one training, without ``out``."""
        setting = run.setting
        own = self.grid.training_of(setting.method) | {"lambd": setting.lambd, "noise_std": setting.noise_std}
        own |= asdict(setting.client)
        shared = self._shared(own)
        for name, value in own.items():
            if isinstance(value, Mapping) and isinstance(shared.get(name), Mapping):
                own[name] = {**shared[name], **value}
        return TrainConfig.from_dict(shared | own | {"seed": run.seed}).resolved()

    def attack_config(self) -> AttackConfig:
        """The options of every attack; device and data are the trainings' unless it has its own."""
        device = self.train.device if self.attack.device == "auto" else self.attack.device
        data_root = self.train.data_root if self.attack.data_root is None else self.attack.data_root
        return replace(self.attack, device=device, data_root=data_root, control=None)

    def checked(self) -> Comparison:
        """The same, with all options checked that can be judged without loading anything.

        Raises:
            UsageError: naming the option, what it takes and what it got.
        """
        with self.of_attack():
            attack = self.attack.checked()
        checked = replace(self, grid=self.grid.checked(), attack=attack, out=self.out.expanduser())
        for run in checked.grid.runs():
            with checked.naming(run):
                checked.train_config(run).checked()
        return checked

    @contextmanager
    def of_attack(self) -> Iterator[None]:
        """Around what may be wrong with the options of attacks: errors name them as a comparison does."""
        known = {*hints(AttackConfig), *ATTACKS, *self.attack.members}

        def here(found: re.Match[str]) -> str:
            first = found[1].partition(".")[0]
            return f"--attack.{found[1]}" if known & {first, first.replace("-", "_")} else found[0]

        try:
            yield
        except UsageError as error:
            raise UsageError(re.sub(r"--([\w.-]+)", here, str(error))) from error

    @contextmanager
    def naming(self, run: Run) -> Iterator[None]:
        """Around what may be wrong with the options of a run: of a variant, errors give the name."""
        try:
            yield
        except CemError as error:
            if run.setting.method not in self.grid.defined():
                raise
            raise type(error)(f"--variants: {run.setting.method}: {error}") from error

    def _shared(self, own: Mapping[str, Any] = {}) -> dict[str, Any]:
        """Options of all trainings, but for those of defenses that ``own`` leaves out; surrogates' are the grid's."""
        defenses = TrainConfig.from_dict({"defenses": own.get("defenses", self.train.defenses)}).defenses
        shared = replace(self.train, surrogate=CONTROL, defenses=defenses).to_dict()
        return {name: value for name, value in shared.items() if name not in NOT_SHARED}

    def to_dict(self) -> dict[str, Any]:
        """The options as plain YAML values: those of grid and training side by side, the attack's under ``attack``."""
        attack = {name: value for name, value in self.attack.to_dict().items() if name != "control"}
        return self.grid.to_dict() | self._shared() | {"attack": attack}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Comparison:
        """Inverse of :meth:`to_dict`, but for ``out``; options that are absent keep their defaults.

        Raises:
            UsageError: if a key is no option, or a value has the wrong type.
        """
        for name, instead in SET_BY_THE_GRID.items():
            if name in values:
                raise UsageError(f"{name}: a comparison takes a list, {instead}")
        attack = values.get("attack") or {}
        if not isinstance(attack, dict):
            raise UsageError(f"attack must hold a mapping of option names to values, got {attack!r}")
        try:
            attack_config = AttackConfig.from_dict(attack)
        except UsageError as error:
            raise UsageError(f"attack: {error}") from error
        defenses = TrainConfig.from_dict({"surrogate": CONTROL, "defenses": values.get("defenses", [])}).chosen()
        of_train = {*hints(TrainConfig), *DEFENSES, *defenses} - {*OF_CLIENT}
        train = {name: value for name, value in values.items() if name in of_train}
        grid = {name: value for name, value in values.items() if name not in of_train and name != "attack"}
        return cls(
            grid=GridOptions.from_dict(grid),
            train=TrainConfig.from_dict({"surrogate": CONTROL, **train}),
            attack=attack_config,
        )

    def to_yaml(self, path: Path, command: str) -> None:
        """Write all options to ``path``, under a comment with the command that they came from."""
        content = {"format": FORMAT, **self.to_dict()}
        options = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)
        write_text(path, f"# {' '.join(command.split(chr(10)))}\n{options}")

    @classmethod
    def from_yaml(cls, path: Path) -> Comparison:
        """Read options from ``path``; those that it does not name keep their defaults.

        Raises:
            UsageError: if there is no such file, it is not YAML, or :meth:`from_dict` refuses what it holds.
        """
        values = read_yaml(path)
        try:
            return cls.from_dict({name: value for name, value in values.items() if name != "format"})
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error


def command_of(path: Path) -> str | None:
    """The command in the first line of a file that :meth:`Comparison.to_yaml` wrote."""
    if not path.exists():
        return None
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first[2:] if first.startswith("# ") else None
