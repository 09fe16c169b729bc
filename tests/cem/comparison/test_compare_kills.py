"""Comparisons and attacks that are killed at any moment: the same command goes on, and nothing is left behind."""

import csv
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from cem import attack, compare, train
from cem.comparison import runner
from cem.files import is_unfinished
from cem.training import trainer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="needs a server of forks")]
COMMANDS = {"cem.train": train.main, "cem.attack": attack.main, "cem.compare": compare.main}
TINY = "--bottleneck=noRELU_C2S2 --train-size=64 --epochs=2 --threads=1 --device=cpu"
WEAK = "--{0}white-box.steps=20 --{0}aux-size=60 --{0}score-size=20 --{0}decoder.networks=preactN1C8"
WEAK += " --{0}decoder.max-cycles=2"


class Fork:
    """A step without the seconds that a process of its own takes to import everything."""

    returncode = None

    def __init__(self, command, *, stdin, stdout, env, pass_fds, **_):
        lock = os.dup(*pass_fds)  # of the one that it has, a fork lets go
        self.pid = os.fork()
        if self.pid:
            os.close(lock)
            return
        code = 1
        tqdm.set_lock(threading.RLock())  # else who is killed while he writes keeps the others from it
        try:
            for number, descriptor in enumerate((stdin, stdout.fileno(), stdout.fileno())):
                os.dup2(descriptor, number)
            os.closerange(3, lock)
            os.closerange(lock + 1, 256)
            os.environ.update(env)
            with open(1, "w", closefd=False) as said, redirect_stdout(said), redirect_stderr(said):
                code = COMMANDS[command[2]](command[3:])
        except BaseException:
            os.write(1, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def poll(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def runs(line, folder):
    """In a process of its own: a command, in ``folder``."""
    torch.set_num_threads(1)
    trainer.draw_tsne = trainer.draw_curves = lambda *_, **__: None
    runner.subprocess = SimpleNamespace(Popen=Fork, STDOUT=None)
    os.chdir(folder)
    name, *argv = line.split()
    with open(f"{folder}.log", "a", buffering=1) as said, redirect_stderr(said), redirect_stdout(said):
        sys.exit(COMMANDS[name](argv))


@pytest.fixture(scope="module")
def start():
    """Starts a process that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    own = ["cem.training.trainer", "cem.attacks.run", "cem.comparison.report", "cem.comparison.runner"]
    context.set_forkserver_preload(["torch.utils.tensorboard", "sklearn.datasets", "sklearn.utils", *own])

    def start(line, folder):
        folder.mkdir(exist_ok=True)
        process = context.Process(target=runs, args=(line, folder))
        process.start()
        return process

    return start


def everyone_is_gone(out):
    """Wait for whatever a killed comparison has started: as long as it lives it has the lock open."""
    with suppress(FileNotFoundError), open(out / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def timeless(found):
    """Figures that must repeat."""
    if isinstance(found, list):
        return [timeless(each) for each in found]
    if not isinstance(found, dict):
        return found
    return {name: timeless(each) for name, each in found.items() if "seconds" not in name and "memory" not in name}


def table(out):
    with open(out / "table.csv", newline="") as file:
        return [timeless(row) for row in csv.DictReader(file)]


def attacked(out):
    return timeless(json.loads((out / "attack" / "attack.json").read_text()))


COMPARED = f"cem.compare {TINY} {WEAK.format('attack.')} --surrogates none centroid --seeds 0 --jobs 2 --out out"


@pytest.mark.parametrize(
    ("before", "line", "figures"),
    [
        ([], COMPARED, table),
        ([f"cem.train {TINY} --out out"], f"cem.attack out {WEAK.format('')} --device cpu", attacked),
    ],
    ids=["compare", "attack"],
)
def test_what_is_killed_twenty_times_finds_what_the_undisturbed_one_finds_and_leaves_nothing_else(
    tmp_path, start, before, line, figures
):
    whole, folder, moments = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    for each in (*before, line):
        process, began = start(each, whole), time.monotonic()
        process.join()
        assert process.exitcode == 0, (tmp_path / "whole.log").read_text()
    duration, kills, finished = time.monotonic() - began, 0, 0
    while kills < 20 or not finished:
        if not folder.exists():
            shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("attack" if before else "out"))
        process = start(line, folder)
        process.join(moments.uniform(0, duration) if kills < 20 else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            everyone_is_gone(folder / "out")
            continue
        assert process.exitcode == 0, (tmp_path / "killed.log").read_text()
        finished += 1
        assert figures(folder / "out") == figures(whole / "out")
        files = [path for path in (folder / "out").rglob("*") if not path.name.startswith("events.out")]
        assert [path for path in files if path.name == ".lock" or is_unfinished(path)] == []
        assert {path.relative_to(folder) for path in files} == {
            path.relative_to(whole) for path in (whole / "out").rglob("*") if not path.name.startswith("events.out")
        }
        shutil.rmtree(folder)
    print(f"{kills} kills, {finished} finished; undisturbed: {duration:.1f} s")


def test_what_a_killed_comparison_has_started_ends_as_after_an_interrupt(tmp_path):
    line = f"{COMPARED.replace('--epochs=2', '--epochs=100000')} --jobs 1"
    command = [sys.executable, "-m", *line.split()]
    run_dir = tmp_path / "out" / "none-noise0.3-seed0"
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as comparison:
        while not (run_dir / "best.pt").exists():
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"ended with {comparison.wait(0.05)}")
        comparison.kill()
    everyone_is_gone(tmp_path / "out")
    log = (tmp_path / "out" / "logs" / f"{run_dir.name}-training.log").read_text()
    assert "interrupted; " in log.splitlines()[-1]
    assert (run_dir / "last.pt").exists()
    assert not (run_dir / "summary.json").exists()
    assert not (run_dir / ".lock").exists()
