"""What is read from run directories, and the means, spreads and ratios that follow."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from fake_runs import fake_attack, fake_training

from cem.comparison.config import Comparison
from cem.comparison.grid import GridOptions, Run, Setting
from cem.comparison.results import FIGURES, RunResult, read_results, write_table
from cem.comparison.statistics import Spread, dominated, spread, summarize
from cem.errors import UsageError
from cem.training.config import TrainConfig

NONE, MIXTURE = Setting("none", 0.0, 0.1), Setting("mixture", 16.0, 0.1)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Two seeds of none and mixture, all finished, with figures that are easy to reckon with."""
    comparison = Comparison(
        GridOptions(surrogates=("none", "mixture"), seeds=(0, 1)), TrainConfig(epochs=3), out=tmp_path
    )
    for setting, seed, accuracy, mse, nats in [
        (NONE, 0, 0.90, 0.020, 110.0),
        (NONE, 1, 0.92, 0.010, 120.0),
        (MIXTURE, 0, 0.85, 0.030, 78.0),
        (MIXTURE, 1, 0.89, 0.025, 88.0),
    ]:
        fake_training(comparison, Run(setting, seed), accuracy=accuracy)
        fake_attack(
            comparison, Run(setting, seed), mse=mse, nats=nats, converged=seed == 0, values={"mixture": seed + 0.5}
        )
    return comparison


def rows(comparison: Comparison) -> dict[Setting, dict[str, Spread | None]]:
    return {row.setting: row.figures for row in summarize(read_results(comparison))}


def result(setting: Setting, seed: int = 0, **figures: float) -> RunResult:
    found = RunResult(Run(setting, seed), Path("run"), Path("run/attack"), "finished")
    found.figures.update(figures)
    return found


def test_every_figure_is_read_from_its_file(comparison: Comparison) -> None:
    first = read_results(comparison)[0]
    psnr = -10 * math.log10(0.020)
    assert first.status == "finished"
    assert first.converged is True
    assert first.values == {"mixture": 0.5}
    assert first.figures == pytest.approx(
        {
            "test_accuracy": 0.90,
            "test_mse": 0.020,
            "test_psnr": psnr,
            "test_ssim": 0.5,
            "train_mse": 0.019,
            "train_psnr": -10 * math.log10(0.019),
            "train_ssim": 0.5,
            "white_box_test_mse": 0.024,
            "white_box_decoder_test_mse": pytest.approx(0.022),
            "white_box_train_mse": 0.026,
            "seconds_per_epoch": 2.0,
            "surrogate_seconds_per_epoch": 0.2,
            "train_seconds": 12.0,
            "attack_seconds": 64.2,
            "peak_memory_bytes": 700 * 2**20,
            "nats": 110.0,
            "within_variance": 0.25,
            "between_variance": 0.5,
            "accuracy_difference": 0.0,
            "mse_ratio": 1.0,
            "mean_image_test_mse": 0.086,
            "mean_image_train_mse": 0.085,
            "class_mean_test_mse": 0.052,
            "class_mean_train_mse": 0.051,
        }
    )


def test_seconds_per_epoch_are_the_median(tmp_path: Path) -> None:
    comparison = Comparison(GridOptions(surrogates=("none",), seeds=(0,)), out=tmp_path)
    fake_training(comparison, Run(NONE, 0), seconds=(30.0, 1.0, 2.0, 4.0))
    (found,) = read_results(comparison)
    assert found.figures["seconds_per_epoch"] == 3.0


def test_mean_and_sample_standard_deviation_over_seeds(comparison: Comparison) -> None:
    accuracy = rows(comparison)[MIXTURE]["test_accuracy"]
    assert accuracy is not None
    # 0.85 and 0.89: mean 0.87, deviations of 0.02, divided by n - 1 = 1: sqrt(2 * 0.02 ** 2)
    assert (accuracy.mean, accuracy.std, accuracy.n) == pytest.approx((0.87, 0.02 * math.sqrt(2), 2))


def test_accuracies_are_compared_seed_by_seed(comparison: Comparison) -> None:
    difference = rows(comparison)[MIXTURE]["accuracy_difference"]
    assert difference is not None
    # -5 and -3 points
    assert (difference.mean, difference.std, difference.n) == pytest.approx((-4.0, math.sqrt(2), 2))


def test_ratio_is_the_mean_of_the_seeds_ratios(comparison: Comparison) -> None:
    ratio = rows(comparison)[MIXTURE]["mse_ratio"]
    assert ratio is not None
    # 1.5 and 2.5, and not the ratio of the means, 0.0275 / 0.015
    assert (ratio.mean, ratio.std) == pytest.approx((2.0, math.sqrt(0.5)))


def test_runs_are_compared_at_their_own_noise(tmp_path: Path) -> None:
    grid = GridOptions(surrogates=("none", "mixture"), seeds=(0,), noise_stds=(0.1, 0.2))
    comparison = Comparison(grid, out=tmp_path)
    mse = {("none", 0.1): 0.01, ("none", 0.2): 0.02, ("mixture", 0.1): 0.03, ("mixture", 0.2): 0.08}
    for run in grid.runs():
        fake_training(comparison, run)
        fake_attack(comparison, run, mse=mse[run.setting.method, run.setting.noise_std])
    ratios = {run.run.setting.noise_std: run.figures["mse_ratio"] for run in read_results(comparison)[1::2]}
    assert ratios == pytest.approx({0.1: 3.0, 0.2: 4.0})


