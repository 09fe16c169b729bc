"""The undefended run beside a defended one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cem.attacks.config import AttackConfig
from cem.attacks.target import Target
from cem.errors import CheckpointError, UsageError
from cem.training.config import changed_options, without_penalty
from cem.training.runs import read_config


def read_control(run_dir: Path, target: Target, attack: AttackConfig, attack_name: str) -> dict[str, Any]:
    """The ``attack.json`` of the control run in ``run_dir``, its name in ``run`` ``name``.

    Args:
        run_dir: a run without a penalty, on the same data and under the same noise, that was attacked alike.
        target: the run that it stands beside.
        attack: the options of the attack on ``target``.
        attack_name: the attack's directory in ``run_dir``.

    Raises:
        UsageError: there is no such attack, or what it says cannot be set beside ``target``.
    """
    path = run_dir / attack_name / "attack.json"
    try:
        control = json.loads(path.read_text(encoding="utf-8"))
        options = read_config(run_dir)
        changed = AttackConfig.from_dict(control["config"]).changed(attack)
        same_data = control["data_checksum"] == target.data_checksum
    except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
        raise UsageError(f"--control {run_dir} has no finished attack: {error}") from error
    if options.penalized:
        raise UsageError(f"--control {run_dir} is no control: it was trained with a penalty, {options.surrogate}")
    if not same_data:
        raise UsageError(f"--control {run_dir} was attacked on other images, or has another --train-size")
    noise_std = control["run"]["noise_std"]
    if noise_std != target.noise_std:
        raise UsageError(f"--control {run_dir} has other noise: σ is {noise_std:g} there, {target.noise_std:g} here")
    if changed:
        raise UsageError(f"--control {run_dir} was attacked under other options: {', '.join(changed)}")
    return control


def find_control(target: Target, attack: AttackConfig, attack_name: str) -> dict[str, Any] | None:
    """The control among the directories beside the run, see :func:`read_control`.

    It was trained without a penalty, and otherwise under the same options.

    Returns:
        ``None`` if there is none, or if the run has no penalty itself.
    """
    if not target.config.penalized:
        return None
    # The device that the run was trained on need not be here.
    wanted = replace(without_penalty(target.config), device=attack.device)
    for config_file in sorted(target.run_dir.resolve().parent.glob("*/config.yaml")):
        try:
            other = read_config(config_file.parent)
            if not changed_options(without_penalty(other), wanted):
                return read_control(config_file.parent, target, attack, attack_name)
        except Exception:  # a module that a neighboring run names may do anything
            continue  # some other directory, or a run that is no control or was not attacked
    return None
