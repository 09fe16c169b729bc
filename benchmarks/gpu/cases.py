"""What is checked, what is timed and against whom, and what sweeps go over; each in the order of what matters most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.operators import CASES, OWN, Spec


@dataclass(frozen=True)
class Plan:
    """A batch to time this library's kernels with and, where it is ``judged``, whoever does the same without them."""

    spec: Spec
    judged: bool = False

    @property
    def peers(self) -> tuple[str, ...]:
        """All competitors; those that must compile first come first, while a phase is young."""
        named = (name for name in CASES[self.spec.operator].variants if self.judged and name not in OWN)
        return tuple(sorted(named, key=lambda name: not name.endswith("-compiled")))


def spread(base: Sequence[Spec], dtypes: Sequence[str] = ("fp32", "bf16", "fp16")) -> list[Spec]:
    return [replace(spec, dtype=dtype) for dtype in dtypes for spec in base]


SMALL: dict[str, Any] = {"B": 512, "K": 100, "T": 1, "D": 128}
SINGLE: dict[str, Any] = {"B": 128, "K": 10, "T": 1, "D": 128}
MAPS: dict[str, Any] = {"B": 1024, "K": 10, "T": 64, "D": 128}
LARGE: dict[str, Any] = {"B": 4096, "K": 100, "T": 64, "D": 128}
FLAT: dict[str, Any] = {"B": 128, "K": 10, "T": 1, "D": 392}  # what the default surrogate has on Fashion-MNIST
WIDE: dict[str, Any] = {"B": 256, "K": 10, "T": 64, "D": 512}
LONG: dict[str, Any] = {"B": 256, "K": 10, "T": 1, "D": 100352}
ONE: dict[str, Any] = {"B": 65536, "K": 10, "T": 1, "D": 128, "labels": "one"}
NARROW = ("fp32", "bf16")

JUDGED = [
    *(spec for sizes in (SMALL, SINGLE, MAPS) for spec in spread([Spec("surrogate", **sizes)], NARROW)),
    *spread([Spec("class_variance", **LARGE), Spec("centroid_variance", **LARGE), Spec("gated_read", **MAPS)], NARROW),
]
TIMED: dict[str, Sequence[dict[str, Any]]] = {
    "cross_attention": ({**MAPS, "dtype": "bf16"}, SMALL, SINGLE),
    "slot_attention": (SMALL, MAPS, {**MAPS, "dtype": "bf16"}, SINGLE),
    "class_variance": (SMALL, {**MAPS, "dtype": "bf16"}, LONG, ONE),
    "centroid_variance": (FLAT,),
    "slot_variance": ({**FLAT, "S": 4},),
    "gated_read": (SMALL, SINGLE, {**WIDE, "dtype": "bf16"}),
}
PLANS = [Plan(spec, judged=True) for spec in JUDGED]
PLANS += [Plan(Spec(operator, **sizes)) for operator, each in TIMED.items() for sizes in each]

# The surrogate's time over tokens B·T from 512 to 131,072, over classes at 4,096 tokens, and over widths.
SWEEP = {
    "tokens": [Spec("surrogate", B=samples, K=10, T=16, D=128) for samples in (32, 128, 512, 2048, 8192)],
    "classes": [Spec("surrogate", B=4096, K=classes, T=1, D=128) for classes in (2, 8, 32, 128, 512)],
    "width": [Spec("surrogate", B=1024, K=10, T=4, D=width) for width in (32, 64, 128, 256, 512)],
}

POINTS = {f"{axis}: {spec.name}": spec for axis, specs in SWEEP.items() for spec in specs}

variance, centroid, slots = (partial(Spec, f"{name}_variance") for name in ("class", "centroid", "slot"))
slot, read, whole = (partial(Spec, name) for name in ("slot_attention", "gated_read", "surrogate"))

# What every operator must get right in every dtype; slot attention also where programs share the tokens of a class.
# Then what one dtype shows for all: layouts, penalties, one class for all, hardly a sample a class, odd sizes.
CHECKS = [
    *spread([Spec(operator, B=96, K=7, T=3, D=64, labels="holes") for operator in CASES]),
    *spread([slot(B=64, K=3, T=48, D=128, labels="holes"), read(B=96, K=7, T=16, D=128, labels="holes")]),
    *spread([whole(B=64, K=3, T=48, D=64)], NARROW),
    *spread([slot(B=31, K=4, T=7, D=40, S=5), read(B=64, K=5, T=3, D=64, H=2, S=5)], NARROW),
    *(make(B=40, K=5, T=6, D=32, layout="strided") for make in (variance, centroid, slots, slot, read)),
    *(make(B=40, K=5, T=6, D=32, layout="expanded") for make in (variance, centroid, slots, slot, read)),
    *(variance(B=120, K=6, T=3, D=40, penalty=penalty) for penalty in ("softplus", "nats")),
    centroid(B=128, K=10, T=1, D=392, penalty="nats"),
    *(make(B=3000, K=4, T=1, D=96, labels="one") for make in (variance, centroid, slots)),
    *(slots(B=64, K=5, T=1, D=200, S=number) for number in (1, 3, 16)),
    slot(B=2000, K=2, T=1, D=48, S=1, labels="one"),
    read(B=500, K=3, T=1, D=48, H=3, S=1, labels="one"),
    whole(B=80, K=2, T=30, D=64, labels="one"),
    *(make(B=37, K=40, T=1, D=128) for make in (slot, read)),
    variance(B=37, K=40, T=1, D=1),
    variance(B=24, K=3, T=1, D=25088),
    slot(B=8, K=2, T=80, D=512),
    slot(B=50, K=2, T=33, D=104, S=20),
    *(slot(B=64, K=5, T=3, D=16, S=slots) for slots in (4, 8)),
    read(B=8, K=2, T=50, D=512, H=8),
    read(B=31, K=4, T=7, D=40, H=5, S=3),
    whole(B=37, K=20, T=4, D=40, H=5, S=5),
]  # fmt: skip
