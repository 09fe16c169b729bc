"""Run directories that nobody trained or attacked: the files that a comparison reads, with made-up figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cem.attacks.metrics import METRICS
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
        "client_parameters": 15352,
        "client_multiply_adds": 10**6 * (run.setting.client.cut_layer + run.setting.client.adapter),
        "sent_bytes": 128,
        "peak_memory_bytes": 700 * 2**20,
        "device": "cpu",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": None},
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


def scores(mse: float, ssim: float | None = 0.5) -> dict[str, float | None]:
    """Of one attack on one set of images."""
    found = {"mse": mse, "mse_p05": mse / 2, "psnr": -10 * float(np.log10(mse)), "ssim": ssim}
    return found | {"identified": 0.6, "chance": 0.05, "candidates": 20, "median_rank": 1.0, "images": 500}


def worst(attacks: dict[str, Any], part: str) -> dict[str, Any]:
    found = {}
    for metric, way in METRICS.items():
        known = {name: own[part][metric] for name, own in attacks.items() if own[part][metric] is not None}
        name = max(known, key=lambda each: way * known[each], default=next(iter(attacks)))
        found[metric] = {"attack": name, "value": known.get(name)}
    return found


def fake_attack(
    comparison: Comparison,
    run: Run,
    *,
    mse: float = 0.03,
    ssim: float | None = 0.5,
    converged: bool = True,
    nats: float = 100.0,
    values: dict[str, float | None] | None = None,
    white_box: float | None = 1.2,
) -> None:
    """Finished attacks, of every knowledge; ``white_box`` times the decoder's MSE is that of another attack, if any."""
    summary = json.loads((comparison.run_dir(run) / "summary.json").read_text())
    for config in comparison.attack_config().of_each_knowledge():
        directory = comparison.run_dir(run) / config.directory
        directory.mkdir()
        config.to_yaml(directory / "config.yaml")
        attacks = {"decoder": {"metrics": scores(mse, ssim), "train_target": scores(0.95 * mse, ssim)}}
        attacks["decoder"] |= {"converged": converged, "note": "", "seconds": 60.0}
        if white_box:
            other = {"metrics": scores(white_box * mse, ssim), "train_target": scores(1.1 * white_box * mse, ssim)}
            attacks["white-box"] = {**other, "converged": None, "note": "", "seconds": 4.2}
        content = {
            "run": {"name": run.name, "test_accuracy": summary["test_accuracy"]},
            "config": config.to_dict(),
            "knowledge": config.knowledge[0],
            "sizes": {"target_train": 700, "attacker_train": 500, "attacker_val": 120, "test": 360},
            "attacks": attacks,
            "worst": worst(attacks, "metrics"),
            "worst_train_target": worst(attacks, "train_target"),
            "controls": {
                "mean_image": {"metrics": scores(0.086, ssim), "train_target": scores(0.085, ssim)},
                "class_mean": {"metrics": scores(0.052, ssim), "train_target": scores(0.051, ssim)},
            },
            "information": {
                **{"nats": nats, "within_variance": 0.25, "between_variance": 0.5, "feature_dims": 512},
                "values": {"log_det": nats} if values is None else values,
            },
            "seconds": 64.2,
        }
        (directory / "attack.json").write_text(json.dumps(content))
        names = [*attacks, "class_mean"]
        originals = np.arange(640, dtype=np.uint8).reshape(10, 1, 8, 8)
        same = {"attacks": names, "worst": content["worst"]["mse"]["attack"]}
        same |= {name: np.full((len(names), 10), 0.5) for name in ("ssim", "mse")}
        np.savez(directory / "images.npz", originals=originals, guesses=np.stack([originals // 2] * len(names)), **same)


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
