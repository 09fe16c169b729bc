"""Carrying out a comparison, with small shell commands in the place of trainings and attacks."""

import os
import signal
import subprocess
import threading
import time
from dataclasses import replace

import pytest
from fake_runs import fake_training, finish

from cem.comparison import runner
from cem.comparison.config import Comparison
from cem.comparison.grid import GridOptions, Run, Setting
from cem.comparison.plan import Step, remaining_steps
from cem.comparison.results import read_results
from cem.comparison.runner import read_failures, run_comparison, run_queues
from cem.errors import UsageError
from cem.folders import Lock
from cem.training.config import TrainConfig

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-ins are shell commands")

NONE, MIXTURE = "none-noise0.3-seed0", "mixture-lambd16-noise0.3-seed0"


def shell(tmp_path, script, name="step"):
    run = Run(Setting("none", 0.0, 0.1), 0)
    return Step(run, "training", ("/bin/sh", "-c", script), tmp_path / "logs" / f"{name}.log")


def run(queues, jobs=1, lock=None):
    outcomes = []
    run_queues(queues, jobs, {"PATH": os.environ["PATH"]}, outcomes.append, lock=lock)
    return outcomes


def test_queues_run_side_by_side_up_to_the_number_of_jobs(tmp_path):
    # Each waits for the other's file, so neither ends unless both run at once.
    def wait_for(mine, other):
        wait = f"for i in $(seq 600); do [ -e {tmp_path}/{other} ] && exit 0; sleep 0.1; done; exit 1"
        return shell(tmp_path, f"touch {tmp_path}/{mine}; {wait}", mine)

    assert [outcome.code for outcome in run([[wait_for("a", "b")], [wait_for("b", "a")]], jobs=2)] == [0, 0]
    alone = shell(tmp_path, f"mkdir {tmp_path}/lock || exit 1; sleep 0.2; rmdir {tmp_path}/lock")
    assert [outcome.code for outcome in run([[alone] * 2, [alone]])] == [0, 0, 0]


