"""``python -m cem.compare``: options in, exit code and report out."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from fake_runs import fake_attack, fake_training

from cem import compare as command
from cem.attacks.config import AttackConfig
from cem.comparison import report, runner
from cem.comparison.config import Comparison
from cem.comparison.grid import GridOptions
from cem.options import hints
from cem.training.config import TrainConfig


@pytest.fixture(autouse=True)
def _own_directory_and_handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture
def finished() -> Comparison:
    """A comparison in ``out`` with nothing left to do."""
    comparison = Comparison(
        GridOptions(surrogates=("none", "mixture"), seeds=(0,)), TrainConfig(epochs=3), out=Path("out")
    )
    comparison.out.mkdir()
    comparison.to_yaml(Path("out/compare.yaml"), "python -m cem.compare --epochs 3")
    for run in comparison.grid.runs():
        fake_training(comparison, run)
        fake_attack(comparison, run)
    return comparison


OPTIONS = ["--surrogates", "none", "mixture", "--seeds", "0", "--epochs", "3", "--out", "out"]


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    replaced = {"surrogate", "lambd", "noise_std", "seed", "capture"}
    names = {*hints(GridOptions), *hints(TrainConfig)} - replaced
    names |= {f"attack.{name}" for name in hints(AttackConfig)} - {"attack.control"}
    for name in names | {"config", "quick", "report-only", "mixture.clusters", "centroid.momentum"}:
        assert f"--{name.replace('_', '-')} " in text.replace(",", " "), name


@pytest.mark.parametrize("option", ["--surrogate", "--lambd", "--noise-std", "--seed", "--capture", "--attack.control"])
def test_options_that_the_grid_sets_are_none(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert command.main([option, "1"]) == 2
    assert f"error: there is no option {option}" in capsys.readouterr().err


def test_options_go_to_grid_training_and_attack() -> None:
    comparison = command.parse(
        ["--lambds", "4", "8", "--noise-stds", "0.3", "--lr", "0.2", "--attack.lr", "0.003", "--jobs", "2"]
    )[0]
    assert (comparison.grid.lambds, comparison.grid.noise_stds, comparison.grid.jobs) == ((4.0, 8.0), (0.3,), 2)
    assert (comparison.train.lr, comparison.attack_config().lr) == (0.2, 0.003)
    comparison.checked()


def test_options_of_surrogates_go_to_their_trainings() -> None:
    methods = ["none", "centroid", "slow", "wide"]
    variants = ["slow: {centroid: {momentum: 0.999}}", "wide: {surrogate: attention}"]
    argv = ["--surrogates", *methods, "--variants", *variants, "--seeds", "0"]
    comparison = command.parse([*argv, "--centroid.momentum", "0.97", "--attention.num-slots", "3"])[0].checked()
    none, centroid, slow, wide = map(comparison.train_config, comparison.grid.runs())
    assert none.surrogate == "none"
    assert (centroid.options_of("centroid").momentum, slow.options_of("centroid").momentum) == (0.97, 0.999)
    assert wide.options_of("attention").num_slots == 3


def test_options_override_quick() -> None:
    quick = command.parse(["--quick"])[0]
    assert (quick.train.data, quick.train.train_size, quick.out) == ("digits", 700, Path("runs/compare-quick"))
    assert command.parse(["--quick", "--epochs", "2", "--out", "x"])[0].train.epochs == 2


def test_quick_is_a_comparison_that_can_be_run() -> None:
    comparison = command.parse(["--quick"])[0]
    comparison.checked()  # raises if an option cannot be used
    assert len(comparison.grid.runs()) == 6


def test_options_override_the_config_file(finished: Comparison) -> None:
    comparison = command.parse(["--config", "out/compare.yaml", "--seeds", "4", "--out", "b"])[0]
    assert (comparison.grid.surrogates, comparison.grid.seeds) == (("none", "mixture"), (4,))
    assert (comparison.train.epochs, comparison.out) == (3, Path("b"))


def test_finished_comparison_only_gets_its_report(finished: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(OPTIONS) == 0
    out = capsys.readouterr().out
    assert "runs     2 of 2 finished\nreport   out/report.html\n" in out
    assert Path("out/report.html").exists()
    assert Path("out/compare.yaml").read_text().startswith("# python -m cem.compare --surrogates none mixture ")


@pytest.mark.parametrize(("option", "noted"), [([], True), (["--train-size", "700"], False)])
def test_missing_images_for_the_attackers_are_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: list[str], noted: bool
) -> None:
    monkeypatch.setattr(runner, "run_comparison", lambda *_: None)
    monkeypatch.setattr(report, "write_report", lambda *_: Path("report.html"))
    assert command.main(["--surrogates", "none", "--seeds", "0", *option]) == 0
    assert ("without --train-size" in capsys.readouterr().err) is noted


def test_report_only_runs_nothing_and_takes_the_options_from_the_folder(
    finished: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path("out/mixture-lambd16-noise0.1-seed0/summary.json")).unlink()
    assert command.main(["--report-only", "--out", "out"]) == 0
    assert "runs     1 of 2 finished\n" in capsys.readouterr().out
    assert "python -m cem.compare --epochs 3" in Path("out/report.md").read_text()
    assert not Path("out/logs").exists()


def test_report_needs_no_device_that_the_runs_were_on(finished: Comparison) -> None:
    path = Path("out/compare.yaml")
    path.write_text(path.read_text().replace("device: auto", "device: cuda:99"))
    assert command.main(["--report-only", "--out", "out"]) == 0


def test_failed_run_ends_with_1_and_its_reason(finished: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    (Path("out/mixture-lambd16-noise0.1-seed0/summary.json")).unlink()
    Path("out/failures.json").write_text(
        '{"mixture-lambd16-noise0.1-seed0": {"step": "training", "exit_code": 1, "reason": "it diverged"}}'
    )
    assert command.main(["--report-only", "--out", "out"]) == 1
    captured = capsys.readouterr()
    assert "mixture-lambd16-noise0.1-seed0: its training ended with exit code 1: it diverged" in captured.err
    assert "1 of 2 finished, 1 failed" in captured.out


def test_interrupt_ends_with_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_comparison", interrupt)
    assert command.main(["--out", "a b", "--train-size", "700"]) == 130
    assert capsys.readouterr().err == "interrupted; to go on: python -m cem.compare --out 'a b' --train-size 700\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "error: --epochs must be at least 1, got 0"),
        (["--epoch", "3"], "error: there is no option --epoch; did you mean --epochs?"),
        (["--lambds", "0"], "error: --lambds must be finite and above 0"),
        (["--centroid.momentum", "1"], "error: --centroid.momentum must be above 0 and below 1"),
        (["--attention.num-slots", "4"], "attention, which is not chosen; give --surrogates attention with it"),
        (["--attack.queries", "0"], "error: --attack.queries must be at least 1"),
        (["--config", "absent.yaml"], "error: cannot read options from absent.yaml"),
        (["--quick", "--config", "a.yaml"], "error: --quick and --config both set all options"),
        (["--report-only", "--out", "absent"], "error: --report-only: there is no comparison in absent"),
    ],
)
def test_bad_options_end_with_2_and_a_sentence(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert command.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("s: {centroid: {momentum: 2}}", "--centroid.momentum must be above 0 and below 1, got 2"),
        ("s: {centroid: {momentun: 0.9}}", "there is no option centroid.momentun; did you mean momentum?"),
        ("s: {mixture: {clusters: 3}}", "mixture is an option of mixture, which is not chosen"),
        ("s: {surrogate: kmeans}", "--surrogate takes none, mixture, attention, centroid"),
        ("s: {epochs: 1}", "--penalty-from must be at most --epochs 1"),
        ("s: {noise_std: 1}", "--variants: s cannot set 'noise_std'"),
    ],
)
def test_a_variant_that_cannot_be_trained_ends_with_2_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variant: str, message: str
) -> None:
    monkeypatch.setattr(runner, "run_comparison", lambda *_: pytest.fail("it runs"))
    assert command.main(["--surrogates", "none", "s", "--variants", variant]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_runs_of_other_options_end_with_2_and_their_name(
    finished: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*OPTIONS, "--lr", "0.1"]) == 2
    assert "trained under other options: --lr (was 0.05, got 0.1)" in capsys.readouterr().err


@pytest.mark.slow
def test_comparison_is_made_and_not_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--surrogates",
        "none",
        "mixture",
        "--seeds",
        "0",
        "--train-size",
        "64",
        "--epochs",
        "2",
        "--device",
        "cpu",
    ]
    options += ["--attack.attackers", "res_normN1C8", "--attack.max-epochs", "4", "--attack.white-box-images", "0"]
    assert command.main(options) == 0
    out = Path("runs/compare")
    before = {path: path.read_bytes() for path in out.glob("*-seed0/**/*.json")}
    assert len(before) == 4
    assert "runs     2 of 2 finished" in capsys.readouterr().out
    assert command.main(options) == 0
    assert "of which 2 are finished" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.glob("*-seed0/**/*.json")} == before
