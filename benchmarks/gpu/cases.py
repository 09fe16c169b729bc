"""What is measured, in the order of what matters if time runs out, and what is to be reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.operators import CASES, OWN, Spec
from benchmarks.operators.base import rate_of

FEW = ("triton", "padded-compiled", "eager", "loop")  # where the full field would only cost compile time
WHOLE = (*FEW, "padded")  # which may take less memory than when it is compiled


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


def both_widths(operator: str, variants: tuple[str, ...] | None = None, **sizes: Any) -> list[Plan]:
    return [Plan(Spec(operator, dtype=dtype, **sizes), variants, judged=True) for dtype in ("bf16", "fp32")]


SMALL: dict[str, Any] = {"B": 512, "K": 100, "T": 1, "D": 128}
SINGLE: dict[str, Any] = {"B": 128, "K": 10, "T": 1, "D": 128}
MAPS: dict[str, Any] = {"B": 1024, "K": 10, "T": 64, "D": 128}
FLAT: dict[str, Any] = {"B": 128, "K": 10, "T": 1, "D": 392}  # what the default surrogate has on Fashion-MNIST
WIDE: dict[str, Any] = {"B": 256, "K": 10, "T": 64, "D": 512}

PLANS = [
    *both_widths("surrogate", WHOLE, **SMALL),
    *both_widths("surrogate", WHOLE, **SINGLE),
    *both_widths("surrogate", WHOLE, **MAPS),
    *both_widths("class_variance", B=4096, K=100, T=64, D=128),
    *both_widths("centroid_variance", B=4096, K=100, T=64, D=128),
    *both_widths("gated_read", **MAPS),
    *both_widths("cross_attention", **MAPS),
    *(Plan(Spec("slot_attention", **sizes), FEW) for sizes in (SMALL, MAPS, {**MAPS, "dtype": "bf16"}, SINGLE)),
    Plan(Spec("class_variance", dtype="bf16", **MAPS), FEW),
    Plan(Spec("class_variance", **SMALL), (*FEW, "index-add-compiled")),
    Plan(Spec("class_variance", B=256, K=10, T=1, D=100352), FEW),
    Plan(Spec("class_variance", B=65536, K=10, T=1, D=128, labels="one"), (*FEW, "index-add-compiled")),
    Plan(Spec("centroid_variance", **FLAT), (*FEW, "index-add-compiled")),
    Plan(Spec("gated_read", **SMALL), (*FEW, "gathered-compiled")),
    Plan(Spec("gated_read", dtype="bf16", **WIDE), (*FEW, "gathered-compiled")),
    Plan(Spec("gated_read", **SINGLE), FEW),
    Plan(Spec("cross_attention", **SMALL), FEW),
    Plan(Spec("cross_attention", dtype="bf16", **WIDE), FEW),
    Plan(Spec("cross_attention", **SINGLE), FEW),
]

FRACTIONS = {"forward": 0.85, "backward": 0.80}  # of the measured copy rate, both variances
TIMES_FASTER = 2.0  # forward and backward together, attention
TIMES_BYTES = 1.3  # likewise, of the time that its bytes take at the measured copy rate
NAMED_PEERS = ("padded-compiled", "flex-compiled")

# The whole surrogate, forward and backward: times as fast as the loop and as the padded batch compiled, by B, K and T.
SURROGATE_TIMES = {(512, 100, 1): (50.0, 3.0), (128, 10, 1): (10.0, 2.0), (1024, 10, 64): (5.0, 1.5)}
MEMORY_SHARE = 1 / 3  # of a padded batch's peak, compiled or not, whichever is smaller
ADDED_SHARE = 0.05  # of a training step's seconds without a surrogate
TRAINED = ("centroid", "centroid captured", "attention", "attention captured")


def seconds(case: dict[str, Any], variant: str, direction: str) -> float | None:
    """Median device time in a case's record, where it was measured."""
    figure = case["variants"].get(variant, {}).get(direction, {})
    found: float | None = figure.get("device", {}).get("median")
    return found


def quickest(case: dict[str, Any], variant: str) -> float | None:
    """Median seconds of forward and backward, from a CUDA graph or launched call by call, whichever is less."""
    device, wall = seconds(case, variant, "both"), wall_seconds(case, variant)
    return device if wall is None or device is None else min(device, wall)


def wall_seconds(case: dict[str, Any], variant: str) -> float | None:
    """Median host time of forward and backward, launches included."""
    found: float | None = case["variants"].get(variant, {}).get("both", {}).get("wall", {}).get("median")
    return found


