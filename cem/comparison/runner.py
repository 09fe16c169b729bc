"""Carrying out a comparison: a subprocess for every training and attack, several at a time if asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cem.command import ENDS_WITH_STDIN
from cem.comparison.config import Comparison
from cem.comparison.plan import OPTIONS, OPTIONS_DIR, Step, check_options, check_out, is_finished, remaining_steps
from cem.comparison.rehearsal import rehearse
from cem.errors import CemError
from cem.files import read_json, write_json, writing
from cem.folders import Lock, remove_unfinished
from cem.interrupts import held
from cem.progress import about, bar, busy, say

FAILURES = "failures.json"
"""File of a comparison: by name of the run, which step failed last, its exit code, and the last line it printed."""

_POLL = 0.1  # seconds
_WORTH_A_FORECAST = 60.0  # seconds


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        step: the step.
        code: exit code of its process; negative if a signal ended it.
    """

    step: Step
    code: int


def run_comparison(comparison: Comparison, command: str) -> None:
    """Train and attack what is not trained and attacked yet.

    A step that fails is noted in ``failures.json`` and costs only its own run. Output of the steps goes to
    ``logs/``; this process prints a progress bar, and a line when a run is finished.

    Args:
        comparison: its options, validated; written to ``compare.yaml``.
        command: the command line that they came from.

    Raises:
        CemError: before anything is started: something else lies in the folder, or where a run should, a training or
            an attack could not begin, see :func:`~cem.comparison.rehearsal.rehearse`, or another comparison is at work
            in this folder.
        KeyboardInterrupt: after the steps under way were stopped; they can be continued.
    """
    runs = comparison.grid.runs()
    check_out(comparison.out)
    for run in runs:
        check_options(comparison, run)
    with busy("checking that all of it can be run"):
        rehearse(comparison, [run for run in runs if not is_finished(comparison, run)])
    with writing(comparison.out):
        comparison.out.mkdir(parents=True, exist_ok=True)
    with Lock(comparison.out) as lock, writing(comparison.out):
        for folder in (comparison.out, comparison.out / OPTIONS_DIR):
            if folder.is_dir():
                remove_unfinished(folder)
        comparison.to_yaml(comparison.out / OPTIONS, command)
        read_failures(comparison.out)  # which must be in order before a run can fail
        queues = [queue for run in runs if (queue := remaining_steps(comparison, run))]
        left = sum(map(len, queues))
        say(f"{len(runs)} runs in {comparison.out}, of which {len(runs) - len(queues)} are finished")
        jobs = comparison.grid.jobs
        environment = _environment(jobs)
        threads = comparison.train.threads or environment["OMP_NUM_THREADS"]
        if queues:
            say(f"{min(jobs, len(queues))} at a time, trained with {threads} threads each")
        began, done = time.monotonic(), len(runs) - len(queues)
        with bar(2 * len(runs), f"{done}/{len(runs)} runs", initial=2 * len(runs) - left, mininterval=1) as shown:
            ended = done

            def report(outcome: Outcome) -> None:
                nonlocal ended
                step = outcome.step
                note_failure(comparison.out, outcome)
                # After a training that failed there is no attack.
                shown.update(2 if outcome.code != 0 and step.kind == "training" else 1)
                if outcome.code != 0 or step.kind == "attack":
                    ended += 1
                    say(f"[{ended}/{len(runs)}] {step.run.name}: {_result(comparison, outcome)}")
                    shown.set_description_str(f"{ended}/{len(runs)} runs")
                    left = (time.monotonic() - began) / (ended - done) * (len(runs) - ended)
                    if left > _WORTH_A_FORECAST:
                        say(f"the other {len(runs) - ended} take about {about(left)}")

            def watch(steps: Sequence[Step]) -> None:
                shown.set_postfix_str(", ".join(f"{step.kind} {step.run.name}" for step in steps), refresh=False)
                shown.update(0)

            run_queues(queues, jobs, environment, report, watch, lock=lock.descriptor)


