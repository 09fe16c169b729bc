"""``python -m cem.compare``: options in, exit code and report out."""

import json
import signal
from pathlib import Path

import pytest
from fake_runs import finish

from cem import compare as command
from cem.attacks import Attack
from cem.comparison import runner
from cem.comparison.config import Comparison
from cem.comparison.grid import GridOptions
from cem.training.config import TrainConfig

MIXTURE = Path("out/mixture-lambd16-noise0.3-seed0")


class Another(Attack):
    name = "another"


@pytest.fixture(autouse=True)
def _own_directory_and_handlers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture
def finished():
    """A comparison in ``out`` with nothing left to do, that was made where there is another device."""
    grid = GridOptions(surrogates=("none", "mixture"), seeds=(0,))
    comparison = finish(Comparison(grid, TrainConfig(epochs=3), out=Path("out")))
    comparison.to_yaml(Path("out/compare.yaml"), "python -m cem.compare --epochs 3")
    text = Path("out/compare.yaml").read_text()
    Path("out/compare.yaml").write_text(text.replace("device: auto", "device: cuda:99"))


def test_options_go_to_grid_training_attack_and_the_trainings_of_their_surrogate():
    variants = ["slow: {surrogate: centroid, centroid: {momentum: 0.999}}", "wide: {surrogate: attention}"]
    argv = ["--surrogates", "none", "centroid", "slow", "wide", "--variants", *variants, "--seeds", "0"]
    argv += ["--lambds", "4", "--noise-stds", "0.3", "--lr", "0.2", "--attack.decoder.lr", "0.003", "--jobs", "2"]
    argv += ["--adapter", "2"]
    comparison = command.parse([*argv, "--centroid.momentum", "0.9", "--attention.num-slots", "3"])[0].checked()
    assert (comparison.grid.lambds, comparison.grid.noise_stds, comparison.grid.jobs) == ((4.0,), (0.3,), 2)
    assert comparison.attack_config().options_of("decoder").lr == 0.003
    assert {comparison.train_config(run).adapter for run in comparison.grid.runs()} == {2}
    none, centroid, slow, wide = map(comparison.train_config, comparison.grid.runs())
    assert (none.surrogate, none.lambd, none.lr, none.seed) == ("none", 0.0, 0.2, 0)
    assert (centroid.surrogate, centroid.lambd, centroid.noise_std) == ("centroid", 4.0, 0.3)
    assert (centroid.options_of("centroid").momentum, slow.options_of("centroid").momentum) == (0.9, 0.999)
    assert wide.options_of("attention").num_slots == 3


def test_options_override_quick_and_the_config_file(finished):
    quick = command.parse(["--quick"])[0]
    assert (quick.train.data, quick.train.train_size, quick.out) == ("digits", 700, Path("runs/compare-quick"))
    assert len(quick.checked().grid.runs()) == 6
    assert command.parse(["--quick", "--epochs", "2", "--out", "x"])[0].train.epochs == 2
    comparison = command.parse(["--config", "out/compare.yaml", "--seeds", "4", "--out", "b"])[0]
    assert (comparison.grid.surrogates, comparison.grid.seeds) == (("none", "mixture"), (4,))
    assert (comparison.train.epochs, comparison.out) == (3, Path("b"))


@pytest.mark.parametrize("failed", [False, True])
def test_report_only_runs_nothing_and_ends_with_1_if_a_run_failed(finished, capsys, failed):
    (MIXTURE / "summary.json").unlink()
    if failed:
        failure = {"step": "training", "exit_code": 1, "reason": "it diverged"}
        Path("out/failures.json").write_text(json.dumps({MIXTURE.name: failure}))
    assert command.main(["--report-only", "--out", "out"]) == failed
    out, err = capsys.readouterr()
    assert ("1 of 2 finished, 1 failed\n" if failed else "runs     1 of 2 finished\nreport   out/report.html\n") in out
    assert (f"{MIXTURE.name}: its training ended with exit code 1: it diverged" in err) == failed
    assert "python -m cem.compare --epochs 3" in Path("out/report.md").read_text()
    assert not Path("out/logs").exists()


@pytest.mark.parametrize(("option", "noted"), [([], True), (["--train-size", "700"], False)])
def test_missing_images_for_the_attackers_are_noted_and_an_interrupt_says_how_to_go_on(
    monkeypatch, capsys, option, noted
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_comparison", interrupt)
    assert command.main(["--out", "a b", *option]) == 130
    _, *note, last = capsys.readouterr().err.splitlines()
    assert [line[:26] for line in note] == (["note: without --train-size"] if noted else [])
    assert last == " ".join(["interrupted; to go on: python -m cem.compare --out 'a b'", *option])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "error: --epochs must be at least 1, got 0"),
        (["--attack.decoder.networks", "resnet"], "error: --attack.decoder.networks resnet: networks are named like"),
        (["--attack.attacks", "resnet"], "error: --attack.attacks takes decoder, "),
        (["--attack.attacks", "decoder", "decoder"], "error: --attack.attacks names decoder twice"),
        (
            ["--attack.attacks", f"{__name__}:Another", "--attack.decoder.lr", "1"],
            "give --attack.attacks decoder with it",
        ),
        *(([f"--{name}", "1"], f"no option --{name}") for name in ("lambd", "noise-std", "seed", "attack.control")),
        (["--attention.num-slots", "4"], "attention, which is not chosen; give --surrogates attention with it"),
        (["--quick", "--config", "a.yaml"], "error: --quick and --config both set all options"),
        (["--report-only", "--out", "absent"], "error: --report-only: there is no comparison in absent"),
        (["--variants", "s: {slots: {num_slots: 0}}"], "--slots.num-slots must be at least 1, got 0"),
        (["--variants", "s: {slots: {num_slot: 1}}"], "no option slots.num_slot; did you mean num_slots?"),
        (["--variants", "s: {mixture: {clusters: 3}}"], "mixture is an option of mixture, which is not chosen"),
    ],
)
def test_bad_options_end_with_2_and_a_sentence_before_anything_runs(capsys, argv, message):
    chosen = ["--surrogates", "none", "s"] if "--variants" in argv else []
    assert command.main([*chosen, *argv]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()
