"""Rank correlations between surrogates' values and the attack's error."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from cem.comparison.correlation import correlate, spearman
from cem.comparison.grid import Run, Setting
from cem.comparison.results import RunResult


def result(value, mse, noise_std=0.1):
    run = Run(Setting("mixture", 16.0, noise_std), 0)
    found = RunResult(run, Path("run"), Path("run/attack"), "finished", values={"mixture": value})
    found.figures["worst_mse"] = mse
    return found


def test_rho_is_that_of_the_textbook_formula_and_ties_share_their_rank():
    # ranks 1 2 3 4 5 against 2 1 4 3 5: squared differences 1 1 1 1 0, so 1 - 6 * 4 / (5 * 24) = 0.8
    assert spearman([10, 20, 30, 40, 50], [7, 2, 9, 8, 100])[0] == pytest.approx(0.8)
    x, y = np.random.default_rng(0).integers(4, size=(2, 12))
    assert spearman(list(x), list(y))[0] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)


@pytest.mark.filterwarnings("error")
def test_interval_contains_rho_shrinks_with_more_runs_and_is_the_same_every_time():
    x, noise = np.random.default_rng(2).normal(size=(2, 200))
    few, many = (spearman(list(x[:n]), list((noise - x)[:n])) for n in (10, 200))
    for rho, low, high, note in (few, many):
        assert -1 <= low < rho < high <= 1
        assert note == ""
    assert many[2] - many[1] < (few[2] - few[1]) / 2
    assert spearman(list(x[:10]), list((noise - x)[:10])) == few
    # Most resamples of so few pairs with ties are constant on one side, and left out.
    rho, low, high, _ = spearman([0, 0, 0, 1], [4, 3, 2, 1])
    assert rho == pytest.approx(-0.7745966692)
    assert -1 <= low <= high <= 1


def test_degenerate_figures_have_no_correlation_and_say_why():
    none = (None, None, None)
    assert spearman([1, 2, 3], [1, 2, 3]) == (*none, "fewer than 4 runs")
    assert spearman([5, 5, 5, 5], [1, 2, 3, 4]) == (*none, "the value is the same in all runs")
    assert spearman([1, 2, 3, 4], [5, 5, 5, 5]) == (*none, "the attack MSE is the same in all runs")


def test_correlations_are_over_all_runs_and_within_every_noise_level():
    # Within a level the value falls as the error rises; from level to level both rise.
    results = [result(10 - i, 0.01 * i, 0.1) for i in range(1, 6)]
    results += [result(100 - i, 0.1 + 0.01 * i, 0.2) for i in range(1, 6)]
    found = {each.level: each for each in correlate(results)}
    assert found["σ 0.1"].rho == found["σ 0.2"].rho == pytest.approx(-1.0)
    assert found[None].rho > 0
    assert (found[None].n, found["σ 0.1"].n) == (10, 5)


def test_runs_without_a_value_or_an_attack_are_left_out_and_a_single_noise_level_is_listed_once():
    (found,) = correlate([result(4 - i, 0.1 * i) for i in range(4)] + [result(None, 0.1), result(1.0, None)])
    assert (found.level, found.n, found.rho) == (None, 4, pytest.approx(-1.0))
