"""What is read from run directories, and the means, spreads and ratios that follow."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from fake_runs import change, fake_attack, fake_training, finish, scores

from cem.comparison.config import Comparison
from cem.comparison.grid import GridOptions, Run, Setting
from cem.comparison.results import FIGURES, RunResult, read_results, write_table
from cem.comparison.statistics import Spread, dominated, spread, summarize
from cem.training.config import TrainConfig

NONE, MIXTURE = Setting("none", 0.0, 0.1), Setting("mixture", 16.0, 0.1)
MEASURED = {
    ("none", 0): {"accuracy": 0.90, "mse": 0.020, "values": {"mixture": 0.5}},
    ("none", 1): {"accuracy": 0.92, "mse": 0.010, "converged": False},
    ("mixture", 0): {"accuracy": 0.85, "mse": 0.030, "nats": 78.0},
    ("mixture", 1): {"accuracy": 0.89, "mse": 0.025, "converged": False},
}


@pytest.fixture
def comparison(tmp_path):
    """Two seeds of none and mixture, all finished, with figures that are easy to reckon with."""
    grid = GridOptions(surrogates=("none", "mixture"), seeds=(0, 1))
    comparison = Comparison(grid, TrainConfig(epochs=3), out=tmp_path)
    return finish(comparison, lambda run: MEASURED[run.setting.method, run.seed])


def result(setting, seed=0, **figures):
    found = RunResult(Run(setting, seed), Path("run"), Path("run/attack"), "finished")
    found.figures.update(figures)
    return found


def test_every_figure_is_read_from_its_file(comparison):
    first = read_results(comparison)[0]
    assert (first.status, first.converged, first.values) == ("finished", True, {"mixture": 0.5})
    expected = {f"test_{name}": value for name, value in scores(0.020).items()}
    expected |= {f"train_{name}": value for name, value in scores(0.019).items()}
    expected |= {"white_box_test_mse": 0.024, "white_box_decoder_test_mse": 0.022, "white_box_train_mse": 0.0264}
    expected |= {"mean_image_test_mse": 0.086, "mean_image_train_mse": 0.085, "class_mean_test_mse": 0.052}
    expected |= {"class_mean_train_mse": 0.051, "nats": 100.0, "within_variance": 0.25, "between_variance": 0.5}
    expected |= {"test_accuracy": 0.90, "accuracy_difference": 0.0, "mse_ratio": 1.0, "peak_memory_bytes": 700 * 2**20}
    expected |= {"train_seconds": 12.0, "attack_seconds": 64.2}
    # Of 1, 2 and 9 seconds the median, and a tenth of it.
    assert first.figures == pytest.approx(expected | {"seconds_per_epoch": 2.0, "surrogate_seconds_per_epoch": 0.2})


def test_rows_have_means_and_sample_deviations_over_seeds_and_are_set_against_none_seed_by_seed(comparison):
    # A third seed without its partner counts in means, but in no pair.
    more = replace(comparison, grid=replace(comparison.grid, seeds=(0, 1, 2)))
    fake_training(more, Run(MIXTURE, 2), accuracy=0.87)
    fake_attack(more, Run(MIXTURE, 2))
    none, mixture = summarize(read_results(more))
    # 0.85, 0.89 and 0.87: deviations of 0.02 from the mean, divided by n - 1 = 2
    assert mixture.accuracy == Spread(pytest.approx(0.87), pytest.approx(0.02), 3)
    # -5 and -3 points
    assert mixture.figures["accuracy_difference"] == Spread(pytest.approx(-4.0), pytest.approx(math.sqrt(2)), 2)
    # 1.5 and 2.5, and not the ratio of the means
    assert mixture.figures["mse_ratio"] == Spread(pytest.approx(2.0), pytest.approx(math.sqrt(0.5)), 2)
    assert [(row.converged, row.finished, row.planned) for row in (none, mixture)] == [(1, 2, 3), (2, 3, 3)]
    assert (spread([0.5, None]), spread([None])) == (Spread(0.5, None, 1), None)


def test_status_tells_how_far_a_run_got_and_others_count_only_while_none_is_finished(comparison):
    more = replace(comparison, grid=replace(comparison.grid, surrogates=("none",), seeds=(0, 2, 3, 4)))
    fake_training(more, Run(NONE, 2), accuracy=0.7)
    failure = {"step": "training", "exit_code": 1, "reason": "it diverged"}
    # An earlier failure of a run that is finished since then does not count.
    (more.out / "failures.json").write_text(json.dumps({Run(NONE, seed).name: failure for seed in (0, 3)}))
    found = read_results(more)
    assert [run.status for run in found] == ["finished", "unfinished", "failed", "not begun"]
    assert [run.reason for run in found] == ["", "", "its training ended with exit code 1: it diverged", ""]
    assert summarize(found)[0].accuracy == Spread(0.9, None, 1)
    assert summarize(found[1:])[0].accuracy == Spread(0.7, None, 1)


def test_table_has_a_line_a_run_in_full_precision_and_leaves_empty_what_was_not_measured(comparison):
    target, information = {"mse": 1 / 3, "psnr": 15.0, "ssim": None}, {"nats": None, "values": {"mixture": None}}
    change(comparison.run_dir(Run(NONE, 0)), test_target=target, white_box=None, information=information)
    results = read_results(replace(comparison, grid=replace(comparison.grid, seeds=(0, 5))))
    write_table(results, comparison.out / "table.csv")
    with open(comparison.out / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["run"] for line in lines] == [run.run.name for run in results]
    assert float(lines[0]["test_mse"]) == 1 / 3
    assert [lines[0][name] for name in ("test_ssim", "white_box_test_mse", "nats", "value_mixture")] == [""] * 4
    assert {"lambd", "noise_std", "seed", *FIGURES} < set(lines[0])
    shown = [tuple(line[name] for name in ("method", "status", "test_accuracy", "converged")) for line in lines[:2]]
    assert shown == [("none", "finished", "0.9", "True"), ("none", "not begun", "", "")]


def test_setting_is_dominated_by_a_more_private_one_that_is_no_less_accurate():
    louder = Setting("none", 0.0, 0.5)
    none, mixture = result(NONE, test_accuracy=0.9, test_mse=0.01), result(MIXTURE, test_accuracy=0.8, test_mse=0.02)
    assert dominated(summarize([none, mixture])) == {}
    results = [none, result(louder, test_accuracy=0.9, test_mse=0.03), mixture]
    assert dominated(summarize(results)) == {NONE: louder, MIXTURE: louder}
