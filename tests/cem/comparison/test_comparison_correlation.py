"""Rank correlations between surrogates' values and the attack's error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from cem.comparison.correlation import correlate, spearman
from cem.comparison.grid import Run, Setting
from cem.comparison.results import RunResult


def result(value: float | None, mse: float | None, noise_std: float = 0.1) -> RunResult:
    run = Run(Setting("mixture", 16.0, noise_std), 0)
    found = RunResult(run, Path("run"), Path("run/attack"), "finished", values={"mixture": value})
    found.figures["test_mse"] = mse
    return found


def test_rho_is_that_of_the_textbook_formula() -> None:
    # ranks 1 2 3 4 5 against 2 1 4 3 5: squared differences 1 1 1 1 0, so 1 - 6 * 4 / (5 * 24) = 0.8
    assert spearman([10, 20, 30, 40, 50], [7, 2, 9, 8, 100])[0] == pytest.approx(0.8)


def test_ties_share_their_rank() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(4, size=12), rng.integers(4, size=12)
    assert spearman(list(x), list(y))[0] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)


def test_interval_contains_rho_and_is_the_same_every_time() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=15)
    y = -x + rng.normal(size=15)
    rho, low, high, note = spearman(list(x), list(y))
    assert None not in (rho, low, high)
    assert -1 <= low < rho < high <= 1  # type: ignore[operator]
    assert note == ""
    assert spearman(list(x), list(y)) == (rho, low, high, note)


def test_interval_shrinks_with_more_runs() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=200)
    y = -x + rng.normal(size=200)
    widths = []
    for n in (10, 200):
        _, low, high, _ = spearman(list(x[:n]), list(y[:n]))
        assert low is not None
        assert high is not None
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(
    ("x", "y", "note"),
    [
        ([], [], "fewer than 4 runs"),
        ([1, 2, 3], [1, 2, 3], "fewer than 4 runs"),
        ([5, 5, 5, 5], [1, 2, 3, 4], "the value is the same in all runs"),
        ([1, 2, 3, 4], [5, 5, 5, 5], "the attack MSE is the same in all runs"),
    ],
)
def test_degenerate_figures_have_no_correlation_and_say_why(x: list[float], y: list[float], note: str) -> None:
    assert spearman(x, y) == (None, None, None, note)


@pytest.mark.filterwarnings("error")
def test_resamples_without_a_correlation_are_left_out() -> None:
    # Most resamples of so few pairs with ties are constant on one side.
    rho, low, high, _ = spearman([0, 0, 0, 1], [4, 3, 2, 1])
    assert rho == pytest.approx(-0.7745966692)
    assert low is not None
    assert high is not None
    assert -1 <= low <= high <= 1


def test_correlations_are_over_all_runs_and_within_every_noise_level() -> None:
    # Within a level the value falls as the error rises; from level to level both rise.
    results = [result(10 - i, 0.01 * i, 0.1) for i in range(1, 6)]
    results += [result(100 - i, 0.1 + 0.01 * i, 0.2) for i in range(1, 6)]
    found = {each.noise_std: each for each in correlate(results)}
    assert found[0.1].rho == found[0.2].rho == pytest.approx(-1.0)
    assert found[None].rho is not None
    assert found[None].rho > 0
    assert (found[None].n, found[0.1].n) == (10, 5)


def test_single_noise_level_is_listed_once() -> None:
    assert [each.noise_std for each in correlate([result(i, 0.1 * i) for i in range(5)])] == [None]


def test_runs_without_a_value_or_an_attack_are_left_out() -> None:
    results = [result(4 - i, 0.1 * i) for i in range(4)] + [result(None, 0.1), result(1.0, None)]
    (found,) = correlate(results)
    assert (found.n, found.rho) == (4, pytest.approx(-1.0))
