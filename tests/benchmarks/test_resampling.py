"""Intervals of rank correlations where settings have several seeds."""

import numpy as np
import pytest

from benchmarks.resampling import resamples, spearman_difference
from cem.comparison.correlation import spearman


def test_difference_is_that_of_two_correlations():
    rng = np.random.default_rng(1)
    y = rng.normal(size=20)
    good, bad = y + 0.1 * rng.normal(size=20), y + rng.normal(size=20)
    difference, low, high = spearman_difference(good, bad, y, resamples(range(20)))
    assert difference == pytest.approx(spearman(good, y)[0] - spearman(bad, y)[0])
    assert 0 < low < difference < high


def test_seeds_of_a_setting_that_say_the_same_make_no_interval_narrower():
    rng = np.random.default_rng(2)
    y = rng.normal(size=9)
    x, other = y + rng.normal(size=9), rng.normal(size=9)
    thrice = [np.repeat(each, 3) for each in (x, other, y)]
    once, drawn = resamples(range(9)), resamples(np.repeat(range(9), 3).tolist())
    assert spearman(thrice[0], thrice[2], drawn=drawn) == pytest.approx(spearman(x, y, drawn=once))
    assert spearman_difference(*thrice, drawn) == pytest.approx(spearman_difference(x, other, y, once))
    _, low, high, _ = spearman(thrice[0], thrice[2])  # as if they were independent
    _, of_one_low, of_one_high, _ = spearman(x, y)
    assert high - low < of_one_high - of_one_low


def test_settings_may_have_different_numbers_of_seeds():
    rng = np.random.default_rng(3)
    x = rng.normal(size=7)
    drawn = resamples(["a", "a", "a", "b", "c", "c", "d"])
    rho, low, high, _ = spearman(x, x + rng.normal(size=7), drawn=drawn)
    assert -1 <= low <= rho <= high <= 1


def test_a_value_and_itself_differ_by_nothing_at_all():
    drawn = resamples(range(5))
    assert spearman_difference([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 3, 2, 5, 4], drawn) == (0.0, 0.0, 0.0)
