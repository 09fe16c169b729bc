"""Whether a variant computes what it should: outputs and every gradient of one case, against the reference in fp64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.operators.base import Call, Case

OWN = ("eager", "eager-compiled", "triton")  # this library's variants; every other one is a peer
PEER_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}

# Of the largest gradient: what fp64 leaves of one that is zero in exact arithmetic, and of one where most cancels.
VANISHING, CANCELLING = 1e-9, 1e-4


@dataclass(frozen=True)
class Verdict:
    """Whether a variant computes what it should, and by how much it missed at the tensor where it is worst."""

    passed: bool
    worst: str  # the tensor's name
    error: float  # relative to the fp64 reference
    allowed: float

    def __str__(self) -> str:
        return f"{self.worst}: error {self.error:.2g}, allowed {self.allowed:.2g}"


class Check:
    """The check of a case. This library's own variants may err twice as much as the definition in their precision.

    Peers may err as :attr:`peer_errors` says.
    """

    def __init__(self, case: Case) -> None:
        self.case = case

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        return self.case.results(self.case.reference, torch.float64)

    @cached_property
    def own_errors(self) -> dict[str, float]:
        """By tensor, the error of the definition in the worst precision that is allowed."""
        errors = [errors_of(self.case.results(call), self.exact) for call in self.case.yardsticks()]
        return {name: max(error[name] for error in errors) for name in self.exact}

    @cached_property
    def peer_errors(self) -> dict[str, float]:
        """By tensor, what a peer may err by: a fixed tolerance, or more where the definition does badly in its dtype.

        It says that peers do the same work and not that they are as accurate: most of it goes to the gradients of
        weights, sums over all tokens of 16-bit products that nearly cancel.
        """
        case = self.case
        rows = ("output", f"gradient of {next(iter(case.leaves))}")
        fixed = PEER_TOLERANCE[case.spec.dtype]
        narrow = case.dtype != torch.float32
        errors = errors_of(case.results(case.native), self.exact) if narrow else self.own_errors
        return {name: max(fixed * (1 if name.startswith(rows) else 6), 4 * error) for name, error in errors.items()}

    def __call__(self, variant: str, call: Call) -> Verdict:
        found = self.case.results(call)
        misses = []
        for name, error in errors_of(found, self.exact).items():
            if variant in OWN:
                allowed = 2 * self.own_errors[name] + self.tiny(found[name].dtype, self.exact[name].numel() == 1)
            else:
                allowed = self.peer_errors[name]
            misses.append((error / allowed, name, error, allowed))
        worst = max(misses, key=lambda miss: math.inf if math.isnan(miss[0]) else miss[0])
        return Verdict(worst[0] <= 1, *worst[1:])

    def tiny(self, dtype: torch.dtype, scalar: bool) -> float:
        """What rounding alone may cost: more for a single number, whose yardstick may be exact by luck."""
        single = torch.finfo(torch.float32).eps
        return max(512 * single, 2 * torch.finfo(dtype).eps) if scalar else self.case.rounding * single


def errors_of(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """``‖found − exact‖ / ‖exact‖`` by tensor, in fp64; NaN where anything is NaN.

    A gradient that vanishes is measured against the largest one: a bias that a softmax or a variance takes away again
    gets nothing but rounding. One that nearly does is measured against no less than a small share of the largest.
    """
    norms = {name: float(torch.linalg.vector_norm(want)) for name, want in exact.items()}
    largest = max((norm for name, norm in norms.items() if name.startswith("gradient")), default=0.0)
    errors = {}
    for name, want in exact.items():
        assert found[name].shape == want.shape, f"{name}: shape {list(found[name].shape)}, not {list(want.shape)}"
        scale = norms[name]
        if name.startswith("gradient"):
            share = 10 * CANCELLING if want.numel() == 1 else CANCELLING  # a single number is a sum over all tokens
            scale = largest if scale < VANISHING * largest else max(scale, share * largest)
        difference = float(torch.linalg.vector_norm(found[name].double() - want))
        errors[name] = difference / scale if scale > 0 else difference
    return errors
