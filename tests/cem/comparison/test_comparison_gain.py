"""Gains at equal accuracy, on runs whose truth is known."""

import math
from pathlib import Path

import numpy as np
import pytest

from cem.comparison.gain import Fit, Observation, fit_levels
from cem.comparison.grid import Run, Setting
from cem.comparison.results import RunResult

TRUE = {"none": 0.0, "mixture": math.log(1.2), "centroid": math.log(1.5)}
SLOPE = 0.1  # of the log error, a point lost


def runs(seed=0, seeds=5, points=(0.3, 0.8, 1.6), scatter=0.07, offsets=0.3):
    """A control, and two methods at several prices, under errors that differ from seed to seed."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(seeds):
        offset = random.normal(0, offsets)
        for method, effect in TRUE.items():
            for lost in points if effect else (0.0,):
                lost += random.uniform(-0.2, 0.2) if effect else 0.0
                error = math.log(0.01) + effect + SLOPE * lost + offset + random.normal(0, scatter)
                found.append(Observation(method, number, lost, math.exp(error)))
    return found


@pytest.fixture(scope="module")
def fits():
    return [Fit(runs(seed)) for seed in range(500)]


@pytest.mark.parametrize(("method", "over"), [("centroid", "mixture"), ("mixture", "none"), ("none", "centroid")])
def test_interval_covers_the_truth_in_about_95_of_100_comparisons(fits, method, over):
    truth = math.exp(TRUE[method] - TRUE[over])
    gains = [fit.gain(method, over) for fit in fits]
    assert 0.93 < np.mean([each.low < truth < each.high for each in gains]) < 0.97
    assert np.median([each.factor for each in gains]) == pytest.approx(truth, rel=0.02)


def test_slope_scatter_and_degrees_of_freedom_are_those_of_the_runs():
    fit = Fit(runs(scatter=0.07, seeds=40))
    assert (fit.slope, fit.scatter) == (pytest.approx(SLOPE, abs=0.03), pytest.approx(0.07, rel=0.15))
    assert fit.df == 40 * 7 - 3 - 1 - 39  # runs, methods, slope, seeds but one
    assert Fit(runs(scatter=0)).gain("centroid", "mixture").factor == pytest.approx(1.25)


def test_what_is_paid_in_accuracy_is_no_gain():
    # Two methods on one curve, one of which pays more and errs more.
    one_curve = [
        Observation(method, seed, lost, 0.01 * math.exp(SLOPE * lost))
        for seed in range(3)
        for method, prices in {"none": [0.0], "cheap": [0.2, 0.4], "dear": [1.5, 1.9]}.items()
        for lost in prices
    ]
    assert Fit(one_curve).gain("dear", "cheap").factor == pytest.approx(1.0)


def test_offsets_of_seeds_cancel_also_where_a_run_is_missing():
    calm, wild = (Fit(runs(offsets=offsets)[:-1]).gain("centroid", "none") for offsets in (0.0, 2.0))
    assert (calm.factor, calm.low, calm.high) == pytest.approx((wild.factor, wild.low, wild.high))


@pytest.mark.parametrize(("lost", "counts"), [(-0.1, False), (0.0, True), (100 * (0.9 - 0.88), True), (2.1, False)])
def test_runs_count_from_0_to_2_points_lost(lost, counts):
    odd = Observation("centroid", 0, lost, 1.0)
    fit = Fit([*runs(), odd])
    assert (odd in fit.counted) == counts
    assert (fit.gain("centroid", "none") != Fit(runs()).gain("centroid", "none")) == counts


def test_fewer_than_12_degrees_of_freedom_are_a_direction_and_so_is_a_single_seed():
    # A seed brings four runs and takes one degree; methods and slope take four of the first.
    for seeds, df, called in ((4, 9, "direction"), (5, 12, "claim")):
        gain = Fit(runs(seeds=seeds, points=(0.5,)) + runs(1, seeds, (1.0,))[2::3]).gain("centroid", "mixture")
        assert (gain.df, gain.called, gain.note) == (df, called, "")
    one = Fit(runs(seeds=1, points=np.linspace(0.3, 1.7, 9))).gain("centroid", "mixture")
    assert (one.df, one.called, one.note) == (15, "direction", "one seed: how trainings scatter is not known")


@pytest.mark.parametrize(
    ("found", "factor", "note"),
    [
        ([], None, "no run of centroid has lost 0 to 2 points"),
        ([Observation("centroid", 0, 0.5, 0.02)], None, "no run of none has lost 0 to 2 points"),
        (runs(seeds=1, points=(0.5,)), None, "too few runs to tell the method from the price in accuracy"),
        ([Observation("none", 0, 0, 0.01), Observation("centroid", 0, 0, 0.02)], 2.0, "as many unknowns as runs"),
    ],
    ids=["nothing", "no control", "one run each", "equal accuracy"],
)
def test_designs_that_tell_nothing_say_so(found, factor, note):
    gain = Fit(found).gain("centroid", "none")
    assert (gain.factor, gain.low) == (factor if factor is None else pytest.approx(factor), None)
    assert gain.note.startswith(note)


def test_levels_of_noise_are_told_apart_and_only_finished_runs_beside_a_control_count():
    results = []
    for noise, status, lost in ((0.1, "finished", 1.0), (0.1, "failed", 0.5), (0.2, "finished", 0.0), (0.3, "", None)):
        result = RunResult(Run(Setting("mixture", 16.0, noise), 0), Path(), Path(), status)
        result.figures |= {"points_lost": lost, "worst_mse": 0.02}
        results.append(result)
    fits = fit_levels(results)
    assert {level: [each.points_lost for each in fit.counted] for level, fit in fits.items()} == {
        "σ 0.1": [1],
        "σ 0.2": [0],
    }
