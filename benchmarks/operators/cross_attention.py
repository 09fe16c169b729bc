"""Gated cross attention with and without its feed-forward network: fused attention, FlexAttention, and this library.

``gated_read`` is ``y = x + tanh(α_x) · (W_p o + b_p)``, what the fused kernel does. ``cross_attention`` adds the
feed-forward network, two matrix products that every variant takes from the library and that hide the rest.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.operators.base import Call, Case, Cost, Spec, moved
from cem_kernels import BackendUnavailableError, CrossAttentionWeights
from cem_kernels.cross_attention import cross_attention, reference

OF_THE_FFN = tuple(name for name in CrossAttentionWeights._fields if "ff" in name)


class CrossAttentionCase(Case):
    """Tokens ``[B, T, D]`` and slots ``[K, S, D]`` to ``[B, T, D]``, in fp32 here and in the tokens' dtype in peers."""

    variants = (
        "triton", "padded-compiled", "gathered-compiled", "eager", "eager-compiled", "padded", "gathered",
        "flex-compiled", "loop",
    )  # fmt: skip
    feeds_forward = True

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        s, d, small = self.spec, self.spec.D, self.spec.D**-0.5

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return self.normal(generator, *shape, scale=scale)

        weights = {
            **{name: draw(d, d, scale=small) for name in ("to_q", "to_k", "to_v", "proj_weight")},
            **{name: torch.full((), 0.1, device=self.device) for name in ("alpha_xattn", "alpha_ffn")},
            "ffn_in_weight": draw(4 * d, d, scale=small),
            "ffn_out_weight": draw(d, 4 * d, scale=small / 2),
            "ffn_in_bias": draw(4 * d, scale=0.1),
            **{name: draw(d, scale=0.1) for name in ("proj_bias", "ffn_out_bias")},
            **{f"ln_{name}_weight": 1 + draw(d, scale=0.1) for name in ("q", "kv", "ff")},
            **{f"ln_{name}_bias": draw(d, scale=0.1) for name in ("q", "kv", "ff")},
        }
        shut = {name: torch.zeros_like(weights[name]).to(self.dtype) for name in OF_THE_FFN}
        self.constants = {} if self.feeds_forward else shut
        leaves = {name: value for name, value in weights.items() if name not in self.constants}
        return {"tokens": draw(s.B, s.T, d), "slots": draw(s.K, s.S, d), **leaves}

    def draw_upstream(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        s = self.spec
        # Rounded to the tokens' dtype, so that variants which write it get the same values.
        return (self.normal(generator, s.B, s.T, s.D).to(self.dtype).float(),)

    def weights(self, leaves: tuple[Tensor, ...]) -> CrossAttentionWeights:
        """From the leaves behind tokens and slots; a feed-forward network that is no part of the work is shut."""
        named = dict(zip(list(self.leaves)[2:], leaves, strict=True))
        constants = {name: value.to(leaves[0].dtype) for name, value in self.constants.items()}
        return CrossAttentionWeights(**named, **constants)

    def native(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        tokens, slots, *rest = leaves
        weights = self.weights(tuple(rest))
        return (reference.cross_attention(tokens, slots, self.groups, weights, self.spec.H, 0.0),)

    def public(self, backend: str) -> Call:
        """The public operator; where the feed-forward network is shut it returns the gated read, to the bit."""

        def call(tokens: Tensor, slots: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            weights = self.weights(rest)
            return (cross_attention(tokens, slots, self.groups, weights, num_heads=self.spec.H, backend=backend),)

        return call

    def peer(self, variant: str) -> Call:
        classes, heads = self.classes, self.spec.H
        if variant == "flex":
            if self.device.type != "cuda":
                raise BackendUnavailableError("FlexAttention has no backward on this device")
            mask = peers.class_block_mask(classes, self.spec.T, self.spec.S)

        def peer(tokens: Tensor, slots: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            weights = self.weights(rest)
            if variant == "flex":
                y = peers.flex_read(tokens, slots, weights, heads, classes, mask)
            else:
                y = READS[variant](tokens, slots, weights, heads, classes)
            return (peers.feed_forward(y, weights) if self.feeds_forward else y,)

        return peer

    @classmethod
    def of_read(cls, spec: Spec) -> tuple[float, float]:
        """Weights and forward operations of the read: the cheaper of absorbed and materialized projections."""
        tokens, slots, d = spec.B * spec.T, spec.K * spec.S, spec.D
        absorbed = 4 * tokens * d * spec.H * spec.S + 8 * slots * d * d
        materialized = 4 * tokens * d * d + 4 * tokens * spec.S * d + 4 * slots * d * d
        return 4 * d * d + 5 * d + 1, min(absorbed, materialized)

    @staticmethod
    def cost(spec: Spec, direction: str) -> Cost:
        weights, operations = CrossAttentionCase.of_read(spec)
        d = spec.D
        return cost_of(spec, direction, weights + 8 * d * d + 7 * d + 1, operations + 16 * spec.B * spec.T * d * d)


class GatedReadCase(CrossAttentionCase):
    """The operator without its feed-forward network."""

    feeds_forward = False

    def own(self, backend: str) -> Call:
        if backend == "triton":
            super().own(backend)  # refused here, by name, where it cannot run
        module: Any = importlib.import_module(f"cem_kernels.cross_attention.{backend}")

        def call(tokens: Tensor, slots: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            weights = self.weights(rest)
            dtype = torch.promote_types(tokens.dtype, torch.float32)  # as the public function does
            weights = CrossAttentionWeights(*(weight.to(dtype) for weight in weights))
            return (module.gated_read(tokens, slots.to(dtype), self.groups, weights, self.spec.H, 0.0),)

        return call

    def plain(self, variant: str) -> Call:
        return self.peer(variant) if variant == "loop" else super().plain(variant)

    @staticmethod
    def cost(spec: Spec, direction: str) -> Cost:
        return cost_of(spec, direction, *CrossAttentionCase.of_read(spec))


READS = {"padded": peers.padded_read, "gathered": peers.gathered_read, "loop": peers.looped_read}


def cost_of(spec: Spec, direction: str, weights: float, operations: float) -> Cost:
    """Inputs in the tokens' dtype, an output in fp32; two products back for each one."""
    tokens = spec.B * spec.T * spec.D
    inputs = (tokens + spec.K * spec.S * spec.D + weights) * spec.item
    return moved(direction, inputs, 4 * tokens, 8 * spec.B, operations, 2 * operations)
