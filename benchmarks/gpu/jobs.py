"""The pieces of a run, one figure each, and what performs them in a process on the device.

``python -m benchmarks.gpu.jobs PATTERN`` does the checks whose names contain PATTERN, once, to be put behind any tool.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import commands
from benchmarks.gpu.cases import CHECKS, PLANS, POINTS, Plan
from benchmarks.gpu.report import FINE, describe
from benchmarks.gpu.timing import Play, Timer, copies_for, quantiles, rates_of
from benchmarks.interleaved import in_turns
from benchmarks.operators import CASES, DIRECTIONS, OWN, Call, Case, Spec
from benchmarks.steps import steps_of
from benchmarks.training_step import training_step
from cem_kernels import BackendUnavailableError


@dataclass(frozen=True)
class Setting:
    """What a run measures, on what, by which clock; tests have a small one that needs no device."""

    device: str = "cuda"
    timer: Callable[[], Timer] = Timer
    plans: Sequence[Plan] = tuple(PLANS)
    checks: Sequence[Spec] = tuple(CHECKS)
    sweep: Mapping[str, Spec] = field(default_factory=lambda: POINTS)
    scripts: Sequence[commands.Script] = tuple(commands.COMMANDS)
    repeats: int = 60
    smaller: Mapping[str, Any] = field(default_factory=dict)  # arguments of ``rates_of`` and ``measure_training``


@dataclass(frozen=True)
class Job:
    """A figure to be had: ``kind`` is a method of :class:`Performer`, ``expected`` seconds are those on an H200."""

    kind: str
    name: str
    expected: float
    spec: Spec | None = None
    variant: str = ""
    script: commands.Script | None = None

    @property
    def limit(self) -> float:
        return 3 * self.expected + 30


BATCH, IMAGE_SHAPE = 512, (3, 32, 32)
WAYS = ("none", "slots", "slots captured", "attention", "attention captured")
COMPILING = {"class_variance": 4, "centroid_variance": 5, "slot_variance": 8}  # seconds, from nothing
COMPILING |= {"slot_attention": 12, "gated_read": 8, "surrogate": 22}


def phases(setting: Setting) -> dict[int, list[Job]]:
    """The jobs of each phase: in the first, which many processes share, the longest first; then what matters most."""

    def of(spec: Spec, kind: str, expected: float, variant: str = "triton", name: str = "") -> Job:
        return Job(kind, name or spec.name, expected, spec, variant)

    specs, points = [plan.spec for plan in setting.plans], setting.sweep
    peers = [(plan.spec, peer) for plan in setting.plans for peer in plan.peers]
    whole = [plan.spec for plan in setting.plans if plan.judged and plan.spec.operator == "surrogate"]
    compared = [(s, peer, COMPILING.get(s.operator, 10) * peer.endswith("-compiled")) for s, peer in peers]
    # Kernels are not compiled anew for another batch: the first case of a width and dtype does it for all.
    widths, first = {}, []
    for spec in dict.fromkeys([*specs, *setting.checks, *points.values()]):
        compiles = widths.setdefault((spec.operator, spec.D, spec.dtype, spec.S, spec.H), spec) is spec
        first.append(of(spec, "check", COMPILING.get(spec.operator, 10) if compiles else 4))
    first += [of(spec, "check", 15 + 1.5 * seconds, peer) for spec, peer, seconds in compared if seconds]
    first += [Job("command", each.name, each.expected, script=each) for each in setting.scripts]
    second = [Job("rates", "rates of the device", 5), *(of(spec, "time", 1.5) for spec in specs)]
    second += [of(spec, "compare", 2 + seconds / 4, peer) for spec, peer, seconds in compared]
    third = [Job("training", f"training step vgg11_bn C8S1 B{BATCH} 3x32x32", 25)]
    third += [*(of(spec, "profile", 2) for spec in whole), *(of(s, "sweep", 2, name=n) for n, s in points.items())]
    return {1: sorted(first, key=lambda job: -job.expected), 2: second, 3: third}


class Performer:
    """Performs jobs, each by the method of its kind, in a process that may break: what is left of it is not used again.

    A record has ``status`` ok, absent (it cannot run here), wrong, unrepeatable or error, and ``why``.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.timer = setting, setting.timer()

    def __call__(self, job: Job) -> dict[str, Any]:
        start = time.monotonic()
        torch.compiler.reset()  # or one shape's compilations count against the next one's limit
        try:
            with torch.cuda.stream(self.timer.stream):
                record: dict[str, Any] = {"status": "ok", **getattr(self, job.kind)(job)}
        except BackendUnavailableError as error:
            record = {"status": "absent", "why": describe(error)}
        except Exception as error:
            record = {"status": "error", "why": describe(error), "lost": self.lost()}
        gc.collect()  # cycles of autograd and of the compiler
        with suppress(RuntimeError):  # of a device that an error has left unusable
            torch.cuda.empty_cache()
        return {"took": round(time.monotonic() - start, 2), **record}

    def lost(self) -> bool:
        """Whether an error has left the device unusable for this process."""
        with suppress(Exception):
            self.wait()
            return False
        return True

    def wait(self) -> None:
        if self.setting.device == "cuda":
            torch.cuda.synchronize()

    def built(self, job: Job, right: bool = True) -> tuple[Case, Call]:
        """The case, and what computes it; what computes something else is refused, so that it gets no time."""
        assert job.spec is not None
        case = CASES[job.spec.operator](job.spec, self.setting.device)
        call = case.build(job.variant)
        if right and not (verdict := case.check(job.variant, call)).passed:
            raise ArithmeticError(f"{job.variant} is wrong: {verdict}")
        return case, call

    def check(self, job: Job) -> dict[str, Any]:
        """Against fp64, then many times the same bits, as users run it.

        In its deterministic mode PyTorch fills memory that nobody has written with NaN, which then passes no check.
        """
        case, call = self.built(job, right=False)
        own = job.variant in OWN
        torch.use_deterministic_algorithms(own, warn_only=True)
        try:
            verdict = case.check(job.variant, call)
        finally:
            torch.use_deterministic_algorithms(False)
        record = {"status": "ok" if verdict.passed else "wrong", "why": str(verdict), "check": asdict(verdict)}
        first = case.results(call) if own and verdict.passed else {}
        for repeat in range(self.setting.repeats if first else 0):
            again = case.results(call)
            if changed := [name for name, value in first.items() if not torch.equal(value, again[name])]:
                return {**record, "status": "unrepeatable", "why": f"{', '.join(changed)} at repeat {repeat + 1}"}
        return record

    def play(self, case: Case, call: Call, variant: str, direction: str) -> Play:
        uncapturable = case.uncapturable.get(variant)
        copies = 1 if uncapturable else copies_for(case.cost(case.spec, direction).bytes, self.timer.cache)
        return self.timer.play(steps_of(call, case, direction, copies), uncapturable)

    def time(self, job: Job, directions: Sequence[str] = DIRECTIONS) -> dict[str, Any]:
        """This library's kernels in each direction; in the last one also what the host takes, and the memory."""
        case, call = self.built(job)
        record: dict[str, Any] = {}
        for direction in directions:
            play = self.play(case, call, job.variant, direction)
            moved, device = case.cost(case.spec, direction).bytes, quantiles(self.timer.samples(play))
            record[direction] = {"device": device, "how": play.how, "bytes": moved}
        return {**record, "wall": quantiles(self.timer.wall(play)), "peak_bytes": self.timer.peak(play.steps[0])}

    def sweep(self, job: Job) -> dict[str, Any]:
        sizes = {letter: getattr(job.spec, letter) for letter in "BKTD"}
        return {"axis": job.name.partition(":")[0], **sizes, **self.time(job, ["both"])}

    def compare(self, job: Job) -> dict[str, Any]:
        """A competitor and this library side by side: ours, theirs, theirs, ours, forward and backward together."""
        case, call = self.built(job)
        calls = {"triton": case.build("triton"), job.variant: call}
        ours, theirs = (self.play(case, each, variant, "both") for variant, each in calls.items())
        runs = [self.timer.samples(each) for each in (ours, theirs, theirs, ours)]
        first, second, third, fourth = map(statistics.median, runs)
        device, other = quantiles(runs[0] + runs[3]), quantiles(runs[1] + runs[2])
        wall, others = (quantiles(self.timer.wall(each)) for each in (ours, theirs))
        least, less = (min(each["median"] for each in pair) for pair in ((device, wall), (other, others)))
        launched = others["median"] / wall["median"]
        times = {"by_order": [second / first, third / fourth], "launched": launched, "quickest": less / least}
        own = {"device": device, "how": ours.how, "wall": wall}
        both, peak = {"device": other, "how": theirs.how}, self.timer.peak(theirs.steps[0])
        return {"ours": own, "both": both, "wall": others, "peak_bytes": peak, "times": times}

    def profile(self, job: Job, calls: int = 5) -> dict[str, Any]:
        """Time and count of every kernel by name, of a call forward and backward."""
        case, call = self.built(job)
        (step,) = steps_of(call, case, "both", 1)
        step()
        self.wait()
        kind = "CUDA" if self.setting.device == "cuda" else "CPU"
        with profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
            for _ in range(calls):
                step()
            self.wait()
        rows: dict[str, list[float]] = {}
        for event in profiler.events():
            if event.device_type.name == kind:
                row = rows.setdefault(event.name[:160], [0, 0.0])
                row[0], row[1] = row[0] + 1 / calls, row[1] + event.time_range.elapsed_us() / calls
        longest = sorted(rows.items(), key=lambda item: -item[1][1])
        kernels = [{"kernel": n, "count": round(c, 1), "microseconds": round(us, 2)} for n, (c, us) in longest[:25]]
        launches, total = (round(sum(row[i] for row in rows.values()), 1) for i in (0, 1))
        return {"launches": launches, "microseconds": total, "kernels": kernels}

    def training(self, job: Job) -> dict[str, Any]:
        found = measure_training(self.setting.device, **self.setting.smaller.get("training", {}))
        why = "; ".join(f"{way}: {why}" for way, why in found["broken"].items())
        return {"status": "error" if why else "ok", "why": why, **found}

    def rates(self, job: Job) -> dict[str, Any]:
        return {"rates": rates_of(self.timer, self.setting.device, **self.setting.smaller.get("rates", {}))}

    def command(self, job: Job) -> dict[str, Any]:
        assert job.script is not None
        return commands.run(job.script)


