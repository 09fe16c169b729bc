"""Run directories that nobody trained or attacked: the files that a comparison reads, with made-up figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cem.comparison.config import Comparison
from cem.comparison.grid import Run


def fake_training(comparison: Comparison, run: Run, *, accuracy: float = 0.9) -> Path:
    """A finished training."""
    run_dir = comparison.run_dir(run)
    run_dir.mkdir(parents=True)
    comparison.train_config(run).to_yaml(run_dir / "config.yaml")
    (run_dir / "last.pt").touch()
    seconds = (1.0, 2.0, 9.0)
    with open(run_dir / "metrics.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["epoch", "seconds", "surrogate_seconds"])
        table.writerows([epoch, each, each / 10] for epoch, each in enumerate(seconds, start=1))
    summary = {
        "test_accuracy": accuracy,
        "train_seconds": sum(seconds),
        "peak_memory_bytes": 700 * 2**20,
        "device": "cpu",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": None},
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


def scores(mse: float, ssim: float | None = 0.5) -> dict[str, float | None]:
    return {"mse": mse, "psnr": -10 * float(np.log10(mse)), "ssim": ssim}


def fake_attack(
    comparison: Comparison,
    run: Run,
    *,
    mse: float = 0.03,
    converged: bool = True,
    nats: float = 100.0,
    values: dict[str, float | None] | None = None,
    white_box: float | None = 1.2,
) -> None:
    """A finished attack; ``white_box`` times the decoder's MSE is that of the white-box attack, if there was one."""
    directory = comparison.run_dir(run) / "attack"
    directory.mkdir()
    comparison.attack_config().to_yaml(directory / "config.yaml")
    summary = json.loads((comparison.run_dir(run) / "summary.json").read_text())
    content = {
        "run": {"name": run.name, "test_accuracy": summary["test_accuracy"]},
        "sizes": {"target_train": 700, "attacker_train": 500, "attacker_val": 120, "test": 360},
        "strongest": "res_normN8C64:mse",
        "converged": converged,
        "train_target": scores(0.95 * mse),
        "test_target": scores(mse),
        "white_box": white_box
        and {
            "train_target": scores(1.1 * white_box * mse),
            "test_target": scores(white_box * mse),
            "decoder": {"test_target": scores(1.1 * mse)},
        },
        "controls": {
            "mean_image": {"train_target": scores(0.085), "test_target": scores(0.086)},
            "class_mean": {"train_target": scores(0.051), "test_target": scores(0.052)},
        },
        "information": {
            **{"nats": nats, "within_variance": 0.25, "between_variance": 0.5},
            "values": {"log_det": nats} if values is None else values,
        },
        "seconds": 64.2,
    }
    (directory / "attack.json").write_text(json.dumps(content))
    originals = np.arange(640, dtype=np.uint8).reshape(10, 1, 8, 8)
    np.savez(directory / "images.npz", originals=originals, reconstructions=originals // 2, ssim=np.full(10, 0.5))


def finish(comparison: Comparison, figures: Callable[[Run], dict[str, Any]] = lambda run: {}) -> Comparison:
    """Leave nothing to do of a comparison, whose runs have these figures."""
    for run in comparison.grid.runs():
        given = {"accuracy": 0.9, **figures(run)}
        fake_training(comparison, run, accuracy=given.pop("accuracy"))
        fake_attack(comparison, run, **given)
    return comparison


def change(run_dir: Path, **changes: Any) -> None:
    """Other content in the ``attack.json`` of a run."""
    path = run_dir / "attack" / "attack.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
