"""The report of a comparison: its sentences, its tables, its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from fake_runs import IMAGES, fake_attack, fake_training

from cem.comparison import report
from cem.comparison.config import Comparison
from cem.comparison.findings import headlines
from cem.comparison.grid import GridOptions, Run, Setting
from cem.comparison.report import write_report
from cem.comparison.results import read_results
from cem.comparison.statistics import summarize
from cem.training.config import TrainConfig


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Two seeds of none and mixture at two noise levels, all finished."""
    grid = GridOptions(surrogates=("none", "mixture"), seeds=(0, 1), noise_stds=(0.1, 0.2))
    comparison = Comparison(grid, TrainConfig(epochs=3), out=tmp_path)
    comparison.to_yaml(tmp_path / "compare.yaml", "python -m cem.compare --noise-stds 0.1 0.2")
    figures = {("none", 0.1): (0.90, 0.010), ("mixture", 0.1): (0.88, 0.020), ("none", 0.2): (0.89, 0.025)}
    figures["mixture", 0.2] = (0.80, 0.030)
    for run in grid.runs():
        accuracy, mse = figures[run.setting.method, run.setting.noise_std]
        fake_training(comparison, run, accuracy=accuracy + 0.01 * run.seed)
        fake_attack(comparison, run, mse=mse * (1 + 0.1 * run.seed), values={"mixture": 1 - mse, "log_det": 5.0})
    return comparison


@pytest.fixture
def _quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""

    def draw(*arguments: Any) -> None:
        arguments[-1].write_bytes(b"")

    monkeypatch.setattr(report, "draw_tradeoff", draw)
    monkeypatch.setattr(report, "draw_reconstructions", draw)


def written(comparison: Comparison) -> str:
    write_report(comparison, read_results(comparison))
    return (comparison.out / "report.md").read_text(encoding="utf-8")


def lines_of(comparison: Comparison) -> list[str]:
    results = read_results(comparison)
    return headlines(summarize(results), results)


def table(text: str, title: str) -> list[list[str]]:
    """Rows of the first table in a section of the Markdown report, its head first."""
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {len(rows[0])}
    return [rows[0], *rows[2:]]


def test_report_consists_of_these_files(comparison: Comparison) -> None:
    assert write_report(comparison, read_results(comparison)) == comparison.out / "report.html"
    files = {path.name for path in comparison.out.iterdir() if path.is_file()}
    assert files == {"compare.yaml", "table.csv", "tradeoff.png", "reconstructions.png", "report.md", "report.html"}


@pytest.mark.parametrize(("more", "title"), [(0, "# none, mixture, attention on "), (4, "# 7 methods on ")])
def test_title_names_methods_as_long_as_they_are_few(comparison: Comparison, more: int, title: str) -> None:
    names = ("none", "mixture", "attention", *(f"v{index}" for index in range(more)))
    variants = tuple(f"{name}: {{epochs: 3}}" for name in names[3:])
    more_methods = replace(comparison.grid, surrogates=names, variants=variants)
    assert written(replace(comparison, grid=more_methods)).startswith(title)


def test_headlines_name_the_most_private_and_the_most_accurate_setting(comparison: Comparison) -> None:
    private, accurate = lines_of(comparison)[:2]
    assert private == (
        "The attacker errs most on mixture λ 16, σ 0.2: MSE 0.0315 ± 0.0021 on unseen images, at a test accuracy of "
        "80.5 ± 0.7 %."
    )
    assert accurate.startswith("The most accurate is none, σ 0.1: test accuracy 90.5 ± 0.7 %")


def test_headlines_set_every_penalty_against_none(comparison: Comparison) -> None:
    assert (
        "mixture λ 16, σ 0.1, relative to none at the same noise: 2.00 ± 0.00 times the attack MSE, −2.0 ± 0.0 points "
        "of test accuracy (2 seeds)."
    ) in lines_of(comparison)


def test_headlines_say_where_noise_alone_does_better(comparison: Comparison) -> None:
    assert "On average none, σ 0.2 is more private than mixture λ 16, σ 0.1, and no less accurate." in lines_of(
        comparison
    )


def test_headlines_never_promise_privacy(comparison: Comparison) -> None:
    assert "Nothing here is a certificate of privacy." in lines_of(comparison)[-1]


def test_headlines_count_attackers_that_had_not_converged(comparison: Comparison) -> None:
    path = comparison.out / "none-noise0.1-seed0" / "attack" / "attack.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "converged": False}))
    assert any(
        line.startswith("In 1 of 8 runs the strongest attacker had not converged") for line in lines_of(comparison)
    )


def test_headlines_count_runs_that_a_white_box_attack_inverts_better(comparison: Comparison) -> None:
    path = comparison.out / "none-noise0.1-seed0" / "attack" / "attack.json"
    attack = json.loads(path.read_text())
    attack["white_box"]["test_target"]["mse"] = 0.0001
    path.write_text(json.dumps(attack))
    assert "In 1 of 8 runs the white-box attack" in "\n".join(lines_of(comparison))


