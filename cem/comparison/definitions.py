"""The figures of the report's table of settings, and what exactly each of them is."""

from __future__ import annotations

from dataclasses import dataclass

from cem.report.document import Column


@dataclass(frozen=True)
class Shown:
    """A figure in the table of settings.

    Attributes:
        name: in :data:`~cem.comparison.results.FIGURES`.
        head: its column.
        factor: to the unit that the column names.
        decimals: to show, or ``None`` for three digits.
        relative: to surrogate none, so that none itself has no entry.
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
    Shown("relative_bound", Column("error bound [×]", "information"), relative=True),
    Shown("within_variance", Column("inside classes", "variance of features")),
    Shown("between_variance", Column("over classes", "variance of features")),
)

CONTROLS = {"mean_image": "mean image", "class_mean": "class mean"}
"""Answers that need no features: name in ``attack.json`` and in the report."""

DEFINITIONS = [
    (
        "±",
        "Sample standard deviation (divided by n − 1) over seeds, each an independent training and attack; a single "
        "run has none. It is not a confidence interval of the mean.",
    ),
    (
        "Test accuracy",
        "Fraction of test images classified correctly, under the noise, at the epoch that validation data chose. "
        "Test images choose nothing.",
    ),
    (
        "Attack",
        "The strongest of the attackers tried on a run. Each is a decoder, trained on pairs of image and noisy "
        "features, of images that the target was not trained on. The smallest MSE on further such images chooses "
        "the strongest, and it is scored on images that had no part in either. MSE, PSNR and SSIM are computed "
        "image by image on pixels in [0, 1], then averaged. A higher MSE, a lower PSNR or a lower SSIM means that "
        "less was reconstructed.",
    ),
    (
        "Unseen and training images",
        "Unseen: test images. Training: images that the target itself was trained on, and the attacker was not.",
    ),
    (
        "Converged",
        "The validation error of the strongest attacker had stopped falling. Where it had not, longer training "
        "would reconstruct more.",
    ),
    (
        "White-box MSE",
        "An attacker who knows the encoder and optimizes pixels until their features match; on few images.",
    ),
    (
        "Against none",
        "Every run is set against the one without a penalty at the same noise and seed: difference of test "
        "accuracies in percentage points, ratio of attack MSEs. The table has mean and spread of these pairs.",
    ),
    (
        "Cost",
        "Seconds of a training epoch, and of those the seconds spent in the surrogate with its refit: median over "
        "the epochs of a run, then mean over seeds. Memory: the most that the training process held; on CUDA, the "
        "most that PyTorch held on the device.",
    ),
    (
        "Information",
        "Bound: I, an upper estimate, in nats, of what the noisy features tell about an image. It follows from the "
        "variances of clean features inside classes or clusters; a sample gives them, hence an estimate. Error bound: "
        "exp(−2 (I − I_none) / d), d the number of values of an image, I_none that of surrogate none at the same "
        "noise and seed. It is the factor by which the smallest mean squared error that I permits exceeds the one "
        "that I_none permits. Both may be far below what any attacker reaches, so a large factor promises nothing.",
    ),
    (
        "Variance of features",
        "Of clean features: inside classes, and of the classes' means, weighted by their samples; mean over columns. A "
        "defense takes the one away, a collapse the other too: then accuracy goes with it.",
    ),
    (
        "Controls",
        "What an attacker reaches without looking at features: answering every image with the mean image, or, "
        "knowing its class, with the mean image of the class.",
    ),
]
"""Terms of the report, and what they mean."""

VALUES = {
    "attention": "penalty of the original attention surrogate, with untrained weights",
    "slots": "how far variances inside slots exceed the threshold, with untrained weights",
    "slots_entropy": "nats a column that variances inside slots let through the noise, with untrained weights",
    "class_hinge": "log-variance inside classes over the threshold, with the mixture's γ",
    "class_entropy": "nats a column that variances inside classes let through the noise",
    "gmm": "penalty of the mixture surrogate, refitted to the trained model",
    "nats": "the information bound I",
    "class_log_variance": "mean logarithm of the variances inside classes, in units of σ²",
    "relative_variance": "variance inside classes as a fraction of all variance",
}
"""What ``attack.json`` calls the values of a trained model, whatever it was trained with, and what they are."""
