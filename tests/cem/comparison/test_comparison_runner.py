"""Carrying out a comparison, with small shell commands in the place of trainings and attacks."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_runs import fake_attack, fake_training

from cem.comparison import runner
from cem.comparison.config import Comparison
from cem.comparison.grid import GridOptions, Run, Setting
from cem.comparison.plan import Step, remaining_steps
from cem.comparison.results import read_results
from cem.comparison.runner import Outcome, locked, read_failures, run_comparison, run_queues
from cem.errors import UsageError
from cem.training.config import TrainConfig

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-ins are shell commands")

RUN = Run(Setting("none", 0.0, 0.1), 0)


def shell(tmp_path: Path, script: str, name: str = "step") -> Step:
    return Step(RUN, "training", ("/bin/sh", "-c", script), tmp_path / "logs" / f"{name}.log")


def run(queues: list[list[Step]], jobs: int = 1, **environment: str) -> list[Outcome]:
    outcomes: list[Outcome] = []
    run_queues(queues, jobs, {"PATH": os.environ["PATH"], **environment}, outcomes.append)
    return outcomes


def test_steps_of_a_queue_run_in_order(tmp_path: Path) -> None:
    file = tmp_path / "file"
    run([[shell(tmp_path, f"sleep 0.2; echo a >> {file}"), shell(tmp_path, f"echo b >> {file}")]], jobs=2)
    assert file.read_text() == "a\nb\n"


def test_step_after_one_that_failed_is_left_out_and_other_queues_go_on(tmp_path: Path) -> None:
    steps = [shell(tmp_path, "exit 3"), shell(tmp_path, "exit 4"), shell(tmp_path, "exit 0")]
    outcomes = run([steps[:2], steps[2:]])
    assert [(outcome.step, outcome.code) for outcome in outcomes] == [(steps[0], 3), (steps[2], 0)]


def test_queues_run_side_by_side_up_to_the_number_of_jobs(tmp_path: Path) -> None:
    # Each waits for the other's file, so neither ends unless both run at once.
    def wait_for(mine: str, other: str) -> Step:
        wait = f"for i in $(seq 50); do [ -e {tmp_path}/{other} ] && exit 0; sleep 0.1; done; exit 1"
        return shell(tmp_path, f"touch {tmp_path}/{mine}; {wait}", mine)

    assert [outcome.code for outcome in run([[wait_for("a", "b")], [wait_for("b", "a")]], jobs=2)] == [0, 0]


def test_one_job_runs_one_step_at_a_time(tmp_path: Path) -> None:
    script = f"mkdir {tmp_path}/lock || exit 1; sleep 0.2; rmdir {tmp_path}/lock"
    assert [outcome.code for outcome in run([[shell(tmp_path, script)] * 2, [shell(tmp_path, script)]])] == [0, 0, 0]


def test_output_of_a_step_goes_to_its_log(tmp_path: Path) -> None:
    step = shell(tmp_path, "echo out; echo err >&2")
    run([[step]])
    assert step.log.read_text() == "out\nerr\n"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C reaches the test also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_ends_the_steps_with_sigterm_and_waits_for_them(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    step = shell(tmp_path, f"trap 'sleep 0.2; echo TERM > {ended}; exit 130' TERM; while :; do sleep 0.05; done")
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run([[step]])
    assert ended.read_text() == "TERM\n"


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_kills_a_step_that_does_not_end(tmp_path: Path) -> None:
    step = shell(tmp_path, "trap '' TERM; echo $$; while :; do sleep 0.05; done")
    for delay in (0.5, 1.0):
        threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run([[step]])
    with pytest.raises(ProcessLookupError):
        os.kill(int(step.log.read_text()), 0)


@pytest.mark.parametrize(("jobs", "threads"), [(1, "4"), (2, "2"), (3, "1"), (8, "1")])
def test_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch, jobs: int, threads: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert runner._environment(jobs)["OMP_NUM_THREADS"] == threads


def test_number_of_threads_from_outside_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert runner._environment(2)["OMP_NUM_THREADS"] == "7"


# A whole comparison: the stand-ins copy finished trainings and attacks to where they belong.


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    grid = GridOptions(surrogates=("none", "mixture"), seeds=(0,))
    comparison = Comparison(grid, TrainConfig(epochs=3, device="cpu"), out=tmp_path / "out")
    prepared = replace(comparison, out=tmp_path / "prepared")
    for run in grid.runs():
        fake_training(prepared, run)
        fake_attack(prepared, run)

    def steps(comparison: Comparison, run: Run) -> list[Step]:
        source, target = prepared.run_dir(run), comparison.run_dir(run)
        training = f"mkdir -p {target}; cp {source}/*.* {target}"
        scripts = {"training": training, "attack": f"cp -r {source}/attack {target}"}
        return [
            replace(step, command=("/bin/sh", "-c", scripts[step.kind])) for step in remaining_steps(comparison, run)
        ]

    monkeypatch.setattr(runner, "remaining_steps", steps)
    return comparison


def failing(monkeypatch: pytest.MonkeyPatch, method: str, script: str) -> None:
    """Let the first step of a method's run do something else."""
    original = runner.remaining_steps

    def steps(comparison: Comparison, run: Run) -> list[Step]:
        found = original(comparison, run)
        if run.setting.method == method:
            found[0] = replace(found[0], command=("/bin/sh", "-c", script))
        return found

    monkeypatch.setattr(runner, "remaining_steps", steps)


