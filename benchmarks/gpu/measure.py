"""One case after the other, one variant after the other: checked, then timed. Nothing that fails stops the rest."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu.cases import Plan
from benchmarks.gpu.errors import describe
from benchmarks.gpu.timing import Timer, copies_for
from benchmarks.operators import CASES, DIRECTIONS, Case
from benchmarks.operators.base import rate_of
from benchmarks.steps import steps_of
from cem_kernels import BackendUnavailableError


def against_ceilings(plan: Plan, direction: str, taken: float, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """What ``taken`` seconds mean for the operator's own bytes and operations, whoever computed it."""
    cost = CASES[plan.spec.operator].cost(plan.spec, direction)
    floor, bound = cost.floor(ceilings["copy"], ceilings[rate_of(plan.spec.dtype)])
    rate = cost.bytes / taken
    return {
        "bytes_per_second": rate,
        "fraction_of_copy": rate / ceilings["copy"],
        "times_bytes_floor": taken * ceilings["copy"] / cost.bytes,
        "times_floor": taken / floor,
        "bound_by": bound,
    }


def predictions(plans: list[Plan], ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Floors of every case and direction, from bytes and operations over the given rates: no measurement."""
    found: dict[str, Any] = {}
    for plan in plans:
        found[plan.spec.name] = {}
        for direction in DIRECTIONS:
            cost = CASES[plan.spec.operator].cost(plan.spec, direction)
            seconds, bound = cost.floor(ceilings["copy"], ceilings[rate_of(plan.spec.dtype)])
            found[plan.spec.name][direction] = {**asdict(cost), "floor_seconds": seconds, "bound_by": bound}
    return found


def measure_variant(
    case: Case, plan: Plan, variant: str, timer: Timer, ceilings: Mapping[str, float], cache: float
) -> dict[str, Any]:
    """The record of a variant: ``status`` is ok, absent, wrong or error, and only ok has times."""
    try:
        call = case.build(variant)
        verdict = case.check(variant, call)
    except BackendUnavailableError as error:
        return {"status": "absent", "why": describe(error)}
    except Exception as error:
        return {"status": "error", "why": describe(error)}
    record: dict[str, Any] = {"status": "ok" if verdict.passed else "wrong", "check": asdict(verdict)}
    if not verdict.passed:
        record["why"] = str(verdict)
        return record
    for direction in DIRECTIONS:
        try:
            record[direction] = timed(case, plan, call, variant, direction, timer, ceilings, cache)
        except Exception as error:
            record[direction] = {"error": describe(error)}
            record |= {"status": "error", "why": f"{direction}: {describe(error)}"}
    return record


def timed(
    case: Case,
    plan: Plan,
    call: Callable[..., Any],
    variant: str,
    direction: str,
    timer: Timer,
    ceilings: Mapping[str, float],
    cache: float,
) -> dict[str, Any]:
    needed = case.cost(plan.spec, direction).bytes
    copies = copies_for(needed, cache)
    steps = steps_of(call, case, direction, copies)
    device = timer.device_time(steps, case.uncapturable.get(variant))
    return {
        "device": device,
        "wall": timer.wall_time(steps),
        "peak_bytes": timer.peak_bytes(steps[0]),
        "copies": copies,
        "past_the_cache": copies * needed > 2 * cache,
        **against_ceilings(plan, direction, device["median"], ceilings),
    }


def measure_case(
    plan: Plan,
    names: tuple[str, ...],
    device: str,
    timer: Timer,
    ceilings: Mapping[str, float],
    cache: float,
    seconds_left: Callable[[], float],
) -> dict[str, Any]:
    """The record of a case; variants that time did not suffice for are under ``left_out``."""
    if any(name.endswith("-compiled") for name in names):
        torch.compiler.reset()  # or one shape's compilations count against the next one's limit
    record: dict[str, Any] = {"name": plan.spec.name, **asdict(plan.spec), "variants": {}, "left_out": []}
    try:
        case = CASES[plan.spec.operator](plan.spec, device)
    except Exception as error:
        return {**record, "error": describe(error)}
    for variant in names:
        if seconds_left() <= 0:
            record["left_out"].append(variant)
            continue
        start = time.monotonic()
        found = measure_variant(case, plan, variant, timer, ceilings, cache)
        tidy()
        record["variants"][variant] = found | {"took_seconds": round(time.monotonic() - start, 2)}
    return record


def tidy() -> None:
    """Free what the last variant held, cycles of autograd and compiler included."""
    gc.collect()
    # A device that an error has left unusable says so here too; what caused it is on record.
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def failures_of(case: dict[str, Any]) -> list[str]:
    """What went wrong in a case's record, one line each. What is absent is no failure."""
    lines = [f"{case['name']}: {case['error']}"] if "error" in case else []
    for variant, record in case["variants"].items():
        if record["status"] in ("wrong", "error"):
            lines.append(f"{case['name']}, {variant}: {record['status']}: {record['why']}")
    return lines
