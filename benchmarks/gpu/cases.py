"""What is measured, in the order of what matters if time runs out, and what is to be reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.operators import CASES, OWN, Spec
from benchmarks.operators.base import rate_of

FEW = ("triton", "padded-compiled", "eager", "loop")  # where the full field would only cost compile time


@dataclass(frozen=True)
class Plan:
    """A batch to measure, the variants to measure it with (None: all), and whether targets hold for it."""

    spec: Spec
    variants: tuple[str, ...] | None = None
    judged: bool = False

    def names(self, quick: bool) -> tuple[str, ...]:
        """``quick`` leaves out whatever compiles and the loop."""
        names = self.variants or CASES[self.spec.operator].variants
        return tuple(n for n in names if not (quick and (n.endswith("-compiled") or n == "loop")))


def both_widths(operator: str, **sizes: Any) -> list[Plan]:
    return [Plan(Spec(operator, dtype=dtype, **sizes), judged=True) for dtype in ("bf16", "fp32")]


SMALL: dict[str, Any] = {"B": 512, "K": 100, "T": 1, "D": 128}
SINGLE: dict[str, Any] = {"B": 128, "K": 10, "T": 1, "D": 128}
WIDE: dict[str, Any] = {"B": 256, "K": 10, "T": 64, "D": 512}

PLANS = [
    *both_widths("class_variance", B=4096, K=100, T=64, D=128),
    *both_widths("gated_read", B=1024, K=10, T=64, D=128),
    *both_widths("cross_attention", B=1024, K=10, T=64, D=128),
    Plan(Spec("class_variance", B=1024, K=10, T=64, D=128, dtype="bf16"), FEW),
    Plan(Spec("class_variance", **SMALL), (*FEW, "index-add-compiled")),
    Plan(Spec("class_variance", B=256, K=10, T=1, D=100352), FEW),
    Plan(Spec("class_variance", B=65536, K=10, T=1, D=128, labels="one"), (*FEW, "index-add-compiled")),
    Plan(Spec("gated_read", **SMALL), (*FEW, "gathered-compiled")),
    Plan(Spec("gated_read", dtype="bf16", **WIDE), (*FEW, "gathered-compiled")),
    Plan(Spec("gated_read", **SINGLE), FEW),
    Plan(Spec("cross_attention", **SMALL), FEW),
    Plan(Spec("cross_attention", dtype="bf16", **WIDE), FEW),
    Plan(Spec("cross_attention", **SINGLE), FEW),
]

FRACTIONS = {"forward": 0.85, "backward": 0.80}  # of the measured copy rate, class variance
TIMES_FASTER = 2.0  # forward and backward together, attention
TIMES_BYTES = 1.3  # likewise, of the time that its bytes take at the measured copy rate
NAMED_PEERS = ("padded-compiled", "flex-compiled")


def seconds(case: dict[str, Any], variant: str, direction: str) -> float | None:
    """Median device time in a case's record, where it was measured."""
    figure = case["variants"].get(variant, {}).get(direction, {})
    found: float | None = figure.get("device", {}).get("median")
    return found


def judge(cases: list[dict[str, Any]], ceilings: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every target with what was measured: ``reached`` is None where something that it needs was not."""
    targets = []
    copy_rate = ceilings["copy"]
    plans = {plan.spec.name: plan for plan in PLANS if plan.judged}
    for name, plan in plans.items():
        case: dict[str, Any] = next((c for c in cases if c["name"] == name), {"name": name, "variants": {}})
        if plan.spec.operator == "class_variance":
            for direction, bound in FRACTIONS.items():
                targets.append(fraction_of_copy(case, plan.spec, direction, bound, copy_rate))
        else:
            others = tuple(v for v in CASES[plan.spec.operator].variants if v not in OWN)
            targets.append(times_faster(case, "of " + " and ".join(NAMED_PEERS), NAMED_PEERS))
            targets.append(times_faster(case, "of all peers", others))
            targets.append(times_bytes(case, plan.spec, ceilings))
    return targets


def fraction_of_copy(
    case: dict[str, Any], spec: Spec, direction: str, bound: float, copy_rate: float
) -> dict[str, Any]:
    taken = seconds(case, "triton", direction)
    value = None if taken is None else CASES[spec.operator].cost(spec, direction).bytes / taken / copy_rate
    text = f"{direction} at {bound:.0%} of the copy rate or more"
    return target(case, text, value, None if value is None else value >= bound)


def times_faster(case: dict[str, Any], whom: str, peers: tuple[str, ...]) -> dict[str, Any]:
    """Device time against the fastest that was measured; a peer that is missing is named, not beaten."""
    taken = seconds(case, "triton", "both")
    found = {peer: s for peer in peers if (s := seconds(case, peer, "both")) is not None}
    text = f"both {TIMES_FASTER:g} times as fast as the fastest {whom}"
    if taken is None or not found:
        return target(case, text, None, None)
    fastest = min(found, key=lambda peer: found[peer])
    value = found[fastest] / taken
    missing = [peer for peer in peers if peer not in found]
    # Falling short of one peer decides; being faster than some while others are missing does not.
    reached = False if value < TIMES_FASTER else None if missing else True
    return target(case, text, value, reached, fastest=fastest, missing=missing)


def times_bytes(case: dict[str, Any], spec: Spec, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Over the time of the bytes; ``least`` is what operations at the measured rate allow."""
    taken = seconds(case, "triton", "both")
    cost = CASES[spec.operator].cost(spec, "both")
    of_bytes = cost.bytes / ceilings["copy"]
    value = None if taken is None else taken / of_bytes
    least = cost.operations / ceilings[rate_of(spec.dtype)] / of_bytes
    text = f"both within {TIMES_BYTES:g} times the time of its bytes"
    return target(case, text, value, None if value is None else value <= TIMES_BYTES, least=least)


def target(case: dict[str, Any], text: str, value: float | None, reached: bool | None, **more: Any) -> dict[str, Any]:
    return {"case": case["name"], "target": text, "measured": value, "reached": reached, **more}
