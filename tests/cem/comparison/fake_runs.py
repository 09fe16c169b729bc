"""Run directories that nobody trained or attacked: the files that a comparison reads, with made-up figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from cem.comparison.config import Comparison
from cem.comparison.grid import Run

IMAGES = 10


def fake_training(
    comparison: Comparison, run: Run, *, accuracy: float = 0.9, seconds: tuple[float, ...] = (1.0, 2.0, 9.0)
) -> Path:
    """A finished training."""
    run_dir = comparison.run_dir(run)
    run_dir.mkdir(parents=True)
    comparison.train_config(run).to_yaml(run_dir / "config.yaml")
    (run_dir / "last.pt").touch()
    with open(run_dir / "metrics.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["epoch", "seconds", "surrogate_seconds"])
        table.writerows([epoch, each, each / 10] for epoch, each in enumerate(seconds, start=1))
    summary = {
        "test_accuracy": accuracy,
        "best_epoch": len(seconds),
        "epochs": len(seconds),
        "train_seconds": sum(seconds),
        "surrogate_seconds": sum(seconds) / 10,
        "skipped_steps": 0,
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
    ssim: float = 0.5,
    converged: bool = True,
    nats: float = 100.0,
    values: dict[str, float] | None = None,
    white_box: bool = True,
    images: np.ndarray | None = None,
) -> dict[str, Any]:
    """A finished attack; returns its ``attack.json``."""
    directory = comparison.run_dir(run) / "attack"
    directory.mkdir()
    comparison.attack_config().to_yaml(directory / "config.yaml")
    summary = json.loads((comparison.run_dir(run) / "summary.json").read_text())
    attackers = [
        {
            "name": name,
            "decoder": name.partition(":")[0],
            "loss": name.partition(":")[2],
            "parameters": parameters,
            "epochs": 28,
            "best_epoch": 27,
            "converged": converged,
            "seconds": 31.5,
            "curve": [],
            "val": scores(mse * factor, ssim),
            "train_target": scores(0.95 * mse * factor, ssim),
            "test_target": scores(mse * factor, ssim),
        }
        for name, parameters, factor in [("res_normN8C64:mse", 713_000, 1.0), ("res_normN4C32:mse", 97_000, 1.1)]
    ]
    content = {
        "run": {"name": run.name, "test_accuracy": summary["test_accuracy"]},
        "config": comparison.attack_config().to_dict(),
        "sizes": {"target_train": 700, "attacker_train": 500, "attacker_val": 120, "test": 360},
        "ssim_window": 11,
        "strongest": "res_normN8C64:mse",
        "converged": converged,
        "train_target": scores(0.95 * mse, ssim),
        "test_target": scores(mse, ssim),
        "attackers": attackers,
        "white_box": {
            "images": 8,
            "train_target": scores(1.3 * mse),
            "test_target": scores(1.2 * mse),
            "decoder": {"train_target": scores(0.9 * mse), "test_target": scores(1.1 * mse)},
        }
        if white_box
        else None,
        "controls": {
            "mean_image": {"train_target": scores(0.085), "test_target": scores(0.086)},
            "class_mean": {"train_target": scores(0.051), "test_target": scores(0.052)},
        },
        "undefended": None,
        "information": {
            **{"nats": nats, "image_dims": 64, "within_variance": 0.25, "between_variance": 0.5},
            "values": values if values is not None else {"log_det": nats},
        },
        "seconds": 64.2,
        "peak_memory_bytes": 900 * 2**20,
        "device": "cpu",
        "versions": summary["versions"],
    }
    (directory / "attack.json").write_text(json.dumps(content))
    if images is None:
        images = np.full((IMAGES, 1, 8, 8), 128, dtype=np.uint8)
    np.savez(
        directory / "images.npz",
        originals=np.arange(IMAGES * 64, dtype=np.uint8).reshape(IMAGES, 1, 8, 8),
        reconstructions=images,
        ssim=np.full(IMAGES, ssim),
        labels=np.arange(IMAGES) % 10,
        indices=np.arange(IMAGES),
    )
    return content
