"""``python -m benchmarks.gpu``: environment, ceilings, correctness and speed on a CUDA device, then one table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import ceilings, correctness, environment, measure, sanitize, sweep, table, training
from benchmarks.gpu.cases import PLANS, Plan, judge, judge_training
from benchmarks.gpu.errors import describe
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import DeviceTimer, Timer, cache_bytes
from benchmarks.steps import keep_buffers

HELP = """\
Measures this device, checks every kernel on it, and times every operator against the ways to do without this library.

  1. environment   device, driver, versions
  2. ceilings      copy bandwidth (bytes read + written), matrix rates in bf16, fp32 and TF32
  3. correctness   kernels against fp64, the same call twice to the bit, compute-sanitizer where it is installed
  4. speed         device time by CUDA-graph replay with inputs past the L2 cache, host time per call, peak memory;
                   a variant whose results are wrong for that very case gets no time
  5. sweep         the surrogate's time over tokens and over classes; picture.py draws it
  6. training      what the surrogate adds to a training step of VGG-11
  7. targets       reached or missed, from what was measured in this run

Raw figures go to a JSON file after every step, the table comes last. Exit status: 0 when all is well, 1 when anything
was wrong or broke (the rest is measured all the same), 2 without a CUDA device. A missed target is a result, not an
error.
"""

EXAMPLES = """\
examples:
  python -m benchmarks.gpu                                everything, under eight minutes on an H200
  python -m benchmarks.gpu --quick --only class_variance  a minute, while working on one kernel
  python -m benchmarks.gpu --only "K100 T64" --no-sanitizer
  python -m benchmarks.gpu --predict --copy-rate 3.0e12   floors on another device, no device needed
