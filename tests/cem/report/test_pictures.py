"""Training curves and the map of features."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from cem.report.curves import draw_curves
from cem.report.tsne import MAX_SAMPLES, draw_tsne

NAMES = [str(digit) for digit in range(10)]


def history(epochs: int, rob_loss: float = 1.0) -> list[dict[str, float]]:
    return [
        {
            "epoch": epoch,
            "lr": 0.05 / epoch,
            "lambda_eff": 0.3 * epoch,
            "train_loss": 2.0 / epoch,
            "cross_entropy": 1.0 / epoch,
            "rob_loss": rob_loss / epoch,
            "intra_mse": 0.1,
            "train_accuracy": 0.9,
            "val_accuracy": 0.8,
            "seconds": 1.0,
            "surrogate_seconds": 0.5,
        }
        for epoch in range(1, epochs + 1)
    ]


def assert_drawn(path: Path) -> np.ndarray:
    pixels = matplotlib.image.imread(path)
    assert pixels.std() > 0.01, "the picture is blank"
    return pixels


@pytest.mark.parametrize("epochs", [1, 2, 60])
def test_curves_of_any_number_of_epochs_are_drawn(tmp_path: Path, epochs: int) -> None:
    draw_curves(history(epochs), tmp_path / "curves.png", best_epoch=1)
    assert_drawn(tmp_path / "curves.png")


def test_curves_without_a_penalty_are_drawn(tmp_path: Path) -> None:
    draw_curves(history(5, rob_loss=0.0), tmp_path / "curves.png")
    assert_drawn(tmp_path / "curves.png")


def test_curves_of_no_epochs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no epochs"):
        draw_curves([], tmp_path / "curves.png")


@pytest.mark.parametrize(("samples", "shape"), [(3, (2,)), (40, (8, 2, 2)), (12, (1,))])
def test_map_of_few_samples_is_drawn(tmp_path: Path, samples: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    draw_tsne(torch.randn(samples, *shape), torch.arange(samples) % 10, NAMES, tmp_path / "tsne.png")
    assert_drawn(tmp_path / "tsne.png")


def test_map_with_more_classes_than_a_legend_holds_is_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [f"class {index}" for index in range(100)]
    draw_tsne(torch.randn(50, 4), torch.arange(50), names, tmp_path / "tsne.png")
    assert_drawn(tmp_path / "tsne.png")


def test_map_takes_no_more_than_the_maximum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.manifold

    sizes = []

    class Recorder(sklearn.manifold.TSNE):
        def fit_transform(self, X: np.ndarray, y: object = None) -> np.ndarray:
            sizes.append(len(X))
            return X[:, :2]

    monkeypatch.setattr(sklearn.manifold, "TSNE", Recorder)
    draw_tsne(torch.randn(MAX_SAMPLES + 5, 3), torch.zeros(MAX_SAMPLES + 5).long(), NAMES, tmp_path / "t.png")
    assert sizes == [MAX_SAMPLES]


def test_map_of_two_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 3 samples, got 2"):
        draw_tsne(torch.randn(2, 4), torch.zeros(2).long(), NAMES, tmp_path / "tsne.png")


def test_map_of_features_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        draw_tsne(torch.full((5, 4), torch.nan), torch.zeros(5).long(), NAMES, tmp_path / "tsne.png")


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from cem.report.curves import draw_curves
draw_curves({history(2)!r}, Path({str(tmp_path / "curves.png")!r}))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
