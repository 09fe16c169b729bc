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

from cem.attacks.config import AttackConfig
from cem.comparison import pictures, report
from cem.comparison.config import Comparison
from cem.comparison.findings import headlines, lead, shown_settings
from cem.comparison.gain import fit_levels
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
    for module, draw in ((report, "draw_tradeoff"), (pictures, "draw_reconstructions")):
        monkeypatch.setattr(module, draw, lambda *arguments: arguments[-1].write_bytes(b""))
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
    assert text.startswith(
        "# none, mixture on digits: resnet20, 3 epochs, 2 seeds; attackers who have images of their own\n"
    )
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
        ratio = float(run["worst_mse"]) / float(none[run["noise_std"], run["seed"]]["worst_mse"])
        assert float(run["mse_ratio"]) == pytest.approx(ratio)
    more_head, *more = table((written.out / "report.md").read_text(encoding="utf-8"), "More figures of every setting")
    assert len(head) == 7
    for index, (row, other) in enumerate(zip(rows[:4], more, strict=True)):
        shown = dict(zip([*head, *more_head], [*row, *other], strict=True))
        for title, name, factor, decimals in (
            ("accuracy \\[%\\]", "test_accuracy", 100, 1),
            ("points lost", "points_lost", 1, 1),
            ("worst attack: MSE", "worst_mse", 1, None),
            ("worst attack: identified \\[%\\]", "worst_identified", 100, 0),
            ("worst attack: MSE over none's \\[×\\]", "mse_ratio", 1, 2),
            ("on training images: MSE", "worst_train_mse", 1, None),
            ("cost: memory \\[MiB\\]", "peak_memory_bytes", 2**-20, 0),
        ):
            values = [factor * float(run[name]) for run in runs[2 * index : 2 * index + 2]]
            relative = row[0].startswith("none") and "none's" in title
            expected = "–" if relative else with_spread(fmean(values), stdev(values), decimals=decimals)
            assert shown[title] == expected
    assert dict(zip(head, rows[-1], strict=True))["worst attack: MSE"] == "0.0520"


def test_headlines_follow_from_the_figures_and_promise_no_privacy(written):
    results = read_results(written)
    rows = summarize(results)
    assert lead(rows) == (
        "On mixture λ 16, σ 0.1 the worst attack has 3.00 ± 1.41 times the error that it has on none, σ 0.1: MSE "
        "0.0210 against 0.00800, SSIM 0.50 against 0.50, 60 against 60 % of images identified (chance 5 %), for "
        "2.0 ± 0.0 points of accuracy."
    )
    gain, *lines = headlines(rows, results, fit_levels(results))
    assert gain.startswith("At equal accuracy nothing can be said of mixture over none: too few runs")
    assert lines[0] == "The worst attack by MSE, of 8 runs: decoder in 7, white-box in 1."
    assert lines[1].startswith("In 1 of 8 runs an attack had not converged (decoder)")
    assert "Nothing here is a certificate of privacy." in lines[-1]


@pytest.mark.parametrize(("lost", "shown"), [({1: 1, 4: 2, 16: 9}, 4), ({1: 3, 4: 4, 16: 9}, 1)])
def test_setting_that_stands_for_all_costs_little_or_the_least_of_all(tmp_path, lost, shown):
    grid = GridOptions(surrogates=("none", "mixture"), lambds=(1.0, 4.0, 16.0), seeds=(0,))

    def curve(run):
        return {"accuracy": 0.9 - lost.get(run.setting.lambd, 0) / 100, "mse": 0.01 * (1 + run.setting.lambd)}

    comparison = finish(Comparison(grid, TrainConfig(epochs=3), out=tmp_path), curve)
    control, best = shown_settings(summarize(read_results(comparison)))
    assert (control.setting.is_control, best.setting.lambd) == (True, shown)


@pytest.mark.parametrize(("seeds", "called"), [((0, 1), "; direction"), (tuple(range(7)), "")])
def test_gain_is_over_the_first_penalty_and_says_whether_it_is_a_claim(tmp_path, monkeypatch, seeds, called):
    variant = "wide: {surrogate: mixture, lambd: [1, 2]}"
    grid = GridOptions(surrogates=("none", "mixture", "wide"), variants=(variant,), lambds=(4.0, 8.0), seeds=seeds)
    mse = {"none": 0.01, "mixture": 0.02, "wide": 0.03}

    def curve(run):
        lost = run.setting.lambd / 8
        return {"accuracy": 0.9 - lost / 100, "mse": mse[run.setting.method] * 1.1**lost * (1 + run.seed)}

    monkeypatch.setattr(report, "correlate", lambda results: [])  # which takes its time
    text = text_of(finish(Comparison(grid, TrainConfig(epochs=3), out=tmp_path), curve))
    shown = {row[0]: row[5] for row in table(text, "Settings")}
    assert shown["setting"] == "gain at equal accuracy: over mixture \\[×\\]"
    assert shown["wide λ 1, σ 0.3"] == shown["wide λ 2, σ 0.3"] == f"1.50 (1.50 to 1.50{called})"
    assert shown["none, σ 0.3"] == f"0.50 (0.50 to 0.50{called})"
    assert shown["mixture λ 4, σ 0.3"] == "–"
    sentence = "At equal accuracy wide leaves attackers 3.00 times the error of none (95 %: 3.00 to 3.00; "
    assert sentence in text
    assert ("a direction and not a claim" in text.split("## ")[0]) == bool(called)