@pytest.mark.parametrize("interrupts", [1, 2])
def test_interrupt_ends_the_steps_with_sigterm_and_a_second_one_kills_those_that_do_not_end(
    tmp_path, monkeypatch, interrupts
):
    # Ctrl-C must reach the test also where the tests were started in the background, which ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    end = "sleep 0.2; echo TERM; exit 130" if interrupts == 1 else ""
    step = shell(tmp_path, f"trap '{end}' TERM; echo $$; while :; do sleep 0.05; done")
    stop, stopping = runner._stop, threading.Event()
    monkeypatch.setattr(runner, "_stop", lambda processes: stopping.set() or stop(processes))

    def interrupt():
        while not (step.log.exists() and step.log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        if interrupts == 2:
            stopping.wait()
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run([[step]])
    signal.signal(signal.SIGINT, before)
    process, *said = step.log.read_text().split()
    assert said == (["TERM"] if interrupts == 1 else [])
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


@pytest.mark.parametrize(("jobs", "given", "threads"), [(1, "", "4"), (2, "", "2"), (3, "", "1"), (8, "7", "7")])
def test_jobs_share_the_cores_unless_a_number_of_threads_is_given(monkeypatch, jobs, given, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert runner._environment(jobs)["OMP_NUM_THREADS"] == threads


@pytest.fixture
def instead():
    """What the first step of a run does instead, by the run's name."""
    return {}


@pytest.fixture
def comparison(tmp_path, monkeypatch, instead):
    """A whole comparison: the stand-ins copy finished trainings and attacks to where they belong."""
    grid = GridOptions(surrogates=("none", "mixture"), seeds=(0,))
    comparison = Comparison(grid, TrainConfig(epochs=3, device="cpu"), out=tmp_path / "out")
    prepared = finish(replace(comparison, out=tmp_path / "prepared"))

    def steps(comparison, run):
        source, target = prepared.run_dir(run), comparison.run_dir(run)
        training = f"mkdir -p {target}; cp {source}/*.* {target}"
        scripts = {"training": training, "attack": f"cp -r {source}/attack {target}"}
        found = remaining_steps(comparison, run)
        if found and run.name in instead:
            scripts[found[0].kind] = instead[run.name]
        return [replace(step, command=("/bin/sh", "-c", scripts[step.kind])) for step in found]

    monkeypatch.setattr(runner, "remaining_steps", steps)
    monkeypatch.setattr(runner, "rehearse", lambda comparison, runs: None)
    return comparison


def statuses(comparison):
    return [result.status for result in read_results(comparison)]


def test_every_run_is_trained_and_attacked_gets_a_line_and_is_left_alone_from_then_on(comparison, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_comparison(comparison, "command")
    assert statuses(comparison) == ["finished", "finished"]
    found = "test accuracy 90.0%, worst attack on unseen images: MSE 0.03 (decoder)"
    first = [f"2 runs in {comparison.out}, of which 0 are finished", "1 at a time, trained with 7 threads each"]
    assert capsys.readouterr().err.splitlines() == [*first, f"[1/2] {NONE}: {found}", f"[2/2] {MIXTURE}: {found}"]
    before = {path: path.stat().st_mtime_ns for path in comparison.out.glob("*/*")}
    run_comparison(comparison, "command")
    assert {path: path.stat().st_mtime_ns for path in comparison.out.glob("*/*")} == before
    assert capsys.readouterr().err == f"2 runs in {comparison.out}, of which 2 are finished\n"


@pytest.mark.parametrize(
    ("step", "script", "code", "reason"),
    [
        ("training", "echo first; echo 'error: it diverged' >&2; echo; exit 1", 1, "it diverged"),
        ("training", "kill -9 $$", -9, "ended by SIGKILL"),
        ("attack", "exit 3", 3, "exit code 3"),
    ],
)
def test_failed_run_is_noted_with_its_reason_costs_no_other_and_goes_on_with_the_next_call(
    comparison, instead, step, script, code, reason
):
    if step == "attack":
        fake_training(comparison, comparison.grid.runs()[0])
        (comparison.out / "compare.yaml").touch()
    instead[NONE] = script
    run_comparison(comparison, "command")
    assert statuses(comparison) == ["failed", "finished"]
    assert read_failures(comparison.out) == {NONE: {"step": step, "exit_code": code, "reason": reason}}
    instead.clear()
    run_comparison(comparison, "command")
    assert statuses(comparison) == ["finished", "finished"]
    assert read_failures(comparison.out) == {}
    assert (comparison.out / "logs" / f"{NONE}-training.log").exists() == (step == "training")


def test_nothing_is_run_if_one_run_has_other_options(comparison):
    other = replace(comparison, train=replace(comparison.train, lr=0.1))
    fake_training(other, comparison.grid.runs()[-1])
    (comparison.out / "compare.yaml").touch()
    with pytest.raises(UsageError, match="--lr"):
        run_comparison(comparison, "command")
    assert not (comparison.out / "options").exists()


def test_damaged_result_of_one_run_costs_the_others_nothing(comparison, instead, capsys):
    fake_training(comparison, comparison.grid.runs()[0])
    (comparison.out / "compare.yaml").touch()
    instead[NONE] = f"mkdir {comparison.out}/{NONE}/attack; echo '{{' > {comparison.out}/{NONE}/attack/attack.json"
    run_comparison(comparison, "command")
    err = capsys.readouterr().err
    assert f"[1/2] {NONE}: attacked, but its attack.json cannot be used: cannot read" in err
    assert f"[2/2] {MIXTURE}: test accuracy" in err


def test_second_comparison_in_the_same_folder_is_refused_also_while_a_step_of_a_killed_one_lives(comparison, tmp_path):
    comparison.out.mkdir()
    held = Lock(comparison.out)
    lock = held.descriptor
    assert run([[shell(tmp_path, f"[ -e /dev/fd/{lock} ]")]], lock=lock)[0].code == 0
    step = subprocess.Popen(["/bin/sleep", "60"], pass_fds=(lock,))
    held.close()  # as a kill would
    with pytest.raises(UsageError, match=f"at work in {comparison.out}: process {os.getpid()} on .*, or one that it"):
        run_comparison(comparison, "command")
    step.kill()
    step.wait()
    run_comparison(comparison, "command")
