"""The figures of the report's tables, and what exactly each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import yaml

from cem.attacks.controls import CLASS_MEAN
from cem.report.document import Column
from cem.surrogates import SURROGATES


@dataclass(frozen=True)
class Shown:
    """A figure in a table of settings.

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


_WORST = "worst attack"


def attacked(prefix: str, group: str = "") -> tuple[Shown, ...]:
    """The three figures of an attack that every table has; their names begin with ``prefix``."""
    return (
        Shown(f"{prefix}mse", Column("MSE", group)),
        Shown(f"{prefix}ssim", Column("SSIM", group), 1.0, 2),
        Shown(f"{prefix}identified", Column("identified [%]", group), 100.0, 0),
    )


ACCURACY = Shown("test_accuracy", Column("accuracy [%]"), 100.0, 1)
EPOCH = Shown("seconds_per_epoch", Column("epoch [s]", "cost"))
MULTIPLY_ADDS = Shown("client_multiply_adds", Column("multiply-adds [M]", "client"), 1e-6)
SENT = Shown("sent_bytes", Column("sent [bytes]", "client"), 1.0, 0)
MAIN = (ACCURACY, *attacked("worst_", _WORST))
"""Columns of the table of settings, before gain and cost."""

MORE = (
    Shown("points_lost", Column("points lost"), 1.0, 1),
    Shown("mse_ratio", Column("MSE over none's [×]", _WORST), 1.0, 2, relative=True),
    Shown("worst_mse_p05", Column("MSE, 5th percentile", _WORST)),
    Shown("worst_psnr", Column("PSNR [dB]", _WORST), 1.0, 1),
    *attacked("worst_train_", "on training images"),
    EPOCH,
    Shown("surrogate_seconds_per_epoch", Column("in surrogate [s]", "cost")),
    Shown("peak_memory_bytes", Column("memory [MiB]", "cost"), 2.0**-20, 0),
    Shown("client_parameters", Column("parameters", "client"), 1.0, 0),
    MULTIPLY_ADDS,
    SENT,
)
"""What else there is of a setting."""

INFORMATION = (
    Shown("nats", Column("told, at most [nats]")),
    Shown("within_variance", Column("inside classes", "variance of features")),
    Shown("between_variance", Column("over classes", "variance of features")),
)
"""What follows from features alone."""


def of_attack(name: str) -> tuple[Shown, ...]:
    """Columns of the table of attacks."""
    mse, *others = attacked(f"{name}.")
    return (
        mse,
        Shown(f"{name}.mse_p05", Column("5th percentile")),
        Shown(f"{name}.psnr", Column("PSNR [dB]"), 1.0, 1),
        *others,
        Shown(f"{name}.median_rank", Column("median rank"), 1.0, 1),
        Shown(f"{name}.candidates", Column("candidates"), 1.0, 0),
    )


BLIND = ("mean_image", CLASS_MEAN)
"""Controls that need no features, and so are the same for every setting."""

KNOWLEDGE = {
    "auxiliary": "attackers who have images of their own",
    "training": "attackers who have the target's training images",
}
"""Kinds of knowledge, in words."""

TEXTS = yaml.safe_load(files("cem.report").joinpath("templates/texts.yaml").read_text(encoding="utf-8"))
DEFINITIONS: list[tuple[str, str]] = [(term, meaning.strip()) for term, meaning in TEXTS["terms"].items()]
"""Terms of the report, and what they mean."""


def meaning_of(value: str) -> str:
    """What a value of a trained model is, which ``attack.json`` has whatever the model was trained with."""
    if value in SURROGATES:
        return f"of an untrained surrogate, assessed on the trained model's features: {SURROGATES[value].summary}"
    meaning: str = TEXTS["values"].get(value, "see attack.json")
    return meaning