def measure_training(
    device: str, rounds: int = 15, steps: int = 10, make: Callable[..., Callable[[], Tensor]] = training_step
) -> dict[str, Any]:
    """Seconds of a step without a surrogate, with each, and with each replayed from a CUDA graph, timed turn by turn.

    Convolutions may use TF32, as in a training: without it steps would be long and our share of them small.

    Args:
        device: of everything; kernels run there.
        rounds: in each of which all have their turn.
        steps: of a turn, the host ahead of the device as in a training, and the device awaited at the end.
        make: what makes them.

    Returns:
        ``step_seconds``, and ``added`` over the step without a surrogate, both as quantiles over rounds; ``broken``
        says what did not run, and why.
    """
    step_of = partial(make, batch=BATCH, image_shape=IMAGE_SHAPE, device=device, backend="triton")
    plays, broken = {}, {}
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
    try:
        for way in WAYS:
            name, _, captured = way.partition(" ")
            try:
                plays[way] = awaited(step_of(name, captured=bool(captured)), steps, device)
            except Exception as error:
                broken[way] = describe(error)
        found = {way: [each / steps for each in taken] for way, taken in in_turns(plays, rounds).items()}
    finally:
        torch.backends.cudnn.allow_tf32 = before
    seconds = {way: quantiles(times) for way, times in found.items()}
    bare = found.pop("none")
    added = {way: quantiles([own / none - 1 for own, none in zip(found[way], bare, strict=True)]) for way in found}
    return {"step_seconds": seconds, "added": added, "broken": broken}


def awaited(step: Callable[[], Tensor], steps: int, device: str) -> Callable[[], None]:
    """So many steps; one whose penalty is not finite would be timed for nothing, and is refused here."""
    if bool(step()):
        raise ArithmeticError("the penalty is not finite")

    def play() -> None:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return play


def begin(setting: Setting) -> Performer:
    """In a process of its own, all of whose switches are set here."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    warnings.simplefilter("ignore")  # of operations that have no deterministic form, say
    return Performer(setting)


def main(pattern: str, setting: Setting) -> int:
    perform = begin(setting)
    wanted = [job for job in phases(setting)[1] if job.variant == "triton" and pattern in job.name]
    records = {job.name: perform(job) for job in wanted}
    print(*(f"{name} {record['status']} {record['why']}" for name, record in records.items()), sep="\n")
    return int(any(record["status"] not in FINE for record in records.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Setting(repeats=1)))
