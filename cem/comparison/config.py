"""The options of a comparison: what varies, what every training shares, what every attack shares."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from cem.attacks.config import AttackConfig
from cem.comparison.grid import GridOptions, Run
from cem.options import ConfigError, read_yaml
from cem.training.config import TrainConfig

SET_BY_THE_GRID = {"surrogate": "surrogates", "lambd": "lambds", "noise_std": "noise_stds", "seed": "seeds"}
"""Options of a training that the grid replaces, and what replaces them."""


@dataclass
class Comparison:
    """Everything that defines a comparison.

    Attributes:
        grid: what varies.
        train: options that all trainings share; those in :data:`SET_BY_THE_GRID` and ``out`` are ignored.
        attack: options that all attacks share; ``control`` is ignored: every run has its own.
        out: folder of the runs, the tables and the report.
    """

    grid: GridOptions = field(default_factory=GridOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    out: Path = Path("runs/compare")

    def run_dir(self, run: Run) -> Path:
        """Directory of one run."""
        return self.out / run.name

    def train_config(self, run: Run) -> TrainConfig:
        """The options of one training, without ``out``."""
        own = self.grid.options_of(run.setting.surrogate) | {
            "lambd": run.setting.lambd,
            "noise_std": run.setting.noise_std,
        }
        # from_dict: the shared options may be of a subclass, which the command line needs.
        values = TrainConfig.to_dict(self.train) | own
        return TrainConfig.from_dict(values | {"seed": run.seed, "out": None}).resolved()

    def attack_config(self) -> AttackConfig:
        """The options of every attack; device and data are the trainings' unless it has its own."""
        device = self.train.device if self.attack.device == "auto" else self.attack.device
        data_root = self.train.data_root if self.attack.data_root is None else self.attack.data_root
        values = AttackConfig.to_dict(self.attack) | {"device": device, "data_root": data_root, "control": None}
        return AttackConfig.from_dict(values)

    def validate(self) -> None:
        """Check all options that can be judged without loading anything.

        Raises:
            ConfigError: naming the option, what it takes and what it got.
        """
        self.grid.validate()
        for run in self.grid.runs():
            self.train_config(run).validate()
        try:
            self.attack_config().validate()
        except ConfigError as error:
            raise ConfigError(str(error).replace("--", "--attack.", 1)) from error

    def to_dict(self) -> dict[str, Any]:
        """The options as plain YAML values: those of grid and training side by side, the attack's under ``attack``."""
        train, attack = self.train.to_dict(), self.attack.to_dict()
        for name in (*SET_BY_THE_GRID, "out"):
            del train[name]
        del attack["control"]
        return self.grid.to_dict() | train | {"attack": attack}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Comparison:
        """Inverse of :meth:`to_dict`, but for ``out``; options that are absent keep their defaults.

        Raises:
            ConfigError: if a key is no option, or a value has the wrong type.
        """
        for name, instead in SET_BY_THE_GRID.items():
            if name in values:
                raise ConfigError(f"{name}: a comparison takes a list, {instead}")
        of_grid = {each.name for each in fields(GridOptions)}
        attack = values.get("attack") or {}
        if not isinstance(attack, dict):
            raise ConfigError(f"attack must hold a mapping of option names to values, got {attack!r}")
        rest = {name: value for name, value in values.items() if name not in of_grid and name != "attack"}
        return cls(
            grid=GridOptions.from_dict({name: value for name, value in values.items() if name in of_grid}),
            train=TrainConfig.from_dict(rest),
            attack=AttackConfig.from_dict(attack),
        )

    def to_yaml(self, path: Path, command: str) -> None:
        """Write all options to ``path``, under a comment with the command that they came from."""
        options = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=None)
        path.write_text(f"# {command}\n{options}", encoding="utf-8")

    @classmethod
    def from_yaml(cls, path: Path) -> Comparison:
        """Read options from ``path``; those that it does not name keep their defaults.

        Raises:
            ConfigError: if there is no such file, it is not YAML, or :meth:`from_dict` refuses what it holds.
        """
        values = read_yaml(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def command_of(path: Path) -> str | None:
    """The command in the first line of a file that :meth:`Comparison.to_yaml` wrote."""
    if not path.exists():
        return None
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first[2:] if first.startswith("# ") else None
