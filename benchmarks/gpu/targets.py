"""What is to be reached, all of it, judged by ratios of figures that one run has measured side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.cases import PLANS, Plan
from benchmarks.gpu.report import FINE, Report, of_copy
from benchmarks.operators import Spec

# Forward and backward of the whole attention surrogate, by B, K and T: times the loop, times the best competitor.
SURROGATE = {(512, 100, 1): (50.0, 3.0), (128, 10, 1): (20.0, 2.0), (1024, 10, 64): (10.0, 1.5)}
COPY = {"forward": 0.85, "backward": 0.80}  # class and centroid variance, of the measured copy rate
ADDED = {"slots": 0.01, "attention": 0.05}  # to a training step of VGG-11, launched or captured, whichever is less


def target(text: str, measured: float | None, reached: bool | None, note: str = "") -> dict[str, Any]:
    """``reached`` is None where something that the verdict needs was not measured."""
    return {"target": text, "measured": measured, "reached": reached, "note": note}


def judge(report: Report, plans: Sequence[Plan] = tuple(PLANS)) -> list[dict[str, Any]]:
    own = {record["name"]: record for record in report.of("time") if record["status"] == "ok"}
    compared = {(record["name"], record["variant"]): record for record in report.of("compare")}
    found = []
    for spec, peers in ((plan.spec, plan.peers) for plan in plans if plan.judged):
        if spec.operator == "surrogate":
            loop, best = SURROGATE[spec.B, spec.K, spec.T]
            records = {peer: compared.get((spec.name, peer), {}) if spec.name in own else {} for peer in peers}
            found.append(faster(spec, {"loop": records.pop("loop")}, loop, "the loop"))
            found.append(faster(spec, records, best, "the best competitor"))
        elif spec.operator in ("class_variance", "centroid_variance"):
            for direction, bound in COPY.items():
                share = of_copy(own[spec.name][direction], report.rates()) if spec.name in own else None
                text = f"{spec.name}: {direction} at {bound:.0%} of the copy rate or more"
                found.append(target(text, share, None if share is None else share >= bound))
    return found + added(report.of("training"))


def faster(spec: Spec, records: Mapping[str, Mapping[str, Any]], times: float, whom: str) -> dict[str, Any]:
    """Against the quickest that was measured; one that is missing is named, not beaten. What cannot run is no rival."""
    found = {peer: r["times"]["quickest"] for peer, r in records.items() if r.get("status") == "ok"}
    missing = [peer for peer, r in records.items() if r.get("status") not in FINE]
    text = f"{spec.name}: {times:g} times as fast as {whom}, forward and backward"
    if not found:
        return target(text, None, None)
    best = min(found, key=lambda name: found[name])
    note = f"({best})" + (f", without {' and '.join(missing)}" if missing else "")
    # Falling short of one decides; being faster than some while others are missing does not.
    return target(text, found[best], False if found[best] < times else None if missing else True, note)


def added(trained: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    shares = trained[0].get("added", {}) if trained else {}
    found = []
    for name, bound in ADDED.items():
        ways = {way: shares[way]["median"] for way in (name, f"{name} captured") if way in shares}
        value, best = min(((share, way) for way, share in ways.items()), default=(None, ""))
        text = f"{name} adds {bound:.0%} or less to a training step of VGG-11 at batch 512"
        found.append(target(text, value, None if value is None else value <= bound, f"({best})" * bool(best)))
    return found