"""

SecondsLeft = Callable[..., float]  # of the budget, or of the given share of it

# Of the budget, at most: every case that is timed is checked again; after the cases come sweep and training.
CORRECTNESS_SHARE, CASES_SHARE = 0.3, 0.8


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples; neither the loop nor what compiles")
    parser.add_argument("--only", metavar="PATTERN", default="", help="checks and cases whose name contains PATTERN")
    parser.add_argument(
        "--budget", metavar="SECONDS", type=float, default=450, help="start nothing after (%(default)s)"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="JSON (benchmarks/results/gpu/DEVICE.json)")
    parser.add_argument("--no-sanitizer", action="store_true", help="do not run compute-sanitizer")
    parser.add_argument("--predict", action="store_true", help="floors from bytes and operations alone, then stop")
    rates = parser.add_argument_group("what --predict assumes")
    units = {"copy": "bytes/s", "bf16": "operations/s", "fp32": "operations/s"}
    for name, unit in units.items():
        rates.add_argument(
            f"--{name}-rate", metavar="RATE", type=float, default=ceilings.ASSUMED[name], help=f"{unit} (%(default)g)"
        )
    return parser.parse_args(arguments)


def predict(options: argparse.Namespace, plans: list[Plan]) -> int:
    rates = {name: getattr(options, f"{name}_rate") for name in ceilings.ASSUMED}
    found = measure.predictions(plans, rates)
    print(table.prediction_text(found, rates))
    if options.out is not None:
        Report(options.out).set(assumed_ceilings=rates, predictions=found)
    return 0


def rates_of(report: Report) -> dict[str, float]:
    return {name: found["rate"] for name, found in report.data["ceilings"].items()}


def check_kernels(report: Report, pattern: str, device: str, seconds_left: SecondsLeft) -> None:
    for spec in correctness.SPECS:
        if pattern in spec.name:
            if seconds_left(CORRECTNESS_SHARE) > 0:
                report.add("correctness", correctness.check_spec(spec, device))
            else:
                report.add("left_out", f"check of {spec.name}")


def measure_plans(
    report: Report, plans: list[Plan], quick: bool, device: str, timer: Timer, cache: int, seconds_left: SecondsLeft
) -> None:
    def time_for_cases() -> float:
        return seconds_left(CASES_SHARE)

    for plan in plans:
        if time_for_cases() > 0:
            names, rates = plan.names(quick), rates_of(report)
            report.add("cases", measure.measure_case(plan, names, device, timer, rates, cache, time_for_cases))
            progress(f"{seconds_left():4.0f} s left after {plan.spec.name}")
        else:
            report.add("left_out", plan.spec.name)


def measure_sweep(
    report: Report, pattern: str, device: str, timer: Timer, cache: int, seconds_left: SecondsLeft
) -> None:
    for axis, specs in sweep.SWEEP.items():
        for spec in specs:
            name = sweep.name_of(axis, spec)
            if pattern not in name:
                continue
            if seconds_left() <= 0:
                report.add("left_out", name)
                continue
            point, failures = sweep.measure_point(axis, spec, device, timer, rates_of(report), cache)
            if point is not None:
                report.add("sweep", point)
            for failure in failures:
                report.add("broken", f"{name}: {failure}")


def measure_training(report: Report, quick: bool, device: str, seconds_left: SecondsLeft) -> None:
    if seconds_left() <= 0:
        report.add("left_out", training.NAME)
        return
    try:
        report.set(training=training.measure_training(device, rounds=5 if quick else 15))
    except Exception as error:
        report.add("broken", f"{training.NAME}: {describe(error)}")


def run(
    report: Report,
    options: argparse.Namespace,
    plans: list[Plan],
    device: str,
    timer: Timer,
    cache: int,
    seconds_left: SecondsLeft,
) -> list[str]:
    """Everything behind the ceilings, which the report has; returns what failed."""
    check_kernels(report, options.only, device, seconds_left)
    progress(f"{seconds_left():4.0f} s left after {len(report.data['correctness'])} checks")
    ran = any(check["status"] != "absent" for check in report.data["correctness"])
    if ran and not options.no_sanitizer:
        for tool in sanitize.TOOLS:
            report.add("sanitizer", sanitize.sanitize(tool, timeout=60))
        progress(f"{seconds_left():4.0f} s left after compute-sanitizer")
    measure_plans(report, plans, options.quick, device, timer, cache, seconds_left)
    measure_sweep(report, options.only, device, timer, cache, seconds_left)
    progress(f"{seconds_left():4.0f} s left after the sweep")
    if options.only in training.NAME:
        measure_training(report, options.quick, device, seconds_left)
    judged = judge(report.data["cases"], rates_of(report))
    report.set(targets=judged + judge_training(report.data.get("training", {"name": training.NAME})))
    failures = report.failures()
    report.set(failures=failures)
    return failures


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    plans = [plan for plan in PLANS if options.only in plan.spec.name]
    names = [*(spec.name for spec in correctness.SPECS), *sweep.names(), training.NAME]
    if not plans and not any(options.only in name for name in names):
        progress(f"--only {options.only!r} is in no name; the cases are:\n" + "\n".join(p.spec.name for p in PLANS))
        return 2
    if options.predict:
        return predict(options, plans)
    if not torch.cuda.is_available():
        progress("python -m benchmarks.gpu needs a CUDA device and PyTorch sees none; --predict needs none")
        return 2

    start = time.monotonic()

    def seconds_left(share: float = 1.0) -> float:
        return share * options.budget - (time.monotonic() - start)

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    keep_buffers()
    samples = 10 if options.quick else 30
    found = environment.environment()
    slug = environment.slug(found["device"])
    report = Report(options.out or Path(__file__).parents[1] / "results" / "gpu" / f"{slug}.json")
    report.set(environment=found, options={"quick": options.quick, "only": options.only, "budget": options.budget})
    report.set(ceilings=ceilings.measure_ceilings(samples))
    report.set(predictions=measure.predictions(plans, rates_of(report)))
    progress(f"{seconds_left():4.0f} s left after the ceilings")

    timer = DeviceTimer(samples)
    with torch.cuda.stream(timer.stream):
        failures = run(report, options, plans, "cuda", timer, cache_bytes(), seconds_left)
    report.set(seconds=round(time.monotonic() - start, 1))
    print(table.text(report.data, failures), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
