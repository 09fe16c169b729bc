"""The undefended run beside a defended one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cem.attacks.config import AttackConfig
from cem.attacks.target import Target
from cem.options import ConfigError
from cem.training.config import OF_THE_PENALTY, TrainConfig, changed_options


def read_control(run_dir: Path, target: Target, attack: AttackConfig, attack_name: str) -> dict[str, Any]:
    """The ``attack.json`` of the control run in ``run_dir``, its name in ``run`` ``name``.

    Args:
        run_dir: a run without a penalty, on the same data and under the same noise, that was attacked alike.
        target: the run that it stands beside.
        attack: the options of the attack on ``target``.
        attack_name: the attack's directory in ``run_dir``.

    Raises:
        ConfigError: there is no such attack, or what it says cannot be set beside ``target``.
    """
    path = run_dir / attack_name / "attack.json"
    try:
        control = json.loads(path.read_text(encoding="utf-8"))
        options = TrainConfig.from_yaml(run_dir / "config.yaml")
        changed = AttackConfig.from_dict(control["config"]).changed(attack)
        same_data = control["data_checksum"] == target.data_checksum
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--control {run_dir} has no finished attack: {error}") from error
    if options.penalized:
        raise ConfigError(f"--control {run_dir} is no control: it was trained with a penalty, {options.surrogate}")
    if not same_data:
        raise ConfigError(f"--control {run_dir} was attacked on other images, or has another --train-size")
    noise_std = control["run"]["noise_std"]
    if noise_std != target.noise_std:
        raise ConfigError(f"--control {run_dir} has other noise: σ is {noise_std:g} there, {target.noise_std:g} here")
    if changed:
        raise ConfigError(f"--control {run_dir} was attacked under other options: {', '.join(changed)}")
    return control


def find_control(target: Target, attack: AttackConfig, attack_name: str) -> dict[str, Any] | None:
    """The control among the directories beside the run, see :func:`read_control`.

    It was trained without a penalty, and otherwise under the same options.

    Returns:
        ``None`` if there is none, or if the run has no penalty itself.
    """
    if not target.config.penalized:
        return None
    for config_file in sorted(target.run_dir.resolve().parent.glob("*/config.yaml")):
        try:
            other = TrainConfig.from_yaml(config_file)
            if not changed_options(_without_penalty(other), _without_penalty(target.config)):
                return read_control(config_file.parent, target, attack, attack_name)
        except ConfigError:
            continue  # some other directory, or a run that is no control or was not attacked
    return None


def _without_penalty(config: TrainConfig) -> TrainConfig:
    defaults = TrainConfig()
    return replace(config, **{name: getattr(defaults, name) for name in OF_THE_PENALTY})
