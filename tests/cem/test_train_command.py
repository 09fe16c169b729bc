"""``python -m cem.train``: options in, exit code and run directory out."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from cem import train as command
from cem.surrogates import SURROGATES
from cem.training import TrainConfig, read_summary


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_run_says_what_it_does_where_things_are_and_what_comes_next(trained):
    summary = read_summary(trained.path)
    assert trained.err.startswith("digits: 64 images to train on, 144 to validate, 359 to test; resnet20, z ")
    assert "; no penalty; noise σ 0.3; 2 epochs of 2 steps; cpu; " in trained.err.splitlines()[0]
    assert "s to go\n" in trained.err
    assert f"test accuracy  {summary['test_accuracy']:.1%} (epoch {summary['best_epoch']} of 2)" in trained.out
    assert "\nclient         5,138 parameters; " in trained.out
    assert trained.out.endswith(f"next           python -m cem.attack {trained.path}\n")


def test_run_that_is_there_is_not_replaced_but_may_be_looked_at_again(trained, run):
    before = {path: path.read_bytes() for path in trained.path.iterdir() if path.is_file()}
    again = run(command, [], trained.path)
    assert again.code == 2
    assert f"run directory {trained.path} exists and is not empty: a finished run lies there" in again.err
    (trained.path / ".lock").touch()  # as whoever is killed after the last file leaves it
    assert "was finished already; nothing was changed" in run(command, [f"--resume={trained.path}"], trained.path).out
    assert {path: path.read_bytes() for path in trained.path.iterdir() if path.is_file()} == before


def test_the_config_of_a_run_makes_the_same_run_beside_it(trained, run):
    config = ["--config", str(trained.path / "config.yaml")]
    found = [run(command, config).out for _ in range(2)]
    name = "runs/digits-resnet20-none-noise0.3-seed0"
    for out, where in zip(found, (name, f"{name}-2"), strict=True):
        assert f"results        {where}\n" in out
        assert read_summary(where)["test_accuracy"] == read_summary(trained.path)["test_accuracy"]


def test_options_override_the_config_file_and_that_the_recommended_defaults():
    assert command.parse([])[0] == TrainConfig(surrogate="slots").checked()
    Path("mine.yaml").write_text("lr: 0.01\nepochs: 7\nsurrogate: mixture\nmixture: {clusters: 3, gamma: 0.1}\n")
    config, resume = command.parse(["--config", "mine.yaml", "--epochs", "3", "--mixture.clusters", "4"])
    assert (config.lr, config.epochs, config.surrogate, resume) == (0.01, 3, "mixture", False)
    assert config.options_of("mixture") == SURROGATES["mixture"].Options(clusters=4, gamma=0.1)


@pytest.mark.parametrize(("given", "expected"), [([], (16.0, "rising")), (["--lambd", "2"], (2.0, "rising"))])
def test_weight_and_schedule_of_a_file_are_not_another_surrogates(given, expected):
    TrainConfig(surrogate="centroid", lambd=0.3, lambd_schedule="constant").to_yaml(Path("config.yaml"))
    config = command.parse(["--config", "config.yaml", "--surrogate", "mixture", *given])[0].resolved()
    assert (config.lambd, config.lambd_schedule) == expected


def test_run_of_a_device_that_is_not_here_may_be_resumed_on_another():
    Path("run").mkdir()
    TrainConfig(device="cuda:99", capture=True).to_yaml(Path("run/config.yaml"))
    config, resume = command.parse(["--resume", "run", "--device", "cpu", "--no-capture"])
    assert (config.device, config.out, resume) == ("cpu", Path("run"), True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--surrogate none --lambd 4", "--surrogate none has no penalty to weigh"),
        ("--slots.num-slots 0", "--slots.num-slots must be at least 1, got 0"),
        ("--arch resnet21", "arch must be one of"),
        ("--resume absent", "absent holds no run: there is no absent/config.yaml"),
        ("--resume run --config b", "--resume takes its options from the run; leave out --config"),
        ("--resume run --slots.num-slots 2", "--slots.num-slots (was 4, got 2)"),
        ("--resume run --out b", "a run continues where it is, in run"),
        ("--resume run --epochs 40", "--init-from run --epochs 40 begins one with the weights of this one"),
        ("--lr 1e300", "--lr must be above 0 and at most 3.4"),
        ("--bottleneck K200001C8S1", "out of memory: the model takes at least 122,881.2 GB of"),
        ("--out old/config.yaml", "--out old/config.yaml: it exists and is no directory"),
        ("--out old/config.yaml/run", "run directory old/config.yaml/run cannot be made: "),
        ("--resume old", "error: old was made by another version: its format is None, this one reads 2\n"),
        ("--data folder --data-root absent", "absent"),
        ("--surrogate mixture --backend triton", "the surrogate mixture has no 'triton' backend"),
        ("--capture --device cpu", "--capture needs a CUDA device"),
    ],
)
def test_bad_options_end_with_2_and_a_sentence(line, message, run):
    for name in ("run", "old"):
        Path(name).mkdir()
    TrainConfig(train_size=64).to_yaml(Path("run/config.yaml"))
    Path("old/config.yaml").write_text("surrogate: attention\nmeasure: slots\n")
    said = run(command, line.split())
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert said.err.startswith("error: ")
    assert message in said.err
    assert not Path("runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_signal_ends_with_130_and_a_run_that_resumes(number):
    line = "--surrogate=none --train-size=64 --batch-size=32 --epochs=10000 --device=cpu --out=run"
    process = subprocess.Popen(
        [sys.executable, "-m", "cem.train", *line.split()],
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline, metrics = time.monotonic() + 600, Path("run/metrics.csv")
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") > 2:
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
