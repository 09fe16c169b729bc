"""Pictures of an attack: drawn, complete, and readable back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from cem.report import attack_curves, reconstructions
from cem.report.attack_curves import draw_attack_curves
from cem.report.reconstructions import draw_reconstructions


def attacker(name: str, *, converged: bool) -> dict[str, object]:
    curve = [{"epoch": n, "val_mse": 0.1 / n} for n in (1, 2, 3)]
    return {"name": name, "curve": curve, "best_epoch": 3, "converged": converged}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The figures that were saved, and saving still works."""
    saved: list[object] = []
    for module in (attack_curves, reconstructions):
        save = module.save_figure
        monkeypatch.setattr(module, "save_figure", lambda fig, path, save=save: (saved.append(fig), save(fig, path)))
    return saved


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_has_the_originals_over_a_row_for_every_name(tmp_path: Path, figures: list, channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, channels, 8, 8), dtype=np.uint8)
    rows = {"mixture": (images // 2, np.array([0.1, 0.2, 0.3, 0.4])), "attention": (images, None)}
    draw_reconstructions(images, rows, tmp_path / "grid.png")
    axes = figures[0].axes
    assert len(axes) == 3 * 4
    assert [axes[row * 4].get_ylabel() for row in range(3)] == ["original", "mixture", "attention"]
    assert [each.get_xlabel() for each in axes[4:8]] == ["0.10", "0.20", "0.30", "0.40"]
    shown = np.asarray(axes[5].images[0].get_array())
    expected = images[1] // 2
    assert np.array_equal(shown, expected[0] if channels == 1 else np.moveaxis(expected, 0, -1))
    assert imread(tmp_path / "grid.png").shape[0] > 100


def test_curves_tell_converged_decoders_from_others(tmp_path: Path, figures: list) -> None:
    attackers = [attacker("deconvC64", converged=True), attacker("res_normN8C64", converged=False)]
    draw_attack_curves(attackers, {"mean image": 0.09, "class mean": 0.05}, tmp_path / "curves.png")
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert labels == ["deconvC64", "res_normN8C64 (not converged)", "mean image", "class mean"]
    assert imread(tmp_path / "curves.png").shape[0] > 100


def test_more_attackers_than_colors_still_differ(tmp_path: Path, figures: list) -> None:
    draw_attack_curves([attacker(str(n), converged=True) for n in range(9)], {}, tmp_path / "curves.png")
    lines = [line for line in figures[0].axes[0].lines if line.get_label() in list("012345678")]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9


def test_no_attackers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no attackers"):
        draw_attack_curves([], {}, tmp_path / "curves.png")
