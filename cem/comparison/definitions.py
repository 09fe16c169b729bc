"""The figures of the report's table of settings, and what exactly each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import yaml

from cem.report.document import Column
from cem.surrogates import SURROGATES


@dataclass(frozen=True)
class Shown:
    """A figure in the table of settings.

    Attributes:
        name: in :data:`~cem.comparison.results.FIGURES`.
        head: its column.
        factor: to the unit that the column names.
        decimals: to show, or ``None`` for three digits.
        relative: to the control, which itself has no entry.
    """

    name: str
    head: Column
    factor: float = 1.0
    decimals: int | None = None
    relative: bool = False


_UNSEEN, _TRAINING = "attack, unseen", "attack, training"

SHOWN = (
    Shown("test_accuracy", Column("test [%]", "accuracy"), 100.0, 1),
    Shown("accuracy_difference", Column("against none [points]", "accuracy"), 1.0, 1, relative=True),
    Shown("test_mse", Column("MSE", _UNSEEN)),
    Shown("mse_ratio", Column("against none [×]", _UNSEEN), 1.0, 2, relative=True),
    Shown("test_psnr", Column("PSNR [dB]", _UNSEEN), 1.0, 1),
    Shown("test_ssim", Column("SSIM", _UNSEEN), 1.0, 3),
    Shown("white_box_test_mse", Column("white-box MSE", _UNSEEN)),
    Shown("train_mse", Column("MSE", _TRAINING)),
    Shown("train_psnr", Column("PSNR [dB]", _TRAINING), 1.0, 1),
    Shown("train_ssim", Column("SSIM", _TRAINING), 1.0, 3),
    Shown("white_box_train_mse", Column("white-box MSE", _TRAINING)),
    Shown("seconds_per_epoch", Column("epoch [s]", "cost")),
    Shown("surrogate_seconds_per_epoch", Column("in surrogate [s]", "cost")),
    Shown("peak_memory_bytes", Column("memory [MiB]", "cost"), 2.0**-20, 0),
    Shown("nats", Column("bound [nats]", "information")),
    Shown("within_variance", Column("inside classes", "variance of features")),
    Shown("between_variance", Column("over classes", "variance of features")),
)

CONTROLS = {"mean_image": "mean image", "class_mean": "class mean"}
"""Answers that need no features: name in ``attack.json`` and in the report."""

TEXTS = yaml.safe_load(files("cem.report").joinpath("templates/texts.yaml").read_text(encoding="utf-8"))
DEFINITIONS: list[tuple[str, str]] = [(term, meaning.strip()) for term, meaning in TEXTS["terms"].items()]
"""Terms of the report, and what they mean."""


def meaning_of(value: str) -> str:
    """What a value of a trained model is, which ``attack.json`` has whatever the model was trained with."""
    if value in SURROGATES:
        return f"of an untrained surrogate, assessed on the trained model's features: {SURROGATES[value].summary}"
    meaning: str = TEXTS["values"].get(value, "see attack.json")
    return meaning
