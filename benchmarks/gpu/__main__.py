"""Proves this library on the CUDA device of this machine, which may be bare and without a network.

  phase 1   Many processes compile and check every kernel against fp64, sixty repetitions to the bit, and every compiled
            competitor. Beside them run pytest -m gpu, the commands, and compute-sanitizer where there is one.
            What is wrong is known early, and what comes later finds compiled code.
  phase 2   One process times: the device's rates, our kernels in every case, then whoever does the same without them.
  phase 3   One process goes deeper: VGG-11's training step with and without, kernels by name, sweeps over B, K and D.

Figures go to a JSON file one by one, so that a run that is cut off leaves what it has; a process that crashes or hangs
costs its own figure. The table comes last. Exit code: 0 when all is well, also where targets are missed; 1 when
something was wrong or broke; 2 without a CUDA device, or where packages are missing.

  python -m benchmarks.gpu --plan                       what each phase does, and for how long; no device needed
  python -m benchmarks.gpu --predict                    what each case should take; no device needed
  python -m benchmarks.gpu.pack FOLDER                  all of this in one folder, for a machine without a network
  python -m benchmarks.gpu --phase 2 --only surrogate   some times again, into the same file
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.environment import environment, missing

Jobs = Mapping[int, Sequence[Any]]

SHARES = {1: 150 / 480, 2: 375 / 480, 3: 465 / 480}  # of the budget, until when a phase may last; then comes the table
PURPOSES = {1: "checks, and commands beside them", 2: "times", 3: "training step, kernels by name, sweeps"}
STARTING = 10.0  # seconds until processes are at work
LACKING = """\
not installed here, or too old: {}. With a network: pip install -e ".[test]"; without one, where there is one:
python -m benchmarks.gpu.pack FOLDER --wheels {}; then, on this machine, bash FOLDER/run.sh"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__, formatter_class=raw)
    parser.add_argument("--budget", metavar="SECONDS", type=float, default=480, help="in which it ends (%(default)s)")
    parser.add_argument("--phase", type=int, choices=SHARES, help="only this one; what others left in the file stays")
    parser.add_argument("--only", metavar="PATTERN", default="", help="only what has PATTERN in its name; likewise")
    parser.add_argument("--out", metavar="FILE", type=Path, help="JSON (benchmarks/results/gpu/DEVICE.json)")
    parser.add_argument("--plan", action="store_true", help="print what would be done, then stop")
    parser.add_argument("--predict", action="store_true", help="print what cases should take; with --out: into CSV")
    return parser.parse_args(arguments)


def workers(phase: int, cores: int) -> int:
    """One where the device must be quiet; else one a core, but for two that commands need."""
    return max(2, cores - 2) if phase == 1 else 1


def plan_lines(wanted: Jobs, budget: float, cores: int = 16) -> Iterable[str]:
    """What each phase does and how long that should take."""
    total = 0.0
    for phase, jobs in wanted.items():
        seconds = max(sum(job.expected for job in jobs) / workers(phase, cores), *(job.expected for job in jobs))
        total += STARTING + seconds
        yield f"phase {phase}: {PURPOSES[phase]}; processes: {workers(phase, cores)}"
        yield f"  {STARTING + seconds:.0f} s are expected, and it is over at {SHARES[phase] * budget:.0f} s"
        for kind in dict.fromkeys(job.kind for job in jobs):
            same = [job for job in jobs if job.kind == kind]
            what = dict.fromkeys(f"{job.spec.operator} {job.variant}" if job.spec else f"({job.name})" for job in same)
            work = f"{len(same)} pieces, {sum(job.expected for job in same):.0f} s of work"
            yield fill(f"  {kind}: {work}: {', '.join(what)}", 118, subsequent_indent="    ", break_on_hyphens=False)
    yield f"expected: {total:.0f} of {budget:.0f} s, on an H200 with {cores} cores"


def perform(report: Any, wanted: Jobs, setting: Any, until: Callable[[int], float]) -> None:
    """All phases; records go to the report as they come, and targets are judged after each phase."""
    from benchmarks.gpu.jobs import begin
    from benchmarks.gpu.targets import judge

    def done(phase: int, job: Any, record: Mapping[str, Any]) -> None:
        report.add({"kind": job.kind, "name": job.name, "variant": job.variant, "phase": phase, **record})
        state = f"{record['status']} {record.get('why', '')}" if record["status"] != "ok" else "ok"
        say(f"{until(3) - time.monotonic():4.0f} s left  {job.kind:9}{job.name} {job.variant}: {state}")

    for phase, jobs in wanted.items():
        say(f"phase {phase}: {PURPOSES[phase]}, {len(jobs)} pieces of work")
        count, make = workers(phase, os.cpu_count() or 2), partial(begin, setting)
        left = processes.run(jobs, make, count, until(phase), partial(done, phase))
        names = {str(phase): [f"{job.kind} {job.name} {job.variant}".rstrip() for job in left]}
        report.set(left_out={**report.data["left_out"], **names}, targets=judge(report, setting.plans))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None, setting: Any = None) -> int:
    start = time.monotonic()
    options = parse(arguments)
    if setting is None and (packages := missing()):
        say(LACKING.format(" ".join(packages), " ".join(package.partition(">")[0] for package in packages)))
        return 2
    import torch

    from benchmarks.gpu import jobs, model
    from benchmarks.gpu.report import Report, text

    setting = setting or jobs.Setting()
    if options.predict:
        if options.out:
            say("counts launches on the CPU, for about two minutes")
            model.write(model.predictions(plan.spec for plan in setting.plans), options.out)
        print(*model.lines(model.read(options.out or model.EXPECTED)), sep="\n")
        return 0
    wanted = {n: [each for each in found if options.only in each.name] for n, found in jobs.phases(setting).items()}
    wanted = {number: found for number, found in wanted.items() if found and options.phase in (None, number)}
    if not wanted:
        say(f"nothing has {options.only!r} in its name; --plan shows what there is")
        return 2
    if options.plan:
        print(*plan_lines(wanted, options.budget), sep="\n")
        return 0
    if setting.device == "cuda" and not torch.cuda.is_available():
        say("python -m benchmarks.gpu needs a CUDA device and PyTorch sees none; --plan and --predict need none")
        return 2
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):  # what one process compiles, all others find
        os.environ.setdefault(name, str(Path(tempfile.gettempdir()) / "cem-gpu" / name.partition("_")[0].lower()))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # of each of many processes
    found = environment() if setting.device == "cuda" else {"device": setting.device}
    named = f"results/gpu/{re.sub(r'[^a-z0-9]+', '-', found['device'].lower()).strip('-')}.json"
    report = Report(options.out or Path(__file__).parents[1] / named, keep=bool(options.phase or options.only))
    report.set(environment=found)
    shares = dict.fromkeys(SHARES, SHARES[3]) if options.phase else SHARES  # alone, a phase has all the time
    perform(report, wanted, setting, lambda phase: start + shares[phase] * options.budget)
    report.set(seconds=round(time.monotonic() - start, 1))
    print(text(report, model.lines(model.measured(model.read(), report.of("time")))), flush=True)
    return 1 if report.failures() else 0


if __name__ == "__main__":
    if "--predict" in sys.argv:  # kernels that take CPU tensors, chosen before the first import of Triton
        os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.exit(main())
