"""Runs that are killed at any moment, and runs that begin at the same one."""

import multiprocessing
import os
import random
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import yaml
from small_runs import content, tiny

from cem import train as command
from cem.models import split
from cem.training import read_summary
from cem.training import trainer as trainer_module

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="needs a server of forks")]
TINY = "--arch=tiny --cut-layer=1 --train-size=32 --batch-size=16 --device=cpu --threads=1"
FILES = {"config.yaml", "metrics.csv", "summary.json", "train.log", "last.pt", "best.pt"}


def trains(line, folder, begin):
    """In a process of its own: the command, with the small network, when the others are as far."""
    torch.set_num_threads(1)
    split._BUILDERS["tiny"], split.ARCHITECTURES = tiny, (*split.ARCHITECTURES, "tiny")
    trainer_module.draw_tsne = trainer_module.draw_curves = lambda *_, **__: None
    os.chdir(folder)
    begin.wait(600)
    with open(f"{folder}.log", "a", buffering=1) as said, redirect_stderr(said), redirect_stdout(said):
        sys.exit(command.main(line.split()))


@pytest.fixture(scope="module")
def start():
    """Starts processes that have imported everything already, together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.tensorboard", "sklearn.datasets", "cem.training.trainer"])

    def start(folder, *lines):
        folder.mkdir(exist_ok=True)
        begin = context.Barrier(len(lines) + 1)
        processes = [context.Process(target=trains, args=(line, folder, begin)) for line in lines]
        for process in processes:
            process.start()
        begin.wait(600)
        return processes

    return start


def names(run_dir):
    return {path.name for path in run_dir.iterdir() if not path.name.startswith("events.out.tfevents")}


def test_runs_that_are_killed_twenty_times_are_the_undisturbed_run_and_leave_nothing_else(tmp_path, start):
    line = f"{TINY} --surrogate=mixture --epochs=12"
    folder, moments = tmp_path / "killed", random.Random(0)
    (process,) = start(tmp_path / "whole", f"{line} --out=run")
    began = time.monotonic()
    process.join()
    duration, whole = time.monotonic() - began, tmp_path / "whole" / "run"
    assert process.exitcode == 0
    kills = before = finished = 0
    while kills < 20 or not finished:
        begun = (folder / "run").exists()
        (process,) = start(folder, "--resume=run" if begun else f"{line} --out=run")
        process.join(moments.uniform(0, duration) if kills < 20 else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills, before = kills + 1, before + (not (folder / "run").exists())
            continue
        assert process.exitcode == 0, (tmp_path / "killed.log").read_text()
        finished += 1
        assert content(folder / "run") == content(whole)
        assert read_summary(folder / "run")["test_accuracy"] == read_summary(whole)["test_accuracy"]
        assert names(folder / "run") == FILES
        assert [path.name for path in folder.iterdir()] == ["run"]
        shutil.rmtree(folder / "run")
    print(f"{kills} kills, {before} of them before the directory appeared; {finished} runs finished")


def test_ten_pairs_of_runs_that_begin_together_have_twenty_directories(tmp_path, start):
    lines = [f"{TINY} --epochs=2 --lr={lr}" for lr in (0.05, 0.01)]
    for _ in range(10):
        pair = start(tmp_path / "pairs", *lines)
        for process in pair:
            process.join()
        assert [process.exitcode for process in pair] == [0, 0]
    found = list((tmp_path / "pairs" / "runs").iterdir())
    assert [names(run_dir) for run_dir in found] == [FILES] * 20
    rates = [yaml.safe_load((run_dir / "config.yaml").read_text())["lr"] for run_dir in found]
    assert sorted(rates) == [0.01] * 10 + [0.05] * 10


@pytest.mark.parametrize("resumed", [False, True], ids=["begun", "resumed"])
def test_of_two_that_want_the_same_directory_at_the_same_time_one_is_refused_in_one_line(tmp_path, start, resumed):
    line = f"{TINY} --epochs=40000 --out=run"
    if resumed:
        (first,) = start(tmp_path / "same", line)
        while not (tmp_path / "same" / "run").exists():
            first.join(0.01)
        first.terminate()
        first.join()
        line = "--resume=run"
    pair = start(tmp_path / "same", line, line)
    while all(process.is_alive() for process in pair):
        pair[0].join(0.05)
    other, loser = sorted(pair, key=lambda process: process.exitcode is not None)
    other.terminate()
    other.join()
    assert (other.exitcode, loser.exitcode) == (130, 2)
    errors = [each for each in (tmp_path / "same.log").read_text().splitlines() if each.startswith("error: ")]
    assert len(errors) == 1
    assert f"process {other.pid} on " in errors[0] or (not resumed and "run directory run exists" in errors[0])