def run_queues(
    queues: Sequence[Sequence[Step]],
    jobs: int,
    environment: Mapping[str, str],
    report: Callable[[Outcome], None],
    watch: Callable[[Sequence[Step]], None] = lambda steps: None,
    *,
    lock: int | None = None,
) -> None:
    """Run the steps of every queue in order, those of up to ``jobs`` queues at a time.

    The processes outlive this one by no more than it takes them to end as after Ctrl-C: their stdin ends with it.

    Args:
        queues: steps that build on one another; after one that failed, the rest of its queue is left out.
        jobs: queues that are worked on at a time.
        environment: of the processes.
        report: called when a step has ended.
        watch: called several times a second with the steps under way.
        lock: file descriptor that the processes hold open as long as they live.

    Raises:
        KeyboardInterrupt: after all processes have ended.
    """
    waiting, active = deque(map(deque, queues)), list[_Active]()
    stdin, kept = os.pipe()
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                queue = waiting.popleft()
                with held():  # what has begun must be known, to be ended
                    active.append(_Active(queue.popleft(), queue, environment, stdin, lock))
            for each in list(active):
                code = each.process.poll()
                if code is None:
                    continue
                active.remove(each)
                report(Outcome(each.step, code))
                if code == 0 and each.rest:
                    waiting.appendleft(each.rest)
            watch([each.step for each in active])
            if active:
                time.sleep(_POLL)
    finally:
        _stop([each.process for each in active])
        for descriptor in (stdin, kept):
            os.close(descriptor)


class _Active:
    """A step under way."""

    def __init__(
        self, step: Step, rest: deque[Step], environment: Mapping[str, str], stdin: int, lock: int | None
    ) -> None:
        self.step, self.rest = step, rest
        step.log.parent.mkdir(parents=True, exist_ok=True)
        with open(step.log, "ab") as log:
            # In a session of its own, Ctrl-C reaches this process alone, which then stops every step once.
            self.process = subprocess.Popen(
                step.command, stdin=stdin, stdout=log, stderr=subprocess.STDOUT,
                env={**environment, ENDS_WITH_STDIN: "1"},
                start_new_session=True, pass_fds=() if lock is None else (lock,),
            )  # fmt: skip


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes so that they leave what can be continued; a second Ctrl-C ends them at once."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
            process.wait()


def read_failures(out: Path) -> dict[str, dict[str, Any]]:
    """By name of the run: ``step``, ``exit_code`` and ``reason`` of the step that failed last."""
    return read_json(out / FAILURES) or {}


def note_failure(out: Path, outcome: Outcome) -> None:
    """Write a failure down in ``failures.json``, or strike out an earlier one of this run."""
    failures, name = read_failures(out), outcome.step.run.name
    if outcome.code == 0:
        if failures.pop(name, None) is None:
            return
    else:
        failures[name] = {"step": outcome.step.kind, "exit_code": outcome.code, "reason": _reason(outcome)}
    write_json(out / FAILURES, failures)


def _reason(outcome: Outcome) -> str:
    if outcome.code < 0:
        return f"ended by {signal.Signals(-outcome.code).name}"
    lines = outcome.step.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {outcome.code}")
    return last.removeprefix("error: ")


def _result(comparison: Comparison, outcome: Outcome) -> str:
    """A finished or failed run in one line."""
    if outcome.code != 0:
        return f"{outcome.step.kind} failed (exit code {outcome.code}): {_reason(outcome)}"
    first = comparison.attack_config().of_each_knowledge()[0].directory
    try:
        attack = read_json(comparison.run_dir(outcome.step.run) / first / "attack.json", "run", "worst")
        if attack is None:
            return "attacked, but there is no attack.json"
        accuracy, worst = attack["run"]["test_accuracy"], attack["worst"]["mse"]
        return (
            f"test accuracy {accuracy:.1%}, worst attack on unseen images: MSE {worst['value']:.4g} ({worst['attack']})"
        )
    except (CemError, LookupError, TypeError, ValueError) as error:
        return f"attacked, but its attack.json cannot be used: {error}"


def _environment(jobs: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}
