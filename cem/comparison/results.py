"""What the runs of a comparison measured, one record each, and the table of them.

Figures of a run:

* ``test_accuracy``: fraction of test images that the server classifies correctly, under the noise
* ``points_lost``: test accuracy of none at this noise, client and seed minus its own [percentage points]
* ``worst_mse``: smallest mean squared error that any attack has on unseen images; pixels in [0, 1]
* ``worst_mse_p05``: smallest 5th percentile over images of the same
* ``worst_psnr``: highest peak signal-to-noise ratio of the same images [dB]
* ``worst_ssim``: highest structural similarity of the same images
* ``worst_identified``: highest share of reconstructions whose nearest image of the same class is the original
* ``chance``: that share for guesses that know the class alone
* ``worst_train_mse``: as worst_mse, on images that the target was trained on; so are the next four
* ``worst_train_mse_p05``
* ``worst_train_psnr``
* ``worst_train_ssim``
* ``worst_train_identified``
* ``mse_ratio``: worst_mse over that of none at this noise, client and seed
* ``seconds_per_epoch``: median over the epochs [s]
* ``surrogate_seconds_per_epoch``: seconds spent in the surrogate, median over the epochs [s]
* ``train_seconds``: all epochs together [s]
* ``attack_seconds``: the whole attack [s]
* ``peak_memory_bytes``: most memory of the training process [bytes]; on CUDA, most memory of the device
* ``client_parameters``: numbers in the part of the network that the client runs
* ``client_multiply_adds``: multiplications, each with an addition, that it takes the client for an image
* ``sent_bytes``: what the client sends for an image [bytes]
* ``nats``: upper estimate of I(x; z) from variances inside classes and clusters [nats]
* ``within_variance``: variance of clean features inside classes, mean over columns
* ``between_variance``: variance of the classes' means of clean features, mean over columns

Besides, whatever ``attack.json`` has of an attack or a control: ``NAME.METRIC`` on unseen images, ``NAME.train_METRIC``
on those that the target was trained on. Where several kinds of knowledge were asked for, the figures are of the first;
those of another one are called ``KNOWLEDGE:`` and any of the names above.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from cem.attacks.metrics import METRICS
from cem.attacks.pictures import read_pictures
from cem.comparison.config import Comparison
from cem.comparison.grid import OF_CLIENT, Run
from cem.comparison.plan import attack_dir, check_options
from cem.comparison.runner import read_failures
from cem.errors import CheckpointError
from cem.files import read_json, replacing
from cem.models import CLIENT_COSTS
from cem.training.runs import read_summary

ATTACK = ("knowledge", "attacks", "worst")
"""What every ``attack.json`` has."""
MOST = 8
"""Images in a row of pictures; more would be too small to see."""
FIGURES = (
    "test_accuracy", "points_lost", *(f"worst_{metric}" for metric in METRICS), "chance",
    *(f"worst_train_{metric}" for metric in METRICS), "mse_ratio", "seconds_per_epoch", "surrogate_seconds_per_epoch",
    "train_seconds", "attack_seconds", "peak_memory_bytes", *CLIENT_COSTS, "nats", "within_variance",
    "between_variance",
)  # fmt: skip
"""Figures that every run has, see above. One that was not measured, or is not finite, is ``None``."""


@dataclass
class RunResult:
    """What one run measured.

    Attributes:
        run: which run.
        run_dir: its directory.
        attack_dir: that of the attack on it, with the first knowledge that was asked for.
        status: ``"finished"``; ``"failed"``, also where a file of it is damaged; ``"unfinished"``: begun, or trained
            but not attacked; ``"not begun"``.
        reason: of a failure, else empty.
        figures: by their names: all in :data:`FIGURES`, and those of attacks and controls.
        values: the surrogates' values of the trained model, by surrogate; penalties, so small is meant to be private.
        summary: content of ``summary.json``, or empty.
        attack: content of ``attack.json``, or empty; of the first knowledge that was asked for.
    """

    run: Run
    run_dir: Path
    attack_dir: Path
    status: str
    reason: str = ""
    figures: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(FIGURES))
    values: dict[str, float | None] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    attack: dict[str, Any] = field(default_factory=dict)

    @property
    def attacks(self) -> dict[str, Mapping[str, Any]]:
        """The attacks on it by name, as ``attack.json`` has them."""
        return _entries(self.attack, "attacks")

    @property
    def controls(self) -> list[str]:
        """Names of the answers that need no features."""
        return list(_entries(self.attack, "controls"))

    @property
    def worst(self) -> str | None:
        """The attack with the smallest MSE on unseen images."""
        return mapping(self.attack, "worst", "mse").get("attack")

    @property
    def restless(self) -> list[str]:
        """Attacks that would have gained from more time."""
        return [name for name, attack in self.attacks.items() if attack.get("converged") is False]


def read_results(comparison: Comparison) -> list[RunResult]:
    """Read whatever there is of the runs of a comparison, in the order of the table: settings, then seeds.

    A run of which a file is damaged has failed; it costs the others nothing.

    Raises:
        UsageError: a run was made under other options.
        CheckpointError: the list of failures is damaged.
    """
    failures = read_failures(comparison.out)
    results = []
    for setting in comparison.grid.settings():
        for seed in comparison.grid.seeds:
            run = Run(setting, seed)
            results.append(_read(comparison, run, failures.get(run.name)))
    _relate(results)
    return results


def names_of(results: Sequence[RunResult]) -> list[str]:
    """Names of all figures that any of them has: those in :data:`FIGURES` first."""
    return list(dict.fromkeys(chain(FIGURES, *(result.figures for result in results))))


def write_table(results: Sequence[RunResult], path: Path) -> None:
    """Write one line a run in full precision; what was not measured is empty."""
    names, values = names_of(results), list(dict.fromkeys(name for result in results for name in result.values))
    header = [
        *("run", "method", "lambd", "noise_std", *OF_CLIENT, "seed"),
        *("status", "reason", "worst_attack", "not_converged"),
    ]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*header, *names, *(f"value_{name}" for name in values)])
        for result in results:
            run, setting = result.run, result.run.setting
            row = [run.name, setting.method, setting.lambd, setting.noise_std, *astuple(setting.client), run.seed]
            row += [result.status, result.reason, result.worst, " ".join(result.restless)]
            row += [*(result.figures.get(name) for name in names), *(result.values.get(name) for name in values)]
            table.writerow(row)


def mapping(content: Any, *keys: str) -> Mapping[str, Any]:
    """What is at ``content[keys[0]][keys[1]]...``, or nothing where no mapping is there."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def _read(comparison: Comparison, run: Run, failure: Mapping[str, Any] | None) -> RunResult:
    run_dir = comparison.run_dir(run)
    result = RunResult(run, run_dir, attack_dir(comparison, run), "unfinished" if run_dir.exists() else "not begun")
    try:
        check_options(comparison, run)
        _read_training(result)
        attacked = _read_attacks(result, comparison)
    except CheckpointError as error:
        result.status = "failed"
        result.reason = f"{error}; move {run_dir.name} away, and the same command makes the run anew"
        return result
    if result.summary and attacked:
        result.status = "finished"
    elif failure is not None:
        result.status, result.reason = "failed", _describe(failure)
    return result