def test_failed_run_is_named_with_its_reason_and_escaped(comparison):
    more = replace(comparison, grid=replace(comparison.grid, seeds=(0, 1, 2)))
    failures = {"none-noise0.1-seed2": {"step": "training", "exit_code": 1, "reason": "diverged <b>|"}}
    (comparison.out / "failures.json").write_text(json.dumps(failures))
    text = text_of(more)
    assert "none-noise0.1-seed2 failed: its training ended with exit code 1: diverged \\<b\\>\\|" in text
    assert table(text, "Settings")[1][0] == "none, σ 0.1 (2 of 3 runs, 1 failed)"


def test_correlations_are_listed_for_all_runs_and_every_noise(written):
    _, *rows = table((written.out / "report.md").read_text(), "Do the surrogates' values say what leaks?")
    scopes = [("all runs", "8"), ("σ 0.1", "4"), ("σ 0.2", "4")]
    assert [tuple(row[:3]) for row in rows] == [(name, *scope) for name in ("mixture", "log_det") for scope in scopes]
    assert rows[0][3].startswith("−0.9")
    assert rows[3][3:] == ["–", "–", "the value is the same in all runs"]


def test_pictures_are_the_undefended_worst_every_attack_on_the_best_and_the_class_mean(
    written, comparison, monkeypatch
):
    assert matplotlib.image.imread(written.out / "reconstructions.png").std() > 0.01
    drawn = []
    monkeypatch.setattr(pictures, "draw_reconstructions", lambda originals, rows, path: drawn.append([*rows]))
    shown, results = shown_settings(summarize(read_results(comparison))), read_results(comparison)
    assert "Unseen images of seed 0, " in pictures.draw_pictures(shown, results, comparison.out).description
    defended = [f"mixture λ 16, σ 0.1: {name}" for name in ("decoder, the worst attack", "white-box")]
    assert drawn.pop() == ["none, σ 0.1: white-box, the worst attack", *defended, "class mean"]
    # Seed 0 without the same images in both: the next seed's.
    path = comparison.out / "mixture-lambd16-noise0.1-seed0" / "attack" / "images.npz"
    other = dict(np.load(path)) | {"originals": np.zeros((10, 1, 8, 8), np.uint8)}
    np.savez(path, **other)
    assert "Unseen images of seed 1, " in pictures.draw_pictures(shown, results, comparison.out).description
    assert pictures.draw_pictures(shown, [each for each in results if each.run.seed == 0], comparison.out) is None


def test_second_knowledge_has_a_table_of_its_own_and_stands_in_the_title(tmp_path):
    both = AttackConfig(knowledge=("auxiliary", "training"))
    grid = GridOptions(surrogates=("none",), seeds=(0,))
    comparison = finish(Comparison(grid, TrainConfig(epochs=3), both, tmp_path))
    text = text_of(comparison)
    assert "; attackers who have images of their own, and attackers who have the target's training images\n" in text
    (row,) = table(text, "Settings: attackers who have the target's training images")[1:]
    assert row[:3] == ["none, σ 0.3", "90.0", "0.0300"]


def test_report_before_the_first_run_is_finished(tmp_path):
    comparison = Comparison(GridOptions(surrogates=("none", "mixture"), seeds=(0,)), out=tmp_path)
    fake_training(comparison, comparison.grid.runs()[0])
    text = text_of(comparison)
    assert "\n\nNo run is finished yet.\n\n- 2 of 2 runs are not finished" in text
    assert not (tmp_path / "tradeoff.png").exists()
    assert table(text, "Runs")[1][1] == "unfinished"


def test_report_of_one_seed_has_no_spread_and_no_column_without_figures(comparison):
    one = replace(comparison, grid=replace(comparison.grid, seeds=(0,)))
    for run in one.grid.runs():
        change(one.run_dir(run), worst_train_target=None)
    text = text_of(one)
    cells = " ".join(
        cell for title in ("Settings", "More figures of every setting") for row in table(text, title) for cell in row
    )
    assert "MSE" in cells
    assert "±" not in cells
    assert "training images" not in cells


def test_several_clients_have_a_frontier_of_settings_that_no_other_beats_and_their_work_in_the_table(tmp_path):
    grid = GridOptions(surrogates=("none", "mixture"), seeds=(0,), cut_layer=(2, 4))
    found = {
        (2, "none"): (0.90, 0.01),
        (2, "mixture"): (0.88, 0.03),
        (4, "none"): (0.91, 0.02),
        (4, "mixture"): (0.85, 0.03),
    }

    def measured(run):
        accuracy, mse = found[run.setting.client.cut_layer, run.setting.method]
        return {"accuracy": accuracy, "mse": mse}

    text = text_of(finish(Comparison(grid, TrainConfig(epochs=3), out=tmp_path), measured))
    assert text.startswith("# none, mixture on digits: resnet20, 2 clients, 3 epochs, 1 seed;")
    # The same error as at the other cut, for twice the work and three points more, is no bargain.
    head, *rows = table(text, "Where to cut")
    assert [row[0] for row in rows] == ["none, σ 0.3, cut 2", "mixture λ 16, σ 0.3, cut 2", "none, σ 0.3"]
    assert (len(head), [row[1] for row in rows]) == (7, ["2.00", "2.00", "4.00"])
    assert "![" in text.split("## Where to cut")[1].split("##")[0]
    assert (tmp_path / "frontier.png").exists()
    settings = table(text, "Settings")
    assert (len(settings[0]), settings[0][-1], settings[1][-1]) == (7, "client: multiply-adds \\[M\\]", "2.00")
