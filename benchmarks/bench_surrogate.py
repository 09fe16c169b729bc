"""The whole attention surrogate, forward and backward, against the ways to do it without this library.

``pytest benchmarks/ --benchmark-only`` times, in one run and for each shape:

* ``loop``: one Python loop over classes, as first published;
* ``padded-compiled``: the padded batch, keys and values materialised, under ``torch.compile``;
* ``eager`` and ``eager-compiled``: this library, with a static bound on the class size.

Every variant is checked against the reference in fp64 before it is timed. The figure to quote is the ratio in
``extra_info``: ``loop`` over ``eager`` and ``padded-compiled`` over ``eager-compiled``, timed turn by turn, because the
medians of the table are minutes apart and machines are noisy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.interleaved import times_slower
from benchmarks.peers import PaddedBatch, PerClassLoop
from cem import SlotCrossAttentionCEM

SHAPES = {"B128-K10-D128": (128, 10, 128), "B256-K100-D128": (256, 100, 128), "B1024-K200-D128": (1024, 200, 128)}

# Steps averaged in one timed round: a round should take tens of milliseconds, or the scheduler's noise shows.
STEPS = {"B128-K10-D128": 10, "B256-K100-D128": 3, "B1024-K200-D128": 1}

# Whom a variant is compared with, turn by turn.
PEERS = {"eager": "loop", "eager-compiled": "padded-compiled"}

Losses = Callable[[Tensor], tuple[Tensor, Tensor]]


class Case:
    """One shape: a surrogate, a batch, a fixed slot draw, and the exact result."""

    def __init__(self, shape: str) -> None:
        samples, classes, width = SHAPES[shape]
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(samples, width, generator=generator)
        self.labels = torch.randint(0, classes, (samples,), generator=generator)
        self.noise = torch.randn(classes, 8, width, generator=generator)
        self.bound = int(self.labels.bincount().max())
        torch.manual_seed(0)
        self.surrogate = self.build("eager")
        exact = self.build("reference").double()
        exact.load_state_dict({n: t.double() for n, t in self.surrogate.state_dict().items()})
        self.exact = self.step(lambda x: exact(x, self.labels, slot_noise=self.noise.double()), self.features.double())

    def build(self, backend: str) -> SlotCrossAttentionCEM:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return SlotCrossAttentionCEM(
                self.features.shape[1],
                num_classes=len(self.noise),
                max_class_size=self.bound,
                reg_strength=0.1,
                backend=backend,
            )

    def step(self, losses: Losses, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Forward and backward, to the features and to every parameter; returns the loss and the features' gradient."""
        x = (self.features if features is None else features).detach().requires_grad_()
        loss = losses(x)[0]
        loss.backward()
        for parameter in self.surrogate.parameters():
            parameter.grad = None
        return loss.detach(), x.grad

    def variant(self, name: str) -> Losses:
        if name == "loop":
            loop = PerClassLoop(self.surrogate)
            return lambda x: loop(x, self.labels, self.noise)
        if name == "padded-compiled":
            padded = torch.compile(PaddedBatch(self.surrogate, self.bound), fullgraph=True, dynamic=False)
            return lambda x: padded(x, self.labels, self.noise)
        module = self.surrogate
        if name == "eager-compiled":
            module = torch.compile(module, fullgraph=True, dynamic=False)
        return lambda x: module(x, self.labels, slot_noise=self.noise)

    def check(self, losses: Losses) -> None:
        loss, gradient = self.step(losses)
        torch.testing.assert_close(loss.double(), self.exact[0], rtol=1e-5, atol=0)
        error = (gradient.double() - self.exact[1]).norm() / self.exact[1].norm()
        assert error < 1e-4, f"relative error of the gradient {error:.2g}"


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest) -> tuple[str, Case]:
    torch.compiler.reset()
    return request.param, Case(request.param)


@pytest.mark.parametrize(
    "variant",
    [
        "loop",
        "eager",
        pytest.param("padded-compiled", marks=pytest.mark.slow),
        pytest.param("eager-compiled", marks=pytest.mark.slow),
    ],
)
def test_surrogate_forward_and_backward(benchmark, case, variant):
    shape, inputs = case
    losses = inputs.variant(variant)
    inputs.check(losses)
    benchmark.group = f"surrogate forward+backward {shape}"
    benchmark.pedantic(inputs.step, args=(losses,), rounds=15, iterations=STEPS[shape], warmup_rounds=2)
    if benchmark.enabled and variant in PEERS:
        peer = inputs.variant(PEERS[variant])
        inputs.check(peer)
        benchmark.extra_info[f"times_faster_than_{PEERS[variant]}"] = times_slower(
            lambda: inputs.step(peer), lambda: inputs.step(losses), STEPS[shape]
        )