def test_run_whose_partner_is_missing_counts_in_means_but_in_no_pair(comparison: Comparison) -> None:
    more = replace(comparison, grid=replace(comparison.grid, seeds=(0, 1, 2)))
    fake_training(more, Run(MIXTURE, 2), accuracy=0.87)
    fake_attack(more, Run(MIXTURE, 2))
    figures = rows(more)[MIXTURE]
    assert figures["test_accuracy"] is not None
    assert figures["accuracy_difference"] is not None
    assert (figures["test_accuracy"].n, figures["accuracy_difference"].n) == (3, 2)


def test_a_run_that_is_not_attacked_yet_counts_only_while_none_is() -> None:
    trained = [result(MIXTURE, seed, test_accuracy=accuracy) for seed, accuracy in enumerate((0.8, 0.6))]
    for each in trained:
        each.status = "unfinished"
    attacked = result(MIXTURE, 2, test_accuracy=0.9, test_mse=0.1)
    (row,) = summarize(trained)
    assert row.accuracy is not None
    assert row.accuracy.mean == pytest.approx(0.7)
    (row,) = summarize([*trained, attacked])
    assert row.accuracy == Spread(0.9, None, 1)


def test_single_run_has_no_spread() -> None:
    assert spread([0.5, None]) == Spread(0.5, None, 1)


def test_no_run_has_no_mean() -> None:
    assert spread([None]) is None


def test_converged_attacks_are_counted(comparison: Comparison) -> None:
    assert [(row.converged, row.finished, row.planned) for row in summarize(read_results(comparison))] == [
        (1, 2, 2),
        (1, 2, 2),
    ]


def test_figures_that_are_null_stay_empty(comparison: Comparison) -> None:
    path = comparison.out / "mixture-lambd16-noise0.1-seed0" / "attack" / "attack.json"
    attack = json.loads(path.read_text())
    attack["test_target"]["ssim"] = None
    attack["white_box"] = None
    attack["information"] = {"nats": None, "image_dims": 64, "values": {"mixture": None}}
    path.write_text(json.dumps(attack))
    found = {run.run: run for run in read_results(comparison)}[Run(MIXTURE, 0)]
    for name in ("test_ssim", "white_box_test_mse", "nats"):
        assert found.figures[name] is None, name
    assert found.values == {"mixture": None}
    assert found.status == "finished"


def test_status_tells_how_far_a_run_got(comparison: Comparison) -> None:
    more = replace(comparison, grid=replace(comparison.grid, surrogates=("none",), seeds=(0, 2, 3, 4)))
    fake_training(more, Run(NONE, 2))
    (more.out / "failures.json").write_text(
        json.dumps({Run(NONE, 3).name: {"step": "training", "exit_code": 1, "reason": "it diverged"}})
    )
    found = read_results(more)
    assert [run.status for run in found] == ["finished", "unfinished", "failed", "not begun"]
    assert found[2].reason == "its training ended with exit code 1: it diverged"


def test_failure_of_an_earlier_time_does_not_count_against_a_finished_run(comparison: Comparison) -> None:
    (comparison.out / "failures.json").write_text(
        json.dumps({Run(NONE, 0).name: {"step": "attack", "exit_code": 1, "reason": "once"}})
    )
    assert read_results(comparison)[0].status == "finished"


def test_runs_of_other_options_are_not_compared(comparison: Comparison) -> None:
    with pytest.raises(UsageError, match=r"--epochs \(was 3, got 4\)"):
        read_results(replace(comparison, train=replace(comparison.train, epochs=4)))


def test_table_has_a_line_a_run_in_full_precision(comparison: Comparison) -> None:
    results = read_results(comparison)
    results[0].figures["test_mse"] = 1 / 3
    write_table(results, comparison.out / "table.csv")
    with open(comparison.out / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["run"] for line in lines] == [run.run.name for run in results]
    assert float(lines[0]["test_mse"]) == 1 / 3
    assert {"method", "lambd", "noise_std", "seed", "status", "attacker", "converged", "value_mixture"} < set(lines[0])
    assert set(FIGURES) < set(lines[0])


def test_table_leaves_empty_what_was_not_measured(comparison: Comparison) -> None:
    more = replace(comparison, grid=replace(comparison.grid, seeds=(5,)))
    write_table(read_results(more), comparison.out / "table.csv")
    with open(comparison.out / "table.csv", newline="") as file:
        line = next(csv.DictReader(file))
    assert (line["status"], line["test_mse"], line["attacker"]) == ("not begun", "", "")


def test_setting_is_dominated_by_a_more_private_one_that_is_no_less_accurate() -> None:
    louder = Setting("none", 0.0, 0.5)
    results = [
        result(NONE, test_accuracy=0.9, test_mse=0.01),
        result(louder, test_accuracy=0.9, test_mse=0.03),
        result(MIXTURE, test_accuracy=0.85, test_mse=0.02),
    ]
    assert dominated(summarize(results)) == {NONE: louder, MIXTURE: louder}


def test_setting_that_is_more_private_or_more_accurate_is_not_dominated() -> None:
    results = [result(NONE, test_accuracy=0.9, test_mse=0.01), result(MIXTURE, test_accuracy=0.8, test_mse=0.02)]
    assert dominated(summarize(results)) == {}
