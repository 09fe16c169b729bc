"""What is read from run directories, and the means, spreads and ratios that follow."""

import csv
import json
import math
import re
from dataclasses import replace

import pytest
from fake_runs import change, fake_attack, fake_training, finish, scores

from cem.attacks.config import AttackConfig
from cem.attacks.metrics import METRICS
from cem.comparison.config import Comparison
from cem.comparison.gain import fit_levels
from cem.comparison.grid import GridOptions, Run, Setting
from cem.comparison.results import FIGURES, read_results, write_table
from cem.comparison.statistics import Spread, spread, summarize
from cem.training.config import TrainConfig

NONE, MIXTURE = Setting("none", 0.0, 0.3), Setting("mixture", 16.0, 0.3)
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


def test_every_figure_is_read_from_its_file(comparison):
    first = read_results(comparison)[0]
    assert (first.status, first.worst, first.restless, first.values) == ("finished", "decoder", [], {"mixture": 0.5})
    expected = {f"worst_{name}": scores(0.020)[name] for name in METRICS}
    expected |= {f"worst_train_{name}": scores(0.019)[name] for name in METRICS}
    expected |= {f"decoder.{name}": value for name, value in scores(0.020).items()}
    expected |= {f"decoder.train_{name}": value for name, value in scores(0.019).items()}
    expected |= {f"white-box.{name}": value for name, value in scores(0.024).items()}
    expected |= {f"white-box.train_{name}": value for name, value in scores(0.0264).items()}
    for name, errors in {"mean_image": (0.086, 0.085), "class_mean": (0.052, 0.051)}.items():
        for prefix, mse in zip(("", "train_"), errors, strict=True):
            expected |= {f"{name}.{prefix}{metric}": value for metric, value in scores(mse).items()}
    expected |= {"nats": 100.0, "within_variance": 0.25, "between_variance": 0.5, "chance": 0.05}
    expected |= {"test_accuracy": 0.90, "points_lost": 0.0, "mse_ratio": 1.0, "peak_memory_bytes": 700 * 2**20}
    expected |= {"train_seconds": 12.0, "attack_seconds": 64.2}
    expected |= {"client_parameters": 15352, "client_multiply_adds": 4e6, "sent_bytes": 128}
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
    # 5 and 3 points
    assert mixture.points_lost == Spread(pytest.approx(4.0), pytest.approx(math.sqrt(2)), 2)
    # 1.5 and 2.5, and not the ratio of the means
    assert mixture.figures["mse_ratio"] == Spread(pytest.approx(2.0), pytest.approx(math.sqrt(0.5)), 2)
    assert [(row.converged, row.finished, row.planned) for row in (none, mixture)] == [(1, 2, 3), (2, 3, 3)]
    assert (spread([0.5, None]), spread([None])) == (Spread(0.5, None, 1), None)


def test_runs_are_set_against_none_behind_the_same_client(tmp_path):
    grid = GridOptions(surrogates=("none", "mixture"), seeds=(0,), cut_layer=(2, 4), adapter=(0, 1))
    accuracy = {(2, 0): 0.80, (2, 1): 0.85, (4, 0): 0.90, (4, 1): 0.95}

    def measured(run):
        client, penalized = run.setting.client, not run.setting.is_control
        return {
            "accuracy": accuracy[client.cut_layer, client.adapter] - 0.01 * penalized,
            "mse": 0.01 * (1 + penalized),
        }

    results = read_results(finish(Comparison(grid, TrainConfig(epochs=3), out=tmp_path), measured))
    found = {str(each.run.setting): (each.figures["points_lost"], each.figures["mse_ratio"]) for each in results}
    assert found["mixture λ 16, σ 0.3, cut 2"] == found["mixture λ 16, σ 0.3, adapter 1"] == pytest.approx((1, 2))
    assert [len(fit.counted) for fit in fit_levels(results).values()] == [2] * 4


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
    attacks = {"decoder": {"metrics": {"mse": 1 / 3, "ssim": None}, "converged": False}}
    worst = {"mse": {"attack": "decoder", "value": 1 / 3}, "ssim": {"attack": "decoder", "value": None}}
    information = {"nats": None, "values": {"mixture": None}}
    change(comparison.run_dir(Run(NONE, 0)), attacks=attacks, worst=worst, information=information)
    results = read_results(replace(comparison, grid=replace(comparison.grid, seeds=(0, 5))))
    write_table(results, comparison.out / "table.csv")
    with open(comparison.out / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["run"] for line in lines] == [run.run.name for run in results]
    assert float(lines[0]["worst_mse"]) == float(lines[0]["decoder.mse"]) == 1 / 3
    assert [lines[0][name] for name in ("worst_ssim", "white-box.mse", "nats", "value_mixture")] == [""] * 4
    assert {"lambd", "noise_std", "seed", *FIGURES} < set(lines[0])
    assert [lines[0][name] for name in ("cut_layer", "adapter", "bottleneck")] == ["4", "0", "noRELU_C2S2"]
    shown = [tuple(line[name] for name in ("method", "status", "test_accuracy", "not_converged")) for line in lines[:2]]
    assert shown == [("none", "finished", "0.9", "decoder"), ("none", "not begun", "", "")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("summary.json", "{", "cannot read … summary.json"),
        ("attack/attack.json", "{", "cannot read … attack.json"),
        ("attack/attack.json", '{"strongest": 1}', "attack.json is not complete: it has no knowledge"),
        ("attack/images.npz", "PK", "cannot read … images.npz: it is damaged"),
        ("metrics.csv", "epoch,lr\n1,2\n", "metrics.csv is damaged"),
    ],
)
def test_run_with_a_damaged_file_has_failed_and_costs_the_others_nothing(comparison, name, content, reason):
    (comparison.run_dir(Run(NONE, 1)) / name).write_text(content)
    found = read_results(comparison)
    assert [run.status for run in found] == ["finished", "failed", "finished", "finished"]
    assert re.search(reason.replace(" … ", ".*"), found[1].reason)
    assert found[1].reason.endswith("; move none-noise0.3-seed1 away, and the same command makes the run anew")
    assert summarize(found)[0].accuracy == Spread(0.9, None, 1)


def test_further_knowledge_has_figures_of_its_own_and_a_run_without_it_is_unfinished(tmp_path):
    grid, attack = GridOptions(surrogates=("none",), seeds=(0, 1)), AttackConfig(knowledge=("auxiliary", "training"))
    comparison = finish(Comparison(grid, TrainConfig(epochs=3), attack, tmp_path))
    path = comparison.run_dir(Run(NONE, 0)) / "attack-training" / "attack.json"
    path.write_text(path.read_text().replace('"value": 0.03}', '"value": 0.001}'))
    (comparison.run_dir(Run(NONE, 1)) / "attack-training" / "attack.json").unlink()
    first, second = read_results(comparison)
    assert (first.figures["worst_mse"], first.figures["training:worst_mse"]) == (0.03, 0.001)
    assert first.figures["training:decoder.mse"] == 0.03
    assert (first.status, second.status) == ("finished", "unfinished")