def _read_training(result: RunResult) -> None:
    result.summary = summary = read_summary(result.run_dir) or {}
    figures = result.figures
    for name in ("test_accuracy", "train_seconds", "peak_memory_bytes", *CLIENT_COSTS):
        figures[name] = _number(summary, name)
    if summary:
        figures["seconds_per_epoch"] = _median(result.run_dir, "seconds")
        figures["surrogate_seconds_per_epoch"] = _median(result.run_dir, "surrogate_seconds")


def _read_attacks(result: RunResult, comparison: Comparison) -> bool:
    """Whether all attacks that were asked for are finished."""
    result.attack = attack = read_json(result.attack_dir / "attack.json", *ATTACK) or {}
    result.figures |= _scores(attack)
    result.figures["attack_seconds"] = _number(attack, "seconds")
    for name in ("nats", "within_variance", "between_variance"):
        result.figures[name] = _number(attack, "information", name)
    values = mapping(attack, "information", "values")
    result.values = {name: _number(values, name) for name in values}
    attacked = bool(attack)
    if attacked:
        read_pictures(result.attack_dir, MOST)  # what cannot be read is known before anything is drawn
    for config in comparison.attack.of_each_knowledge()[1:]:
        other = read_json(result.run_dir / config.directory / "attack.json", *ATTACK)
        (knowledge,) = config.knowledge
        result.figures |= {f"{knowledge}:{name}": value for name, value in _scores(other or {}).items()}
        attacked = attacked and other is not None
    return attacked


def _scores(attack: Mapping[str, Any]) -> dict[str, float | None]:
    """Figures of the worst case, of every attack and of every control."""
    found = {}
    for prefix, key in (("", "worst"), ("train_", "worst_train_target")):
        for metric in METRICS:
            found[f"worst_{prefix}{metric}"] = _number(attack, key, metric, "value")
    finder = str(mapping(attack, "worst", "identified").get("attack"))
    found["chance"] = _number(attack, "attacks", finder, "metrics", "chance")
    for name, entry in (_entries(attack, "attacks") | _entries(attack, "controls")).items():
        for prefix, key in (("", "metrics"), ("train_", "train_target")):
            for metric in mapping(entry, key):
                found[f"{name}.{prefix}{metric}"] = _number(entry, key, metric)
    return found


def _entries(attack: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
    return {name: mapping(entry) for name, entry in mapping(attack, key).items()}


def _describe(failure: Mapping[str, Any]) -> str:
    return f"its {failure['step']} ended with exit code {failure['exit_code']}: {failure['reason']}"


def _relate(results: Sequence[RunResult]) -> None:
    """Set every run against the one without a penalty at the same noise, client and seed."""
    controls = {
        (result.run.setting.level, result.run.seed): result for result in results if result.run.setting.is_control
    }
    for result in results:
        control = controls.get((result.run.setting.level, result.run.seed))
        if control is None:
            continue
        ours, theirs = result.figures, control.figures
        if ours["test_accuracy"] is not None and theirs["test_accuracy"] is not None:
            ours["points_lost"] = 100 * (theirs["test_accuracy"] - ours["test_accuracy"])
        if ours["worst_mse"] is not None and theirs["worst_mse"]:
            ours["mse_ratio"] = ours["worst_mse"] / theirs["worst_mse"]


def _number(content: Mapping[str, Any], *keys: str) -> float | None:
    """The finite number at ``content[keys[0]][keys[1]]...``, or ``None``."""
    found = mapping(content, *keys[:-1]).get(keys[-1])
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _median(run_dir: Path, column: str) -> float | None:
    path = run_dir / "metrics.csv"
    if not path.exists():
        return None
    try:
        with open(path, newline="", encoding="utf-8") as file:
            values = [float(row[column]) for row in csv.DictReader(file)]
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise CheckpointError(f"{path} is damaged: expected a number of {column} in every line") from error
    return median(values) if values else None
