"""What every operator's benchmark shares: a batch, the variants that compute it, and its cost.

An operator is one subclass of :class:`Case` in a file of its own, and one entry of :data:`benchmarks.operators.CASES`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.check import Check
from benchmarks.peers import Classes
from cem_kernels import ClassGroups

Call = Callable[..., tuple[Tensor, ...]]  # the differentiable inputs to the outputs

DIRECTIONS = ("forward", "backward", "both")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Spec:
    """One batch of one operator, by its sizes; see the letters in CONTRIBUTING.md."""

    operator: str
    B: int
    K: int
    T: int
    D: int
    dtype: str = "fp32"
    S: int = 8
    H: int = 4
    labels: str = "spread"  # "holes": some classes are empty; "one": all samples are in the last class
    layout: str = "dense"  # of the first input: or "strided" columns, or "expanded" along the tokens
    penalty: str = "relu"

    @property
    def name(self) -> str:
        sizes = [f"{letter}{getattr(self, letter)}" for letter in LETTERS.get(self.operator, "BKTDSH")]
        special = [v for v, usual in zip((self.labels, self.layout, self.penalty), USUAL, strict=True) if v != usual]
        return " ".join([self.operator, *sizes, self.dtype, *special])

    @property
    def item(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize


LETTERS = {  # of operators that do not have them all
    "class_variance": "BKTD",
    "centroid_variance": "BKTD",
    "slot_variance": "BKTDS",
    "slot_attention": "BKTDS",
}
USUAL = ("spread", "dense", "relu")


@dataclass(frozen=True)
class Cost:
    """The fewest bytes an operator must move through device memory and the fewest operations it must do."""

    bytes: float
    operations: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.operations + other.operations)

    def floor(self, bytes_per_second: float, operations_per_second: float) -> tuple[float, str]:
        """Seconds that no version beats, and which of the two takes them."""
        moving, computing = self.bytes / bytes_per_second, self.operations / operations_per_second
        return max(moving, computing), "bytes" if moving >= computing else "operations"


def moved(direction: str, inputs: float, outputs: float, index: float, forward: float, backward: float) -> Cost:
    """The cost of an operator whose inputs, outputs and index are so many bytes, from its operations in each direction.

    Forward reads inputs and index and writes the outputs. Backward reads inputs, index and the outputs' gradient, and
    writes a gradient for each input.
    """
    there = Cost(inputs + outputs + index, forward)
    back = Cost(2 * inputs + outputs + index, backward)
    return {"forward": there, "backward": back, "both": there + back}[direction]


def rate_of(dtype: str) -> str:
    """Which measured arithmetic rate holds for a dtype: 16-bit matrix units, or plain fp32 (TF32 is off)."""
    return "bf16" if dtype in ("bf16", "fp16") else "fp32"


class Case(abc.ABC):
    """One batch on one device, everything about its labels prepared."""

    variants: ClassVar[tuple[str, ...]]  # what computes it, this library first, whoever may break the device last
    uncapturable: ClassVar[dict[str, str]] = {"loop": "it reads the class sizes on the host"}
    rounding: ClassVar[float] = 8  # what the order of sums may cost this library's own variants, in fp32's epsilons

    def __init__(self, spec: Spec, device: str | torch.device) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.dtype = DTYPES[spec.dtype]
        generator = torch.Generator(self.device).manual_seed(0)
        self.labels = self.draw_labels(generator)
        self.classes = Classes.of(self.labels, spec.K)
        self.groups = ClassGroups.from_labels(self.labels, spec.K, max_class_size=self.classes.size)
        assert self.groups.padding is not None  # made here, outside of every clock, capture and compiler
        self.leaves = {name: self.leaf(value) for name, value in self.draw(generator).items()}
        first = next(iter(self.leaves))
        self.leaves[first] = relayout(self.leaves[first], spec.layout).requires_grad_()
        self.upstream = self.draw_upstream(generator)

    @abc.abstractmethod
    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Differentiable inputs by name, the tokens first, in any dtype."""

    @abc.abstractmethod
    def draw_upstream(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The gradient of every output."""

    @abc.abstractmethod
    def public(self, backend: str) -> Call:
        """This library's operator on a named backend."""

    @abc.abstractmethod
    def peer(self, variant: str) -> Call:
        """What computes the same without this library. Raises :class:`BackendUnavailableError` where it cannot run."""

    @staticmethod
    @abc.abstractmethod
    def cost(spec: Spec, direction: str) -> Cost:
        """The fewest bytes and operations: every input read once, every output written once, products done once."""

    @staticmethod
    def trips(spec: Spec, direction: str) -> int:
        """Round trips to memory in the longest program of this library's kernels, each waiting for the one before.

        Of a launch: bounds of the class, its samples, their rows; arrival, what others have left, the result.
        """
        return 12 if direction == "both" else 6

    def draw_labels(self, generator: torch.Generator) -> Tensor:
        spec = self.spec
        if spec.labels == "one":
            return torch.full((spec.B,), spec.K - 1, device=self.device)
        used = torch.arange(spec.K, device=self.device)
        if spec.labels == "holes":
            used = used[1::2] if spec.K > 1 else used
        draw = torch.randint(0, len(used), (spec.B,), generator=generator, device=self.device)
        return used[draw]

    def normal(self, generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=self.device) * scale

    def leaf(self, value: Tensor) -> Tensor:
        return value.to(self.dtype).detach().requires_grad_()

    def plain(self, variant: str) -> Call:
        """The variant uncompiled. Raises :class:`BackendUnavailableError` where it cannot run."""
        if variant in ("eager", "triton"):
            return self.own(variant)
        return self.public("reference") if variant == "loop" else self.peer(variant)

    def own(self, backend: str) -> Call:
        return self.tried(self.public(backend)) if backend == "triton" else self.public(backend)

    def tried(self, call: Call) -> Call:
        """Called once, so that kernels which cannot run here refuse by name, ahead of every clock."""
        with torch.no_grad():
            call(*self.leaves.values())
        return call

    def build(self, variant: str) -> Call:
        """The callable behind a variant's name; ``-compiled`` is the plain one under :func:`torch.compile`."""
        base = variant.removesuffix("-compiled")
        call = self.plain(base)
        return call if base == variant else torch.compile(call, fullgraph=True, dynamic=False)

    def copies(self, count: int) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """``count`` sets of leaves and upstream gradients at addresses of their own."""
        return [
            (
                tuple(leaf.detach().clone().requires_grad_() for leaf in self.leaves.values()),
                tuple(gradient.clone() for gradient in self.upstream),
            )
            for _ in range(count)
        ]

    def results(self, call: Call, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs and gradients by name, from inputs upcast to ``dtype`` where one is given."""
        leaves = list(self.leaves.values())
        if dtype is not None:
            leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        outputs = call(*leaves)
        grads = torch.autograd.grad(outputs, leaves, as_upstream(self.upstream, outputs))
        found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        return found | {f"gradient of {name}": g for name, g in zip(self.leaves, grads, strict=True)}

    def reference(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The definition, one class at a time."""
        return self.public("reference")(*leaves)

    def native(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The definition as peers compute it: in the tokens' dtype, where it is not in fp32 for them too."""
        return self.reference(*leaves)

    def yardsticks(self) -> list[Call]:
        """The definition in the precisions that this library's own variants may compute in."""
        return [self.reference] if self.dtype == torch.float32 else [self.reference, self.native]

    @cached_property
    def check(self) -> Check:
        """``check(variant, call)``: the verdict on a call that is said to compute this case."""
        return Check(self)


def relayout(x: Tensor, layout: str) -> Tensor:
    """The same shape in another layout: every second column of a wider tensor, or one token for all of a sample."""
    x = x.detach()
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded":
        return x[:, :1].expand_as(x)
    return x


def as_upstream(upstream: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The upstream gradients in the outputs' dtypes: peers write tokens' dtype where this library writes fp32."""
    return tuple(u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True))
