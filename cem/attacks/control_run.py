"""The undefended run beside a defended one."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cem.attacks.config import AttackConfig
from cem.attacks.metrics import METRICS
from cem.attacks.pictures import read_pictures
from cem.attacks.target import Target
from cem.errors import CheckpointError, UsageError
from cem.files import read_json
from cem.options import flag, read_yaml
from cem.surrogates import SURROGATES
from cem.training.checkpoint import expect
from cem.training.config import changed_options, without_penalty
from cem.training.runs import read_config

_LAYOUT: dict[str, Any] = {
    **{"run": dict, "config": dict, "data_checksum": int},
    "worst": {metric: {"attack": str, "value": None} for metric in METRICS},
}
_HARMLESS = [each.name for each in fields(AttackConfig) if each.metadata.get("harmless")]


def read_control(run_dir: Path, target: Target, attack: AttackConfig, attack_name: str) -> dict[str, Any]:
    """The ``attack.json`` of the control run in ``run_dir``, its name in ``run`` ``name``, and its ``pictures``.

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
        options, control, pictures = read_config(run_dir), read_json(path, *_LAYOUT), read_pictures(path.parent)
        if control is None:
            raise UsageError(f"there is no {path}")
        for name, layout in _LAYOUT.items():
            expect(path, name, layout, control[name])
        name, noise_std = (control["run"].get(each) for each in ("name", "noise_std"))
        expect(path, "run", {"name": str, "noise_std": float}, {"name": name, "noise_std": noise_std})
    except (UsageError, CheckpointError) as error:
        raise UsageError(f"--control {run_dir} has no finished attack: {error}") from error
    if options.penalized:
        raise UsageError(f"--control {run_dir} is no control: it was trained with a penalty, {options.surrogate}")
    if control["data_checksum"] != target.data_checksum:
        raise UsageError(f"--control {run_dir} was attacked on other images, or has another --train-size")
    if noise_std != target.noise_std:
        raise UsageError(f"--control {run_dir} has other noise: σ is {noise_std:g} there, {target.noise_std:g} here")
    theirs, ours = control["config"], attack.to_dict()
    names = [name for name in dict.fromkeys([*theirs, *ours]) if name not in _HARMLESS]
    changed = [flag(name) for name in names if theirs.get(name) != ours.get(name)]
    if changed:
        raise UsageError(f"--control {run_dir} was attacked under other options: {', '.join(changed)}")
    return {**control, "pictures": pictures}


def find_control(target: Target, attack: AttackConfig, attack_name: str) -> dict[str, Any] | None:
    """The control among the directories beside the run, see :func:`read_control`.

    It was trained without a penalty, and otherwise under the same options. Nothing is imported for the sake of a
    neighbor: one that names a module that the run does not is none.

    Returns:
        ``None`` if there is none, or if the run has no penalty itself.
    """
    if not target.config.penalized:
        return None
    # The device that the run was trained on need not be here.
    wanted = replace(without_penalty(target.config), device=attack.device)
    known = [*SURROGATES, target.config.surrogate]
    for config_file in sorted(target.run_dir.resolve().parent.glob("*/config.yaml")):
        try:
            named = read_yaml(config_file)
            if named.get("surrogate") not in known or named.get("defenses") != list(wanted.defenses):
                continue
            if not changed_options(without_penalty(read_config(config_file.parent)), wanted):
                return read_control(config_file.parent, target, attack, attack_name)
        except (UsageError, CheckpointError):
            continue  # some other directory, or a run that is no control or was not attacked
    return None
