"""The whole attention surrogate: the loop, a padded batch, and this library, from features to both losses."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from benchmarks.check import OWN
from benchmarks.operators.base import Call, Case, Cost, Spec, moved
from benchmarks.operators.class_variance import ClassVarianceCase
from benchmarks.operators.cross_attention import CrossAttentionCase
from benchmarks.operators.slot_attention import ITERATIONS, SlotAttentionCase, off_the_kink
from benchmarks.surrogate_peers import PaddedBatch, PerClassLoop
from cem import Batch, SlotCrossAttentionCEM


class Losses(nn.Module):
    """This library's surrogate, called as its peers are."""

    def __init__(self, surrogate: SlotCrossAttentionCEM) -> None:
        super().__init__()
        self.surrogate = surrogate

    def forward(self, features: Tensor, labels: Tensor, slot_noise: Tensor) -> tuple[Tensor, Tensor]:
        """Features as the case has them, ``labels [B]``, ``slot_noise [K, S, D]`` to the two losses."""
        measured = self.surrogate.measure(Batch(None, labels, features, features), slot_noise=slot_noise)
        return measured.loss, measured.monitors["intra_mse"]


class SurrogateCase(Case):
    """Features and every parameter of the surrogate to ``rob_loss`` and ``intra_mse``, grouping by labels included.

    Features are ``[B, D]`` for one token a sample and maps ``[B, D, 1, T]`` for more; the slots' draw is fixed. The
    dtype of the case is that of the features. Parameters are fp32, as a training loop has them. Of half-precision
    features kernels multiply matrices in that dtype and do all else in fp32; eager computes in fp32 throughout, peers
    in the features' dtype but for the statistics. Gradients come back in the dtype of what they belong to.
    """

    variants = ("triton", "padded-compiled", "eager", "eager-compiled", "padded", "loop")
    rounding = 64  # three operators, and weights' gradients that sum over all tokens, or over class after class

    def surrogate(self, backend: str) -> SlotCrossAttentionCEM:
        s = self.spec
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(0)
            warnings.simplefilter("error")  # of a threshold that means nothing
            surrogate = SlotCrossAttentionCEM(
                s.D,
                s.S,
                s.H,
                ITERATIONS,
                reg_strength=0.1,
                num_classes=s.K,
                max_class_size=self.classes.size,
                spatial=s.T > 1,
                backend=backend,
            )
        return surrogate.to(self.device)

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        s = self.spec
        features = self.normal(generator, s.B, s.D, 1, s.T) if s.T > 1 else self.normal(generator, s.B, s.D)
        self.noise = self.normal(generator, s.K, s.S, s.D)
        # Off their initial values, at which norms and biases do nothing.
        parameters = {n: p + self.normal(generator, *p.shape, scale=0.03) for n, p in self.named_parameters()}
        parameters["slot_attention.mlp.0.bias"] = off_the_kink(parameters["slot_attention.mlp.0.bias"])
        parameters["slot_attention.mlp.2.weight"] *= 1 / 8  # or what open gates add would make all slots alike
        return {"features": features.to(self.dtype), **parameters}

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.surrogate("eager").named_parameters())

    def leaf(self, value: Tensor) -> Tensor:
        return value.detach().requires_grad_()

    def draw_upstream(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        return torch.tensor(1.0, device=self.device), torch.tensor(0.5, device=self.device)

    def build(self, variant: str) -> Call:
        base = variant.removesuffix("-compiled")
        surrogate = self.surrogate(base if base in (*OWN, "reference") else "eager")
        modules: dict[str, nn.Module] = {
            "loop": PerClassLoop(surrogate),
            "padded": PaddedBatch(surrogate, self.classes.size),
        }
        losses: Call = modules.get(base, Losses(surrogate))
        if base != variant:
            losses = torch.compile(losses, fullgraph=True, dynamic=False)
        call = self.called(losses, surrogate)
        return self.tried(call) if variant == "triton" else call

    def public(self, backend: str) -> Call:
        return self.build(backend)

    def peer(self, variant: str) -> Call:
        return self.build(variant)

    def called(self, losses: Call, surrogate: SlotCrossAttentionCEM) -> Call:
        """``losses``, which computes with the parameters of ``surrogate``, as a function of features and of these.

        They are put into its place as a dictionary is filled: ``torch.func.functional_call`` takes a good part of the
        time that the host has for a call.
        """
        owners = [name.rpartition(".") for name in list(self.leaves)[1:]]
        places = [(surrogate.get_submodule(owner)._parameters, name) for owner, _, name in owners]

        def call(features: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
            for (owner, name), parameter in zip(places, parameters, strict=True):
                owner[name] = parameter  # type: ignore[assignment]
            return losses(features, self.labels, slot_noise=self.noise)

        return call

    def native(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        return self.build("loop")(*leaves)

    def yardsticks(self) -> list[Call]:
        return [self.reference, self.native]  # fp32 whatever the features are, or their dtype

    @staticmethod
    def cost(spec: Spec, direction: str) -> Cost:
        """Bytes of features, parameters and the slots' draw; operations of the three operators.

        What one operator hands to the next is not counted: it could stay where it is computed.
        """
        forward, backward = (sum(part.cost(spec, d).operations for part in PARTS) for d in ("forward", "backward"))
        d = spec.D
        features, draw = spec.B * spec.T * d * spec.item, 4 * spec.K * spec.S * d
        parameters = 4 * (25 * d * d + 29 * d + 2)
        return moved(direction, features + parameters, 0, 8 * spec.B + draw, forward, backward)

    @staticmethod
    def trips(spec: Spec, direction: str) -> int:
        return sum(part.trips(spec, direction) for part in PARTS)


PARTS = (SlotAttentionCase, CrossAttentionCase, ClassVarianceCase)
