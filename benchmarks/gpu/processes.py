"""Jobs in processes of their own: whoever crashes or hangs costs its own job, and a fresh process goes on."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

Record = dict[str, Any]
Make = Callable[[], Callable[[Any], Record]]
START_SECONDS, MOST_BROKEN_STARTS = 60.0, 3  # in which a process must be ready, and how many may fail to be


def work(connection: Connection, make: Make) -> None:
    """What a process does: perform what it is sent, until it is sent None, or a record says that it is ``lost``."""
    os.setsid()  # what it starts ends with it
    perform = make()
    connection.send(None)  # ready
    while (job := connection.recv()) is not None:
        record = perform(job)
        connection.send(record)
        if record.get("lost"):
            return


class Worker:
    """A process, at its ``job`` or starting ``since`` then; it has ``until`` to answer: for ever if it is idle."""

    def __init__(self, make: Make) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share a CUDA context, which breaks both
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, make), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen here
        self.at(None, START_SECONDS)

    def at(self, job: Any, seconds: float) -> None:
        self.job, self.since = job, time.monotonic()
        self.until = self.since + seconds
        if job is not None:
            with suppress(OSError):  # it has ended, as the next look will show
                self.connection.send(job)

    def answer(self) -> Record:
        """What it has to say, or how it failed."""
        if not self.connection.poll():
            return {"why": f"no answer after {time.monotonic() - self.since:.0f} s", "lost": True}
        try:
            return self.connection.recv() or {}
        except (EOFError, OSError):
            self.process.join(10)
            return {"why": f"the process ended, exit code {self.process.exitcode}", "lost": True}

    def end(self) -> None:
        """The process and all that it has started."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group, once it has come so far
        self.process.kill()
        self.process.join(5)  # one that a driver holds does not even die
        self.connection.close()


def run(jobs: Sequence[Any], make: Make, count: int, until: float, done: Callable[[Any, Record], None]) -> list[Any]:
    """Perform jobs in the order given, and hand each record on as it comes; returns the jobs that were left out.

    Args:
        jobs: each takes about ``expected`` seconds, and is hopeless after ``limit``; none is begun that is expected to
            end after ``until``.
        make: makes, in a process, what performs jobs there. Picklable.
        count: of processes.
        until: by ``time.monotonic()``; whatever is still at work then is ended.
        done: gets a job and its record: what performed it returned, or ``{"status": "error", "why": ...}``.
    """
    workers: list[Worker] = []
    waiting, finished, broken = list(jobs), [], 0
    try:
        while waiting or any(worker.job is not None for worker in workers):
            now = time.monotonic()
            waiting = [job for job in waiting if now + job.expected <= until]
            if now >= until or broken > MOST_BROKEN_STARTS:
                break
            for worker in [each for each in workers if each.until == math.inf][: len(waiting)]:
                job = waiting.pop(0)
                worker.at(job, job.limit)
            if len(waiting) > sum(worker.job is None for worker in workers) and len(workers) < count:
                workers.append(Worker(make))
                continue
            answered = wait([worker.connection for worker in workers], timeout=0.2)
            for worker in [each for each in workers if each.connection in answered or each.until < time.monotonic()]:
                record = worker.answer()
                if worker.job is not None:
                    finished.append(worker.job)
                    done(worker.job, {"status": "error", **record, "took": round(time.monotonic() - worker.since, 1)})
                elif record.get("lost"):
                    broken += 1
                worker.at(None, math.inf)
                if record.get("lost"):
                    worker.end()
                    workers.remove(worker)
        return [job for job in jobs if job not in finished]
    finally:
        for worker in workers:
            worker.end()
