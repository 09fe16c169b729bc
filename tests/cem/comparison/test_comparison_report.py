"""The report of a comparison: its sentences, its tables, its files."""

import csv
import json
import shutil
from dataclasses import replace
from statistics import fmean, stdev

import matplotlib.image
import numpy as np
import pytest
from fake_runs import change, fake_training, finish

from cem.comparison import report
from cem.comparison.config import Comparison
from cem.comparison.findings import headlines
from cem.comparison.grid import GridOptions
from cem.comparison.report import write_report
from cem.comparison.results import read_results
from cem.comparison.statistics import summarize
from cem.report.numbers import with_spread
from cem.training.config import TrainConfig

MEASURED = {
    ("none", 0.1): (0.90, 0.010),
    ("mixture", 0.1): (0.88, 0.020),
    ("none", 0.2): (0.89, 0.025),
    ("mixture", 0.2): (0.80, 0.030),
}


def measured(run):
    accuracy, mse = MEASURED[run.setting.method, run.setting.noise_std]
    values = {"mixture": 1 - mse, "log_det": 5.0}
    found = {"accuracy": accuracy + 0.01 * run.seed, "mse": mse * (1 + 0.1 * run.seed), "values": values}
    return found | ({"converged": False, "white_box": 0.5} if run.name == "none-noise0.1-seed0" else {})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two seeds of none and mixture at two noise levels, all finished, and their report."""
    grid = GridOptions(surrogates=("none", "mixture"), seeds=(0, 1), noise_stds=(0.1, 0.2))
    out = tmp_path_factory.mktemp("comparison")
    comparison = finish(Comparison(grid, TrainConfig(epochs=3), out=out), measured)
    comparison.to_yaml(out / "compare.yaml", "python -m cem.compare --noise-stds 0.1 0.2")
    assert write_report(comparison, read_results(comparison)) == out / "report.html"
    return comparison


@pytest.fixture
def comparison(written, tmp_path, monkeypatch):
    """A copy of it that a test may spoil, and whose report is without pictures."""
    for draw in ("draw_tradeoff", "draw_reconstructions"):
        monkeypatch.setattr(report, draw, lambda *arguments: arguments[-1].write_bytes(b""))
    return replace(written, out=shutil.copytree(written.out, tmp_path / "out"))


def text_of(comparison):
    write_report(comparison, read_results(comparison))
    return (comparison.out / "report.md").read_text(encoding="utf-8")


def table(text, title):
    """Rows of the first table in a section of the Markdown report, its head first."""
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {len(rows[0])}
    return [rows[0], *rows[2:]]


def test_report_consists_of_these_files_and_leads_to_every_run(written):
    files = {path.name for path in written.out.iterdir() if path.is_file()}
    assert files == {"compare.yaml", "table.csv", "tradeoff.png", "reconstructions.png", "report.md", "report.html"}
    text, page = ((written.out / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    assert text.startswith("# none, mixture on ")
    for part in ("\npython -m cem.compare --noise-stds 0.1 0.2\n", "\nnoise_stds: [0.1, 0.2]\n"):
        assert part in text
    assert "- **Device**: cpu\n- **Versions**: python 3.11.7, torch 2.13.0\n" in text
    for run in written.grid.runs():
        assert f"[{run.name}]({run.name})" in text
        assert f'href="{run.name}"' in page


def test_table_of_settings_is_that_of_the_runs_means(written):
    head, *rows = table((written.out / "report.md").read_text(encoding="utf-8"), "Settings")
    with open(written.out / "table.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert [row[0] for row in rows] == [
        *("none, σ 0.1", "mixture λ 16, σ 0.1", "none, σ 0.2", "mixture λ 16, σ 0.2"),
        *("control: mean image", "control: class mean"),
    ]
    none = {(run["noise_std"], run["seed"]): run for run in runs if run["method"] == "none"}
    for run in runs:
        ratio = float(run["test_mse"]) / float(none[run["noise_std"], run["seed"]]["test_mse"])
        assert float(run["mse_ratio"]) == pytest.approx(ratio)
    for index, row in enumerate(rows[:4]):
        shown = dict(zip(head, row, strict=True))
        for title, name, factor, decimals in (
            ("accuracy: test \\[%\\]", "test_accuracy", 100, 1),
            ("accuracy: against none \\[points\\]", "accuracy_difference", 1, 1),
            ("attack, unseen: MSE", "test_mse", 1, None),
            ("attack, unseen: against none \\[×\\]", "mse_ratio", 1, 2),
            ("attack, training: MSE", "train_mse", 1, None),
            ("cost: memory \\[MiB\\]", "peak_memory_bytes", 2**-20, 0),
        ):
            values = [factor * float(run[name]) for run in runs[2 * index : 2 * index + 2]]
            relative = row[0].startswith("none") and "against none" in title
            expected = "–" if relative else with_spread(fmean(values), stdev(values), decimals=decimals)
            assert shown[title] == expected
    assert dict(zip(head, rows[-1], strict=True))["attack, unseen: MSE"] == "0.0520"


def test_headlines_follow_from_the_figures_and_promise_no_privacy(written):
    results = read_results(written)
    private, accurate, *lines = headlines(summarize(results), results)
    assert private == (
        "The attacker errs most on mixture λ 16, σ 0.2: MSE 0.0315 ± 0.0021 on unseen images, at a test accuracy of "
        "80.5 ± 0.7 %."
    )
    assert accurate.startswith("The most accurate is none, σ 0.1: test accuracy 90.5 ± 0.7 %")
    assert (
        "mixture λ 16, σ 0.1, relative to none at the same noise: 2.00 ± 0.00 times the attack MSE, −2.0 ± 0.0 points "
        "of test accuracy (2 seeds)."
    ) in lines
    assert "On average none, σ 0.2 is more private than mixture λ 16, σ 0.1, and no less accurate." in lines
    assert any(line.startswith("In 1 of 8 runs the strongest attacker had not converged") for line in lines)
    assert any(line.startswith("In 1 of 8 runs the white-box attack") for line in lines)
    assert "Nothing here is a certificate of privacy." in lines[-1]


def test_failed_run_is_named_with_its_reason_and_escaped(comparison):
    more = replace(comparison, grid=replace(comparison.grid, seeds=(0, 1, 2)))
    failures = {"none-noise0.1-seed2": {"step": "training", "exit_code": 1, "reason": "diverged <b>|"}}
    (comparison.out / "failures.json").write_text(json.dumps(failures))
    text = text_of(more)
    assert "none-noise0.1-seed2 failed: its training ended with exit code 1: diverged \\<b\\>\\|" in text
    assert table(text, "Settings")[1][1].replace("\N{NO-BREAK SPACE}", " ") == "2 of 3, 1 failed"


def test_correlations_are_listed_for_all_runs_and_every_noise(written):
    _, *rows = table((written.out / "report.md").read_text(), "Do the surrogates' values say what leaks?")
    scopes = [("all runs", "8"), ("σ 0.1", "4"), ("σ 0.2", "4")]
    assert [tuple(row[:3]) for row in rows] == [(name, *scope) for name in ("mixture", "log_det") for scope in scopes]
    assert rows[0][3].startswith("−0.9")
    assert rows[3][3:] == ["–", "–", "the value is the same in all runs"]


def test_reconstructions_are_those_of_the_first_seed_that_has_them_and_of_the_same_images(written, comparison):
    assert matplotlib.image.imread(written.out / "reconstructions.png").std() > 0.01
    attacks = [comparison.out / f"mixture-lambd16-noise{noise}-seed0" / "attack" for noise in (0.1, 0.2)]
    (attacks[0] / "images.npz").unlink()
    np.savez(attacks[1] / "images.npz", originals=np.zeros((10, 1, 8, 8), np.uint8), reconstructions=0, ssim=0)
    text = text_of(comparison)
    assert "of their features; seed 0, 1." in text
    assert "mixture-lambd16-noise0.2-seed0 is left out: it was attacked on other images." in text
    (attacks[1] / "images.npz").write_bytes(b"no images")
    assert "mixture-lambd16-noise0.2-seed0 is left out: images.npz cannot be read." in text_of(comparison)


def test_report_before_the_first_run_is_finished(tmp_path):
    comparison = Comparison(GridOptions(surrogates=("none", "mixture"), seeds=(0,)), out=tmp_path)
    fake_training(comparison, comparison.grid.runs()[0])
    text = text_of(comparison)
    assert "- No run is finished yet.\n- 2 of 2 runs are not finished" in text
    assert not (tmp_path / "tradeoff.png").exists()
    assert table(text, "Runs")[1][1] == "unfinished"


def test_report_of_one_seed_has_no_spread_and_no_column_without_figures(comparison):
    one = replace(comparison, grid=replace(comparison.grid, seeds=(0,)))
    for run in one.grid.runs():
        change(one.run_dir(run), white_box=None)
    settings = " ".join(cell for row in table(text_of(one), "Settings") for cell in row)
    assert "MSE" in settings
    assert "±" not in settings
    assert "white-box" not in settings
