"""What the runs of a comparison measured, one record each, and the table of them.

Figures of a run:

* ``test_accuracy``: fraction of test images that the server classifies correctly, under the noise
* ``test_mse``: mean squared error of the strongest attacker's reconstructions of unseen images; pixels in [0, 1]
* ``test_psnr``: peak signal-to-noise ratio of the same [dB]
* ``test_ssim``: structural similarity of the same
* ``train_mse``: as test_mse, on images that the target was trained on
* ``train_psnr``: as test_psnr, on images that the target was trained on
* ``train_ssim``: as test_ssim, on images that the target was trained on
* ``white_box_test_mse``: MSE of the white-box attack on unseen images
* ``white_box_decoder_test_mse``: MSE of the strongest attacker on the unseen images of the white-box attack
* ``white_box_train_mse``: MSE of the white-box attack on images that the target was trained on
* ``seconds_per_epoch``: median over the epochs [s]
* ``surrogate_seconds_per_epoch``: seconds spent in the surrogate, median over the epochs [s]
* ``train_seconds``: all epochs together [s]
* ``attack_seconds``: the whole attack [s]
* ``peak_memory_bytes``: most memory of the training process [bytes]; on CUDA, most memory of the device
* ``nats``: upper estimate of I(x; z) from variances inside classes and clusters [nats]
* ``within_variance``: variance of clean features inside classes, mean over columns
* ``between_variance``: variance of the classes' means of clean features, mean over columns
* ``accuracy_difference``: test accuracy minus that of none at this noise and seed [points]
* ``mse_ratio``: test_mse over that of none at this noise and seed
* ``mean_image_test_mse``: MSE of answering every unseen image with the mean image
* ``mean_image_train_mse``: MSE of answering every training image with the mean image
* ``class_mean_test_mse``: MSE of answering every unseen image with the mean image of its class
* ``class_mean_train_mse``: MSE of answering every training image with the mean image of its class
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cem.comparison.config import Comparison
from cem.comparison.grid import Run
from cem.comparison.plan import attack_dir, check_options
from cem.comparison.runner import read_failures
from cem.errors import CheckpointError
from cem.files import read_json, replacing
from cem.training.runs import read_summary

FIGURES = (
    "test_accuracy", "test_mse", "test_psnr", "test_ssim", "train_mse", "train_psnr", "train_ssim",
    "white_box_test_mse", "white_box_decoder_test_mse", "white_box_train_mse", "seconds_per_epoch",
    "surrogate_seconds_per_epoch", "train_seconds", "attack_seconds", "peak_memory_bytes", "nats",
    "within_variance", "between_variance", "accuracy_difference", "mse_ratio", "mean_image_test_mse",
    "mean_image_train_mse", "class_mean_test_mse", "class_mean_train_mse",
)  # fmt: skip
"""Every figure of a run, see above. One that was not measured, or is not finite, is ``None``."""


@dataclass
class RunResult:
    """What one run measured.

    Attributes:
        run: which run.
        run_dir: its directory.
        attack_dir: that of the attack on it.
        status: ``"finished"``; ``"failed"``; ``"unfinished"``: begun, or trained but not attacked; ``"not begun"``.
        reason: of a failure, else empty.
        figures: by the names in :data:`FIGURES`.
        values: the surrogates' values of the trained model, by surrogate; penalties, so small is meant to be private.
        summary: content of ``summary.json``, or empty.
        attack: content of ``attack.json``, or empty.
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
    def converged(self) -> bool | None:
        """Whether the strongest attacker's training reached a plateau; ``None`` without an attack."""
        return self.attack.get("converged")


