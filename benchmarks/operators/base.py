"""What every operator's benchmark shares: a batch, the variants that compute it, its cost, and the check before timing.

An operator is one subclass of :class:`Case` in a file of its own, and one entry of :data:`benchmarks.operators.CASES`.
"""

from __future__ import annotations

import abc
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.operator_peers import Classes
from cem_kernels import BackendUnavailableError, ClassGroups

Call = Callable[..., tuple[Tensor, ...]]  # the differentiable inputs to the outputs

DIRECTIONS = ("forward", "backward", "both")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OWN = ("eager", "eager-compiled", "triton")  # this library's variants; every other one is a peer


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


@dataclass(frozen=True)
class Verdict:
    """Whether a variant computes what it should, and by how much it missed at the tensor where it is worst."""

    passed: bool
    worst: str  # the tensor's name
    error: float  # relative to the fp64 reference
    allowed: float


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
    def plain(self, variant: str) -> Call:
        """The variant uncompiled. Raises :class:`BackendUnavailableError` where it cannot run."""

    @abc.abstractmethod
    def yardsticks(self) -> list[Call]:
        """The definition in the precisions that this library's own variants may compute in."""

    @staticmethod
    @abc.abstractmethod
    def cost(spec: Spec, direction: str) -> Cost:
        """The fewest bytes and operations: every input read once, every output written once, products done once."""

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

    @abc.abstractmethod
    def reference(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The definition, one class at a time."""

    def native(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The definition as peers compute it: in the tokens' dtype, where it is not in fp32 for them too."""
        return self.reference(*leaves)

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        return self.results(self.reference, torch.float64)

    @cached_property
    def own_errors(self) -> dict[str, float]:
        """By tensor, the error of the definition in the worst precision that is allowed."""
        errors = [errors_of(self.results(call), self.exact) for call in self.yardsticks()]
        return {name: max(error[name] for error in errors) for name in self.exact}

    @cached_property
    def peer_errors(self) -> dict[str, float]:
        """By tensor, what a peer may err by: a fixed tolerance, or more where the definition does badly in its dtype.

        It says that peers do the same work and not that they are as accurate: most of it goes to the gradients of
        weights, sums over all tokens of 16-bit products that nearly cancel.
        """
        rows = ("output", f"gradient of {next(iter(self.leaves))}")
        fixed = PEER_TOLERANCE[self.spec.dtype]
        narrow = self.dtype != torch.float32
        errors = errors_of(self.results(self.native), self.exact) if narrow else self.own_errors
        return {name: max(fixed * (1 if name.startswith(rows) else 6), 4 * error) for name, error in errors.items()}

    def check(self, variant: str, call: Call) -> Verdict:
        """Compare outputs and every gradient with the reference in fp64.

        This library's own variants may err twice as much as the definition does in their precision, peers as
        :attr:`peer_errors` says.
        """
        found = self.results(call)
        ratios = []
        for name, error in errors_of(found, self.exact).items():
            if variant in OWN:
                allowed = 2 * self.own_errors[name] + self.tiny(found[name].dtype, self.exact[name].numel() == 1)
            else:
                allowed = self.peer_errors[name]
            ratios.append((error / allowed, name, error, allowed))
        worst = max(ratios, key=lambda miss: math.inf if math.isnan(miss[0]) else miss[0])
        return Verdict(worst[0] <= 1, *worst[1:])

    def tiny(self, dtype: torch.dtype, scalar: bool) -> float:
        """What rounding alone may cost: more for a single number, whose yardstick may be exact by luck."""
        single = torch.finfo(torch.float32).eps
        return max(512 * single, 2 * torch.finfo(dtype).eps) if scalar else self.rounding * single


PEER_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


# Of the largest gradient: what fp64 leaves of one that is zero in exact arithmetic, and of one where most cancels.
VANISHING, CANCELLING = 1e-9, 1e-4


def errors_of(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
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


def own_module(operator: str, backend: str) -> object:
    """``cem_kernels.<operator>.<backend>``, or the error that says that there is none."""
    try:
        return importlib.import_module(f"cem_kernels.{operator}.{backend}")
    except ImportError as error:
        raise BackendUnavailableError(f"{operator} has no importable {backend!r} backend: {error}") from error
