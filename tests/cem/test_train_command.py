"""``python -m cem.train``: options in, exit code and run directory out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from cem import train as command
from cem.options import hints
from cem.surrogates import SURROGATES
from cem.training import TrainConfig, read_summary

SMALL = ["--surrogate=none", "--train-size=64", "--batch-size=32", "--epochs=1", "--device=cpu"]
SET_SIGNAL = signal.signal  # which the tests replace


@pytest.fixture(autouse=True)
def _own_directory_and_handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("cem.training.trainer.draw_tsne", lambda *_, **__: None)
    monkeypatch.setattr("cem.training.trainer.draw_curves", lambda *_, **__: None)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    for name in (*hints(TrainConfig), *hints(command.Sources), "centroid.momentum"):
        assert f" --{name.replace('_', '-')}" in text


def test_run_ends_with_where_things_are_and_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(SMALL) == 0
    run_dir = Path("runs/digits-resnet20-none-noise0.1-seed0")
    summary = read_summary(run_dir)
    assert summary is not None
    out = capsys.readouterr().out
    assert f"test accuracy  {summary['test_accuracy']:.1%} (epoch 1 of 1)" in out
    assert out.endswith(f"next           python -m cem.attack {run_dir}\n")


def test_second_run_under_the_same_options_lies_beside_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (Path(f"runs/digits-resnet20-none-noise0.1-seed0{suffix}") for suffix in ("", "-2"))
    assert command.main(SMALL) == 0
    before = {path: path.read_bytes() for path in first.iterdir()}
    assert command.main(SMALL) == 0
    assert {path: path.read_bytes() for path in first.iterdir()} == before
    assert read_summary(second) is not None
    assert f"results        {second}\n" in capsys.readouterr().out


def test_run_directory_asked_for_by_name_is_not_replaced_by_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*SMALL, "--out", "run"]) == 0
    assert command.main([*SMALL, "--out", "run"]) == 2
    assert "run directory run exists and is not empty: a finished run lies there" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["run"]


@pytest.mark.parametrize(
    "options",
    [[], ["--surrogate", "mixture", "--train-size", "32", "--penalty-from", "1"]],
    ids=["in its second step", "before its refit"],
)
def test_diverged_run_ends_with_1_and_says_why_once(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert command.main([*SMALL, "--lr", "1e30", "--warmup-epochs", "0", *options]) == 1
    err = capsys.readouterr().err
    assert err.count("training diverged; lower --lr") == 1
    assert "Traceback" not in err


def test_options_override_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lr: 0.01\nepochs: 7\nsurrogate: mixture\nmixture: {clusters: 3, gamma: 0.1}\n")
    config, resume = command.parse(["--config", "mine.yaml", "--epochs", "3", "--mixture.clusters", "4"])
    assert (config.lr, config.epochs, config.surrogate, resume) == (0.01, 3, "mixture", False)
    assert config.options_of("mixture") == SURROGATES["mixture"].Options(clusters=4, gamma=0.1)


def test_what_is_recommended_is_the_default() -> None:
    assert command.parse([])[0] == TrainConfig(surrogate="centroid").checked()


@pytest.mark.parametrize("name", [*SURROGATES, "gmm"])
def test_every_surrogate_can_be_chosen(name: str) -> None:
    config, _ = command.parse(["--surrogate", name])
    assert config.surrogate == SURROGATES[name].name
    assert config.options_of(config.surrogate) == SURROGATES[name].Options()


def test_config_of_a_run_makes_the_same_run_elsewhere(tmp_path: Path) -> None:
    assert command.main([*SMALL, "--out", "a"]) == 0
    assert command.main(["--config", "a/config.yaml", "--out", "b"]) == 0
    a, b = read_summary("a"), read_summary("b")
    assert a is not None
    assert b is not None
    assert (a["test_accuracy"], a["best_epoch"]) == (b["test_accuracy"], b["best_epoch"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--epochs", "many"], "--epochs takes a whole number, got 'many'"),
        (["--surrogate", "kmeans"], "--surrogate takes none, mixture, attention, centroid, or package.module:Class"),
        (["--no-such-option", "1"], "there is no option --no-such-option"),
        (["--centroid.momentum", "1"], "--centroid.momentum must be above 0 and below 1, got 1.0"),
        (["--arch", "resnet21"], "arch must be one of"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
        (["--config", "absent.yaml"], "cannot read options from absent.yaml"),
        (["--resume", "absent"], "cannot read options from absent/config.yaml"),
        (["--resume", "a", "--config", "b"], "--resume takes its options from the run; leave out --config"),
        (["--data", "folder", "--data-root", "absent"], "absent"),
        (["--surrogate", "mixture", "--backend", "triton"], "the surrogate mixture has no 'triton' backend"),
        (["--capture", "--device", "cpu"], "--capture needs a CUDA device"),
    ],
)
def test_bad_options_end_with_2_and_a_sentence(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert command.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not Path("runs").exists()


def test_run_of_another_version_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("surrogate: attention\nmeasure: slots\n")
    assert command.main(["--resume", "run"]) == 2
    assert capsys.readouterr().err == "error: run was made by another version: its format is None, this one reads 2\n"


def test_finished_run_says_so_when_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*SMALL, "--out", "run"]) == 0
    assert command.main(["--resume", "run"]) == 0
    assert "was finished already; nothing was changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--lr", "0.1"], "--lr (was 0.05, got 0.1)"),
        (["--centroid.momentum", "0.9"], "--centroid.momentum (was 0.99, got 0.9)"),
        (["--out", "b"], "a run continues where it is, in run"),
    ],
)
def test_resuming_with_another_option_is_refused(
    capsys: pytest.CaptureFixture[str], option: list[str], message: str
) -> None:
    Path("run").mkdir()
    TrainConfig(train_size=64).to_yaml(Path("run/config.yaml"))
    assert command.main(["--resume", "run", *option]) == 2
    assert message in capsys.readouterr().err


def test_run_of_a_device_that_is_not_here_may_be_resumed_on_another() -> None:
    Path("run").mkdir()
    TrainConfig(device="cuda:99", capture=True).to_yaml(Path("run/config.yaml"))
    config, resume = command.parse(["--resume", "run", "--device", "cpu", "--no-capture"])
    assert (config.device, config.out, resume) == ("cpu", Path("run"), True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_signal_ends_with_130_and_a_run_that_resumes(tmp_path: Path, number: signal.Signals) -> None:
    options = [*SMALL, "--epochs", "10000", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cem.train", *options],
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=partial(SET_SIGNAL, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if Path("run/metrics.csv").exists() and Path("run/metrics.csv").read_text().count("\n") > 2:
            break
        time.sleep(0.05)
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()  # if it did not end, it must not go on for ever
    assert process.returncode == 130
    assert "Resume with: python -m cem.train --resume run" in err
    assert "Traceback" not in err
    assert command.parse(["--resume", "run"])[1]


def test_weight_and_schedule_of_a_file_are_not_another_surrogates(tmp_path: Path) -> None:
    TrainConfig(surrogate="centroid", lambd=0.3, lambd_schedule="constant").to_yaml(tmp_path / "config.yaml")
    config, _ = command.parse(["--config", str(tmp_path / "config.yaml"), "--surrogate", "attention"])
    assert (config.resolved().lambd, config.resolved().lambd_schedule) == (16.0, "rising")
    config, _ = command.parse(["--config", str(tmp_path / "config.yaml"), "--surrogate", "attention", "--lambd", "2"])
    assert config.lambd == 2.0


def test_a_weight_for_no_penalty_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--surrogate", "none", "--lambd", "4"]) == 2
    assert "--surrogate none has no penalty to weigh" in capsys.readouterr().err