@pytest.mark.usefixtures("_quick_pictures")
def test_table_has_a_row_a_setting_and_the_controls(comparison: Comparison) -> None:
    head, *rows = table(written(comparison), "Settings")
    assert [row[0] for row in rows] == [
        *("none, σ 0.1", "mixture λ 16, σ 0.1", "none, σ 0.2", "mixture λ 16, σ 0.2"),
        *("control: mean image", "control: class mean"),
    ]
    mixture = dict(zip(head, rows[1], strict=True))
    assert mixture["runs"] == "2"
    assert mixture["accuracy: test \\[%\\]"] == "88.5 ± 0.7"
    assert mixture["accuracy: against none \\[points\\]"] == "−2.0 ± 0.0"
    assert mixture["attack, unseen: MSE"] == "0.0210 ± 0.0014"
    assert mixture["attack, unseen: against none \\[×\\]"] == "2.00 ± 0.00"
    assert mixture["cost: memory \\[MiB\\]"] == "700 ± 0"
    assert dict(zip(head, rows[-1], strict=True))["attack, unseen: MSE"] == "0.0520"


@pytest.mark.usefixtures("_quick_pictures")
def test_none_is_not_set_against_itself(comparison: Comparison) -> None:
    head, none, *_ = table(written(comparison), "Settings")
    assert dict(zip(head, none, strict=True))["attack, unseen: against none \\[×\\]"] == "–"


@pytest.mark.usefixtures("_quick_pictures")
def test_column_without_figures_is_left_out(tmp_path: Path) -> None:
    comparison = Comparison(GridOptions(surrogates=("none",), seeds=(0,)), out=tmp_path)
    run = comparison.grid.runs()[0]
    fake_training(comparison, run)
    fake_attack(comparison, run, white_box=False)
    assert not any("white-box" in title for title in table(written(comparison), "Settings")[0])


@pytest.mark.usefixtures("_quick_pictures")
def test_failed_run_is_named_with_its_reason_and_escaped(comparison: Comparison) -> None:
    more = replace(comparison, grid=replace(comparison.grid, seeds=(0, 1, 2)))
    failures = {"none-noise0.1-seed2": {"step": "training", "exit_code": 1, "reason": "diverged <b>|"}}
    (comparison.out / "failures.json").write_text(json.dumps(failures))
    text = written(more)
    assert "none-noise0.1-seed2 failed: its training ended with exit code 1: diverged \\<b\\>\\|" in text
    assert table(text, "Settings")[1][1].replace("\N{NO-BREAK SPACE}", " ") == "2 of 3, 1 failed"
    assert "diverged &lt;b&gt;|" in (comparison.out / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("_quick_pictures")
def test_correlations_are_listed_for_all_runs_and_every_noise(comparison: Comparison) -> None:
    _, *rows = table(written(comparison), "Do the surrogates' values say what leaks?")
    assert [row[:3] for row in rows] == [
        *(["mixture", "all runs", "8"], ["mixture", "σ 0.1", "4"], ["mixture", "σ 0.2", "4"]),
        *(["log_det", "all runs", "8"], ["log_det", "σ 0.1", "4"], ["log_det", "σ 0.2", "4"]),
    ]
    assert rows[0][3].startswith("−0.9")
    assert "- **log_det**: ½ log det" in written(comparison)
    assert "- **mixture**: of an untrained surrogate, assessed on the trained model's features" in written(comparison)
    assert rows[3][3:] == ["–", "–", "the value is the same in all runs"]


@pytest.mark.usefixtures("_quick_pictures")
def test_report_has_command_options_versions_and_device(comparison: Comparison) -> None:
    text = written(comparison)
    assert "\npython -m cem.compare --noise-stds 0.1 0.2\n" in text
    assert "\nnoise_stds: [0.1, 0.2]\n" in text
    assert "- **Versions**: python 3.11.7, torch 2.13.0\n" in text
    assert "- **Device**: cpu\n" in text


@pytest.mark.usefixtures("_quick_pictures")
def test_report_leads_to_every_run(comparison: Comparison) -> None:
    page, text = (comparison.out / "report.html"), written(comparison)
    for run in comparison.grid.runs():
        assert f"[{run.name}]({run.name})" in text
        assert f'href="{run.name}"' in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("_quick_pictures")
def test_reconstructions_are_those_of_the_first_seed_that_has_them(comparison: Comparison) -> None:
    (comparison.out / "mixture-lambd16-noise0.1-seed0" / "attack" / "images.npz").unlink()
    assert "of their features; seed 0, 1." in written(comparison)


def test_reconstructions_of_other_images_are_left_out(comparison: Comparison) -> None:
    path = comparison.out / "mixture-lambd16-noise0.1-seed0" / "attack" / "images.npz"
    np.savez(path, originals=np.zeros((IMAGES, 1, 8, 8), np.uint8), reconstructions=0, ssim=0)
    assert "mixture-lambd16-noise0.1-seed0 is left out: it was attacked on other images." in written(comparison)
    assert matplotlib.image.imread(comparison.out / "reconstructions.png").std() > 0.01


@pytest.mark.usefixtures("_quick_pictures")
def test_report_before_the_first_run_is_finished(tmp_path: Path) -> None:
    comparison = Comparison(GridOptions(surrogates=("none", "mixture"), seeds=(0,)), out=tmp_path)
    fake_training(comparison, Run(Setting("none", 0.0, 0.1), 0))
    text = written(comparison)
    assert "- No run is finished yet.\n- 2 of 2 runs are not finished" in text
    assert not (tmp_path / "tradeoff.png").exists()
    assert table(text, "Runs")[1][1] == "unfinished"


@pytest.mark.usefixtures("_quick_pictures")
def test_report_of_one_seed_has_no_spread(comparison: Comparison) -> None:
    one = replace(comparison, grid=replace(comparison.grid, seeds=(0,)))
    assert "±" not in "".join(cell for row in table(written(one), "Settings") for cell in row)
