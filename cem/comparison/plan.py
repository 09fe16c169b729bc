"""What is left to do in a folder of runs: nothing that is finished is done again."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cem.attacks.config import AttackConfig
from cem.comparison.config import Comparison
from cem.comparison.grid import Run
from cem.errors import CemError, UsageError
from cem.files import is_unfinished, read_json, writing
from cem.folders import LOCK
from cem.options import flag
from cem.training.config import HARMLESS_ON_RESUME, TrainConfig, changed_options
from cem.training.runs import read_config

OPTIONS = "compare.yaml"
"""File of all options of a comparison, the first that is written."""
OPTIONS_DIR = "options"
"""Folder, inside the comparison's, of the option files that its trainings and attacks are started with."""
LOGS_DIR = "logs"
"""Folder of what trainings and attacks printed, one file each."""


@dataclass(frozen=True)
class Step:
    """One subprocess: the training of a run, or the attacks on it.

    Attributes:
        run: the run.
        kind: ``"training"`` or ``"attack"``.
        command: its command line.
        log: where its output goes.
    """

    run: Run
    kind: str
    command: tuple[str, ...]
    log: Path


def is_trained(run_dir: Path) -> bool:
    """Whether a finished training lies there: ``summary.json`` is the last file that it writes."""
    return (run_dir / "summary.json").exists()


def is_attacked(comparison: Comparison, run: Run) -> bool:
    """Whether finished attacks lie there with all that is asked for: ``attack.json`` is the last file that one writes.

    A damaged one is none.
    """
    wanted = comparison.attack_config().of_each_knowledge()
    return all(_holds(comparison.run_dir(run) / each.directory, each) for each in wanted)


def _holds(attacked: Path, wanted: AttackConfig) -> bool:
    try:
        config = (read_json(attacked / "attack.json", "config") or {}).get("config")
        return isinstance(config, dict) and not wanted.changed(AttackConfig.from_dict(config))
    except CemError:
        return False


def attack_dir(comparison: Comparison, run: Run) -> Path:
    """Where the attack on a run lies, with the first knowledge that is asked for."""
    return comparison.run_dir(run) / comparison.attack.of_each_knowledge()[0].directory


def is_finished(comparison: Comparison, run: Run) -> bool:
    """Whether nothing is left to do for ``run``."""
    return is_trained(comparison.run_dir(run)) and is_attacked(comparison, run)


def check_out(out: Path) -> None:
    """Check that the folder of a comparison is free, or is one's already: ``compare.yaml`` is the first file in it.

    Raises:
        UsageError: saying what is in the way.
        MachineError: it cannot be read.
    """
    with writing(out):
        if os.path.lexists(out) and not out.is_dir():
            raise UsageError(f"--out {out}: it exists and is no directory")
        if not out.exists() or (out / OPTIONS).exists():
            return
        foreign = sorted(path.name for path in out.iterdir() if path.name != LOCK and not is_unfinished(path))
    if foreign:
        raise UsageError(f"--out {out} holds {foreign[0]}, but no comparison; choose another one")


def check_options(comparison: Comparison, run: Run) -> None:
    """Check that what lies in a run's directory, if anything, was made under the options of this comparison.

    Options that only say where to compute (``device``, ``data_root``, ...) may differ.

    Raises:
        UsageError: naming the first options that differ, or what is in the way.
    """
    run_dir = comparison.run_dir(run)
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir} is in the way of a run: it is no directory")
    if not is_trained(run_dir) and not (run_dir / "last.pt").exists():
        foreign = sorted(path.name for path in run_dir.iterdir() if path.name != LOCK and not is_unfinished(path))
        if foreign:
            raise UsageError(f"{run_dir} is in the way of a run: it holds {foreign[0]}, but no training; move it away")
        return
    changed = changed_options(read_config(run_dir), comparison.train_config(run))
    if changed:
        raise UsageError(
            f"the run in {run_dir} was trained under other options: {', '.join(changed)}. "
            "Give the same options, or another --out"
        )
    for wanted in comparison.attack_config().of_each_knowledge():
        attacked = run_dir / wanted.directory
        if not (attacked / "config.yaml").exists():
            continue
        changed = AttackConfig.from_yaml(attacked / "config.yaml").changed(wanted)
        if changed:
            raise UsageError(
                f"the run in {run_dir} was attacked under other options: "
                f"{', '.join(line.replace('--', '--attack.', 1) for line in changed)}. "
                f"Give the same options, or move {attacked} away to attack it again"
            )


def remaining_steps(comparison: Comparison, run: Run) -> list[Step]:
    """What is left to do for ``run``, in order: none, one or two steps.

    Writes the option files that the steps name.
    """
    steps = []
    if not is_trained(comparison.run_dir(run)):
        steps.append(_step(comparison, run, "training", _training_command(comparison, run)))
    if not is_attacked(comparison, run):
        steps.append(_step(comparison, run, "attack", _attack_command(comparison, run)))
    return steps


def _training_command(comparison: Comparison, run: Run) -> list[str]:
    run_dir, config = comparison.run_dir(run), comparison.train_config(run)
    command = [sys.executable, "-m", "cem.train"]
    if (run_dir / "last.pt").exists():
        before = read_config(run_dir)
        return [*command, "--resume", str(run_dir), *_elsewhere(before, config)]
    path = _options_file(comparison, run.name)
    config.to_yaml(path)
    return [*command, "--config", str(path), "--out", str(run_dir)]


def _attack_command(comparison: Comparison, run: Run) -> list[str]:
    path = _options_file(comparison, "attack")
    comparison.attack_config().to_yaml(path)
    return [sys.executable, "-m", "cem.attack", str(comparison.run_dir(run)), "--config", str(path)]


def _elsewhere(before: TrainConfig, after: TrainConfig) -> list[str]:
    """The options that say where to compute, where they are no longer those of the run."""
    old, new, flags = before.to_dict(), after.to_dict(), []
    for name in sorted(HARMLESS_ON_RESUME - {"out"}):
        if old[name] == new[name]:
            continue
        if isinstance(new[name], bool):
            flags.append(flag(name) if new[name] else flag(f"no_{name}"))
        else:
            flags += [flag(name), str(new[name]).lower() if new[name] is None else str(new[name])]
    return flags


def _options_file(comparison: Comparison, name: str) -> Path:
    path = comparison.out / OPTIONS_DIR / f"{name}.yaml"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _step(comparison: Comparison, run: Run, kind: str, command: list[str]) -> Step:
    return Step(run, kind, tuple(command), comparison.out / LOGS_DIR / f"{run.name}-{kind}.log")