def read_results(comparison: Comparison) -> list[RunResult]:
    """Read whatever there is of the runs of a comparison, in the order of the table: settings, then seeds.

    Raises:
        UsageError: a run was made under other options.
        CheckpointError: a file of a run is damaged.
    """
    failures = read_failures(comparison.out)
    results = []
    for setting in comparison.grid.settings():
        for seed in comparison.grid.seeds:
            run = Run(setting, seed)
            check_options(comparison, run)
            results.append(_read(comparison, run, failures.get(run.name)))
    _relate(results)
    return results


def write_table(results: Sequence[RunResult], path: Path) -> None:
    """Write one line a run in full precision; what was not measured is empty."""
    values = list(dict.fromkeys(name for result in results for name in result.values))
    header = ["run", "method", "lambd", "noise_std", "seed", "status", "reason", "attacker", "converged"]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*header, *FIGURES, *(f"value_{name}" for name in values)])
        for result in results:
            run, setting = result.run, result.run.setting
            row = [run.name, setting.method, setting.lambd, setting.noise_std, run.seed]
            row += [result.status, result.reason, result.attack.get("strongest"), result.converged]
            row += [*(result.figures[name] for name in FIGURES), *(result.values.get(name) for name in values)]
            table.writerow(row)


def _read(comparison: Comparison, run: Run, failure: Mapping[str, Any] | None) -> RunResult:
    run_dir = comparison.run_dir(run)
    summary = read_summary(run_dir) or {}
    path = attack_dir(comparison, run) / "attack.json"
    attack = read_json(path) or {}
    if summary and attack:
        status, reason = "finished", ""
    elif failure is not None:
        status, reason = "failed", _describe(failure)
    else:
        status, reason = ("unfinished" if run_dir.exists() else "not begun"), ""
    result = RunResult(run, run_dir, path.parent, status, reason, summary=summary, attack=attack)
    figures = result.figures
    for name in ("test_accuracy", "train_seconds", "peak_memory_bytes"):
        figures[name] = _number(summary, name)
    if summary:
        figures["seconds_per_epoch"] = _median(run_dir, "seconds")
        figures["surrogate_seconds_per_epoch"] = _median(run_dir, "surrogate_seconds")
    figures["attack_seconds"] = _number(attack, "seconds")
    for images in ("test", "train"):
        for score in ("mse", "psnr", "ssim"):
            figures[f"{images}_{score}"] = _number(attack, f"{images}_target", score)
        figures[f"white_box_{images}_mse"] = _number(attack, "white_box", f"{images}_target", "mse")
        for control in ("mean_image", "class_mean"):
            figures[f"{control}_{images}_mse"] = _number(attack, "controls", control, f"{images}_target", "mse")
    figures["white_box_decoder_test_mse"] = _number(attack, "white_box", "decoder", "test_target", "mse")
    for name in ("nats", "within_variance", "between_variance"):
        figures[name] = _number(attack, "information", name)
    values = (attack.get("information") or {}).get("values") or {}
    result.values = {name: _number(values, name) for name in values}
    return result


def _describe(failure: Mapping[str, Any]) -> str:
    return f"its {failure['step']} ended with exit code {failure['exit_code']}: {failure['reason']}"


def _relate(results: Sequence[RunResult]) -> None:
    """Set every run against the one without a penalty at the same noise and seed."""
    controls = {
        (result.run.setting.noise_std, result.run.seed): result for result in results if result.run.setting.is_control
    }
    for result in results:
        control = controls.get((result.run.setting.noise_std, result.run.seed))
        if control is None:
            continue
        ours, theirs = result.figures, control.figures
        if ours["test_accuracy"] is not None and theirs["test_accuracy"] is not None:
            ours["accuracy_difference"] = 100 * (ours["test_accuracy"] - theirs["test_accuracy"])
        if ours["test_mse"] is not None and theirs["test_mse"]:
            ours["mse_ratio"] = ours["test_mse"] / theirs["test_mse"]


def _number(content: Mapping[str, Any], *keys: str) -> float | None:
    """The finite number at ``content[keys[0]][keys[1]]...``, or ``None``."""
    found: Any = content
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
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