def statuses(comparison: Comparison) -> list[str]:
    return [result.status for result in read_results(comparison)]


def test_every_run_is_trained_and_attacked_and_gets_a_line(
    comparison: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    run_comparison(comparison, "command")
    assert statuses(comparison) == ["finished", "finished"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"2 runs in {comparison.out}, of which 0 are finished",
        "[1/2] none-noise0.1-seed0: test accuracy 90.0%, strongest attack on unseen images: MSE 0.03 "
        "(res_normN8C64:mse)",
        "[2/2] mixture-lambd16-noise0.1-seed0: test accuracy 90.0%, strongest attack on unseen images: MSE 0.03 "
        "(res_normN8C64:mse)",
    ]


def test_second_time_nothing_is_run(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    run_comparison(comparison, "command")
    before = {path: path.stat().st_mtime_ns for path in comparison.out.glob("*/*")}
    capsys.readouterr()
    run_comparison(comparison, "command")
    assert {path: path.stat().st_mtime_ns for path in comparison.out.glob("*/*")} == before
    assert capsys.readouterr().err == f"2 runs in {comparison.out}, of which 2 are finished\n"


def test_failed_run_is_noted_with_its_last_line_and_the_others_go_on(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "none", "echo first; echo 'error: it diverged'; echo; exit 1")
    run_comparison(comparison, "command")
    assert statuses(comparison) == ["failed", "finished"]
    assert read_failures(comparison.out) == {
        "none-noise0.1-seed0": {"step": "training", "exit_code": 1, "reason": "it diverged"}
    }


def test_run_that_was_killed_is_noted_with_the_signal(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "none", "kill -9 $$")
    run_comparison(comparison, "command")
    assert read_failures(comparison.out)["none-noise0.1-seed0"]["reason"] == "ended by SIGKILL"


def test_run_that_failed_once_is_finished_after_the_next_call(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, "none", "exit 1")
        run_comparison(comparison, "command")
    run_comparison(comparison, "command")
    assert statuses(comparison) == ["finished", "finished"]
    assert read_failures(comparison.out) == {}


def test_attack_that_failed_is_repeated_without_the_training(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in comparison.grid.runs():
        fake_training(comparison, run)
    with monkeypatch.context() as patch:
        failing(patch, "none", "exit 1")
        run_comparison(comparison, "command")
    assert read_failures(comparison.out)["none-noise0.1-seed0"]["step"] == "attack"
    run_comparison(comparison, "command")
    assert [path.name for path in sorted((comparison.out / "logs").iterdir())] == [
        "mixture-lambd16-noise0.1-seed0-attack.log",
        "none-noise0.1-seed0-attack.log",
    ]


def test_nothing_is_run_if_one_run_has_other_options(comparison: Comparison) -> None:
    other = replace(comparison, train=replace(comparison.train, lr=0.1))
    fake_training(other, comparison.grid.runs()[-1])
    with pytest.raises(UsageError, match="--lr"):
        run_comparison(comparison, "command")
    assert not (comparison.out / "compare.yaml").exists()


def test_second_comparison_in_the_same_folder_is_refused(comparison: Comparison) -> None:
    comparison.out.mkdir()
    refused = pytest.raises(UsageError, match="another comparison, or a run that it left behind, is at work")
    with locked(comparison.out), refused:
        run_comparison(comparison, "command")


def test_folder_stays_locked_while_a_step_of_a_killed_comparison_lives(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        assert lock is not None
        step = subprocess.Popen(["/bin/sleep", "60"], pass_fds=(lock,))
    with pytest.raises(UsageError, match="at work"), locked(tmp_path):
        pass
    step.kill()
    step.wait()
    with locked(tmp_path):
        pass


def test_steps_hold_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        assert lock is not None
        step = shell(tmp_path, f"[ -e /dev/fd/{lock} ]")
        outcomes: list[Outcome] = []
        run_queues([[step]], 1, {}, outcomes.append, lock=lock)
    assert [outcome.code for outcome in outcomes] == [0]
