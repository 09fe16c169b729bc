"""Curves over λ, and what is read off them at equal accuracy."""

from __future__ import annotations

import math

import pytest

from cem.comparison import Setting
from cem.comparison.matched import Curve, curves
from cem.comparison.results import FIGURES
from cem.comparison.statistics import Row, Spread


def row(surrogate: str, lambd: float, accuracy: float | None, mse: float = 0.01, noise_std: float = 0.1) -> Row:
    figures: dict[str, Spread | None] = dict.fromkeys(FIGURES)
    if accuracy is not None:
        figures |= {"test_accuracy": Spread(accuracy, None, 1), "test_mse": Spread(mse, None, 1)}
    return Row(Setting(surrogate, lambd, noise_std), 1, int(accuracy is not None), 0, 0, figures)


def curve(*points: tuple[float, float]) -> Curve:
    return Curve("gmm", 0.1, points)


def test_a_setting_at_this_accuracy_has_its_own_error() -> None:
    assert curve((0.90, 0.010), (0.88, 0.020), (0.80, 0.050)).mse_at(2.0) == pytest.approx(0.020)


def test_between_settings_the_logarithm_of_the_error_is_straight() -> None:
    assert curve((0.90, 0.010), (0.88, 0.040)).mse_at(1.0) == pytest.approx(math.sqrt(0.010 * 0.040))


def test_below_the_last_setting_nothing_is_claimed() -> None:
    assert curve((0.90, 0.010), (0.88, 0.020)).mse_at(2.1) is None


def test_of_several_passes_the_last_counts() -> None:
    assert curve((0.90, 0.01), (0.88, 0.02), (0.90, 0.03), (0.88, 0.04)).mse_at(2.0) == pytest.approx(0.04)


def test_a_weight_that_helps_accuracy_costs_nothing_yet() -> None:
    rising = curve((0.90, 0.010), (0.91, 0.020), (0.89, 0.040))
    assert rising.mse_at(0.0) == pytest.approx(math.sqrt(0.020 * 0.040))


def test_a_setting_is_compared_with_a_curve_at_its_own_accuracy() -> None:
    assert curve((0.90, 0.010), (0.88, 0.040)).times(row("other", 1.0, 0.89, 0.03)) == pytest.approx(1.5)


@pytest.mark.parametrize(
    "other",
    [
        row("gmm", 16.0, 0.89),
        row("none", 0.0, 0.90),
        row("other", 1.0, 0.89, noise_std=0.2),
        row("other", 1.0, 0.87),
        row("other", 1.0, 0.91),
        row("other", 1.0, None),
    ],
    ids=["its own", "none", "another noise", "less accurate", "more accurate", "not finished"],
)
def test_a_setting_that_a_curve_says_nothing_about(other: Row) -> None:
    assert curve((0.90, 0.010), (0.88, 0.040)).times(other) is None


def test_a_curve_begins_at_none_and_follows_the_weight() -> None:
    rows = [row("gmm", 64.0, 0.7, 0.03), row("none", 0.0, 0.9), row("gmm", 16.0, 0.8, 0.02), row("gmm", 256.0, None)]
    (found,) = curves(rows)
    assert (found.surrogate, found.points) == ("gmm", ((0.9, 0.01), (0.8, 0.02), (0.7, 0.03)))


def test_every_noise_has_curves_of_its_own() -> None:
    rows = [row(name, lambd, 0.9, noise_std=std) for std in (0.1, 0.2) for name, lambd in (("none", 0.0), ("gmm", 16))]
    assert [(each.noise_std, len(each.points)) for each in curves(rows)] == [(0.1, 2), (0.2, 2)]


@pytest.mark.parametrize("none", [[], [row("none", 0.0, None)], [row("none", 0.0, 0.9, noise_std=0.2)]])
def test_without_none_at_this_noise_there_is_no_curve(none: list[Row]) -> None:
    assert curves([*none, row("gmm", 16.0, 0.8)]) == []