def judge(cases: list[dict[str, Any]], ceilings: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every target of a case with what was measured: ``reached`` is None where something that it needs was not."""
    targets = []
    copy_rate = ceilings["copy"]
    plans = {plan.spec.name: plan for plan in PLANS if plan.judged}
    for name, plan in plans.items():
        case: dict[str, Any] = next((c for c in cases if c["name"] == name), {"name": name, "variants": {}})
        if plan.spec.operator == "surrogate":
            loop, padded = SURROGATE_TIMES[plan.spec.B, plan.spec.K, plan.spec.T]
            targets.append(times_faster(case, "as the loop", ("loop",), loop))
            targets.append(times_faster(case, "as padded-compiled, in a graph or not", ("padded-compiled",), padded))
            targets.append(share_of_memory(case))
        elif plan.spec.operator in ("class_variance", "centroid_variance"):
            for direction, bound in FRACTIONS.items():
                targets.append(fraction_of_copy(case, plan.spec, direction, bound, copy_rate))
        else:
            others = tuple(v for v in CASES[plan.spec.operator].variants if v not in OWN)
            targets.append(times_faster(case, "as the fastest of " + " and ".join(NAMED_PEERS), NAMED_PEERS))
            targets.append(times_faster(case, "as the fastest of all peers", others))
            targets.append(times_bytes(case, plan.spec, ceilings))
    return targets


def judge_training(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the surrogate adds to a training step, launched kernel by kernel and from a graph."""
    added = training.get("added", {})
    text = f"{{}} adds {ADDED_SHARE:.0%} or less to the step"
    found = {name: added.get(name, {}).get("median") for name in TRAINED}
    # What eager adds says nothing about the kernels.
    known = training.get("backend") == "triton"
    return [
        target(training, text.format(name), value, value <= ADDED_SHARE if known and value is not None else None)
        for name, value in found.items()
    ]


def fraction_of_copy(
    case: dict[str, Any], spec: Spec, direction: str, bound: float, copy_rate: float
) -> dict[str, Any]:
    taken = seconds(case, "triton", direction)
    value = None if taken is None else CASES[spec.operator].cost(spec, direction).bytes / taken / copy_rate
    text = f"{direction} at {bound:.0%} of the copy rate or more"
    return target(case, text, value, None if value is None else value >= bound)


def times_faster(
    case: dict[str, Any], whom: str, peers: tuple[str, ...], times: float = TIMES_FASTER
) -> dict[str, Any]:
    """Device time against the quickest that was measured; a peer that is missing is named, not beaten.

    ``launched`` is the same ratio where neither runs from a CUDA graph.
    """
    taken = seconds(case, "triton", "both")
    found = {peer: s for peer in peers if (s := quickest(case, peer)) is not None}
    text = f"both {times:g} times as fast {whom}"
    if taken is None or not found:
        return target(case, text, None, None)
    fastest = min(found, key=lambda peer: found[peer])
    value = found[fastest] / taken
    missing = [peer for peer in peers if peer not in found]
    # Falling short of one peer decides; being faster than some while others are missing does not.
    reached = False if value < times else None if missing else True
    own, other = wall_seconds(case, "triton"), wall_seconds(case, fastest)
    launched = {} if own is None or other is None else {"launched": other / own}
    return target(case, text, value, reached, fastest=fastest, missing=missing, **launched)


def share_of_memory(case: dict[str, Any]) -> dict[str, Any]:
    """Peak of forward and backward against the smaller of the padded batches' peaks."""
    peaks = {name: record.get("both", {}).get("peak_bytes") for name, record in case["variants"].items()}
    taken, *padded = (peaks.get(name) or 0 for name in ("triton", "padded", "padded-compiled"))
    text = f"peak memory {MEMORY_SHARE:.2f} of the padded batch's or less"
    if not taken or not all(padded):
        return target(case, text, None, None)
    value = taken / min(padded)
    return target(case, text, value, value <= MEMORY_SHARE)


def times_bytes(case: dict[str, Any], spec: Spec, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Over the time of the bytes; ``least`` is what operations at the measured rate allow."""
    taken = seconds(case, "triton", "both")
    cost = CASES[spec.operator].cost(spec, "both")
    of_bytes = cost.bytes / ceilings["copy"]
    value = None if taken is None else taken / of_bytes
    least = cost.operations / ceilings[rate_of(spec.dtype)] / of_bytes
    text = f"both within {TIMES_BYTES:g} times the time of its bytes"
    return target(case, text, value, None if value is None else value <= TIMES_BYTES, least=least)


def target(
    case: Mapping[str, Any], text: str, value: float | None, reached: bool | None, **more: Any
) -> dict[str, Any]:
    return {"case": case["name"], "target": text, "measured": value, "reached": reached, **more}
