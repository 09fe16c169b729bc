"""``python -m cem.train``: options in, exit code and run directory out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest

from cem import train as command
from cem.training import TrainConfig, read_summary
from cem.training.presets import PRESETS

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
    for field in (*fields(TrainConfig), *fields(command.CommandLine)):
        assert f"--{field.name.replace('_', '-')}" in text


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
    [[], ["--surrogate", "gmm", "--train-size", "32", "--penalty-from", "1"]],
    ids=["in its second step", "before its refit"],
)
def test_diverged_run_ends_with_1_and_says_why_once(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert command.main([*SMALL, "--lr", "1e30", "--warmup-epochs", "0", *options]) == 1
    err = capsys.readouterr().err
    assert err.count("training diverged; lower --lr") == 1
    assert "Traceback" not in err


def test_options_override_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lr: 0.01\nepochs: 7\nsurrogate: gmm\n")
    config, resume = command.parse(["--config", "mine.yaml", "--epochs", "3"])
    assert (config.lr, config.epochs, config.surrogate, resume) == (0.01, 3, "gmm", False)


def test_a_preset_overrides_the_config_file_and_is_overridden_by_options(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lr: 0.01\nsurrogate: none\nvar_threshold: 0.5\n")
    config, _ = command.parse(["--config", "mine.yaml", "--preset", "gmm", "--lambd", "3"])
    assert (config.lr, config.surrogate, config.var_threshold, config.lambd) == (0.01, "gmm", 0.125, 3.0)


def test_what_is_recommended_is_the_default() -> None:
    assert command.parse(["--preset", "attention"])[0] == TrainConfig().resolved()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_trained(name: str) -> None:
    config, _ = command.parse(["--preset", name])
    config.validate()
    assert {option: getattr(config, option) for option in PRESETS[name]} == PRESETS[name]


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
        (["--epochs", "0"], "error: --epochs must be finite and at least 1, got 0"),
        (["--arch", "resnet21"], "error: arch must be one of"),
        (["--device", "cuda:99"], "error: --device cuda:99: PyTorch sees"),
        (["--config", "absent.yaml"], "error: cannot read options from absent.yaml"),
        (["--resume", "absent"], "error: cannot read options from absent/config.yaml"),
        (["--resume", "a", "--config", "b"], "error: --resume takes its options from the run"),
        (["--resume", "a", "--preset", "gmm"], "error: --resume takes its options from the run"),
        (["--data", "folder", "--data-root", "absent"], "error: "),
        (["--surrogate", "gmm", "--backend", "triton"], "the gmm surrogate has no 'triton' backend"),
        (["--capture", "--device", "cpu"], "error: --capture needs a CUDA device"),
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


@pytest.mark.parametrize("argv", [["--epochs", "many"], ["--surrogate", "kmeans"], ["--no-such-option", "1"]])
def test_options_that_cannot_be_read_end_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        command.main(argv)
    assert done.value.code == 2


def test_finished_run_says_so_when_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*SMALL, "--out", "run"]) == 0
    assert command.main(["--resume", "run"]) == 0
    assert "was finished already; nothing was changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [(["--lr", "0.1"], "--lr (was 0.05, got 0.1)"), (["--out", "b"], "a run continues where it is, in run")],
)
def test_resuming_with_another_option_is_refused(
    capsys: pytest.CaptureFixture[str], option: list[str], message: str
) -> None:
    Path("run").mkdir()
    TrainConfig(surrogate="none", train_size=64).to_yaml(Path("run/config.yaml"))
    assert command.main(["--resume", "run", *option]) == 2
    assert message in capsys.readouterr().err


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
