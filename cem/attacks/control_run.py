"""The undefended run beside a defended one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cem.attacks.config import AttackConfig
from cem.options import ConfigError
from cem.training.config import TrainConfig, changed_options

_OF_THE_PENALTY = (
    "surrogate",
    "lambd",
    "penalty_from",
    "var_threshold",
    "surrogate_policy",
    "surrogate_lr",
    "reduce_dim",
    "gmm_fit",
    "injection",
)


def read_control(run_dir: Path, attack_name: str) -> dict[str, Any]:
    """The ``attack.json`` of the run in ``run_dir``, with the run's ``name`` added.

    Args:
        run_dir: a run that was attacked.
        attack_name: the attack's directory there.

    Raises:
        ConfigError: there is none, or it is no JSON.
    """
    path = run_dir / attack_name / "attack.json"
    try:
        return {**json.loads(path.read_text(encoding="utf-8")), "name": run_dir.resolve().name}
    except (OSError, ValueError) as error:
        raise ConfigError(f"--control {run_dir} has no finished attack: {error}") from error


def find_control(run_dir: Path, target: TrainConfig, attack: AttackConfig, attack_name: str) -> dict[str, Any] | None:
    """The control among the directories beside ``run_dir``, see :func:`read_control`.

    It was trained without a penalty and otherwise under the same options, and attacked under the same options.

    Returns:
        ``None`` if there is none, or if the run has no penalty itself.
    """
    if not target.penalised:
        return None
    for config_file in sorted(run_dir.resolve().parent.glob("*/config.yaml")):
        try:
            other = TrainConfig.from_yaml(config_file)
            if other.penalised or changed_options(_without_penalty(other), _without_penalty(target)):
                continue
            control = read_control(config_file.parent, attack_name)
        except ConfigError:
            continue  # some other directory, or a run that was not attacked
        if AttackConfig.from_dict(control["config"]).changed(attack):
            continue
        return control
    return None


def _without_penalty(config: TrainConfig) -> TrainConfig:
    defaults = TrainConfig()
    return replace(config, **{name: getattr(defaults, name) for name in _OF_THE_PENALTY})
