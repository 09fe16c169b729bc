"""Slot attention: the loop, a padded batch with keys and values materialized, and this library."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.operators.base import Call, Case, Cost, Spec, moved
from cem_kernels import SlotAttentionWeights
from cem_kernels.slot_attention import reference, slot_attention

ITERATIONS, EPS = 3, 1e-8


def off_the_kink(bias: Tensor) -> Tensor:
    """A bias in front of a ReLU that opens half of the gates and shuts the others, beyond what rounding may change.

    One gate of many thousands that opens in one precision and not in another is an error that says nothing.
    """
    return 4 * bias.sign()


class SlotAttentionCase(Case):
    """Tokens ``[B, T, D]`` and slots ``[K, S, D]`` to slots ``[K, S, D]``, in three iterations.

    Statistics are fp32 here; in ``padded`` everything has the tokens' dtype, slots and weights included.
    """

    variants = ("triton", "padded-compiled", "eager", "eager-compiled", "padded", "loop")

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        s, d, small = self.spec, self.spec.D, self.spec.D**-0.5

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return self.normal(generator, *shape, scale=scale)

        return {
            "tokens": draw(s.B, s.T, d),
            "slots": draw(s.K, s.S, d),
            # Wide enough that attention tells slots apart.
            **{name: draw(d, d, scale=2 * small) for name in ("to_q", "to_k", "to_v")},
            **{f"gru_weight_{name}": draw(3 * d, d, scale=small) for name in ("ih", "hh")},
            **{f"gru_bias_{name}": draw(3 * d, scale=0.1) for name in ("ih", "hh")},
            "mlp_in_weight": draw(2 * d, d, scale=small),
            "mlp_in_bias": off_the_kink(draw(2 * d)),
            "mlp_out_weight": draw(d, 2 * d, scale=small / 8),  # or what open gates add would make all slots alike
            "mlp_out_bias": draw(d, scale=0.1),
            **{f"norm_{name}_weight": 1 + draw(d, scale=0.1) for name in ("inputs", "slots", "mlp")},
            **{f"norm_{name}_bias": draw(d, scale=0.1) for name in ("inputs", "slots", "mlp")},
        }

    def draw_upstream(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        s = self.spec
        # Rounded to the tokens' dtype, so that variants which write it get the same values.
        return (self.normal(generator, s.K, s.S, s.D).to(self.dtype).float(),)

    def weights(self, leaves: tuple[Tensor, ...]) -> SlotAttentionWeights:
        """From the leaves behind tokens and slots."""
        return SlotAttentionWeights(**dict(zip(list(self.leaves)[2:], leaves, strict=True)))

    def public(self, backend: str) -> Call:
        def call(tokens: Tensor, slots: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            weights = self.weights(rest)
            sizes: Any = {"num_iterations": ITERATIONS, "eps": EPS}
            return (slot_attention(tokens, slots, self.groups, weights, **sizes, backend=backend),)

        return call

    def native(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        tokens, slots, *rest = leaves
        return (reference.slot_attention(tokens, slots, self.groups, self.weights(tuple(rest)), ITERATIONS, EPS),)

    def peer(self, variant: str) -> Call:
        def padded(tokens: Tensor, slots: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return (peers.padded_slots(tokens, slots, self.weights(rest), ITERATIONS, EPS, self.classes),)

        return padded

    @staticmethod
    def cost(spec: Spec, direction: str) -> Cost:
        """Tokens, slots and weights are read once, not once an iteration; so are their gradients written.

        Operations are those of the absorbed form, two a multiply-add. In every iteration tokens meet slots in two
        products, logits and updates, of ``S·D`` multiply-adds a token, and each of the ``K·S`` slot rows goes through
        ``11·D²``: the query map (``D²``), the GRU's input and hidden maps (``3·D²`` each) and the MLP (``4·D²``).
        Folding projections into maps is left out, being work on weights alone. Backward does two products for each one,
        and the logits once more, as attention is not kept.
        """
        tokens, rows, d = spec.B * spec.T, spec.K * spec.S, spec.D
        inputs = (tokens * d + rows * d + 13 * d * d + 15 * d) * spec.item
        logits = 2 * tokens * spec.S * d
        forward = ITERATIONS * (2 * logits + 22 * rows * d * d)
        return moved(direction, inputs, 4 * rows * d, 8 * spec.B, forward, 2 * forward + ITERATIONS * logits)

    @staticmethod
    def trips(spec: Spec, direction: str) -> int:
        """Of every iteration: tiles of 32 tokens, of at most 256 a program, are read twice, and slot rows meet matrices
        of ``10·D²`` numbers in blocks of 2,048, each waited for. Backward does so for each product's two."""
        tiles = math.ceil(min(spec.B * spec.T / (1 if spec.labels == "one" else spec.K), 256) / 32)
        forward = ITERATIONS * (2 * tiles + math.ceil(10 * spec.D**2 / 2048))
        return Case.trips(spec, direction) + forward * {"forward": 1, "backward": 2, "both": 3}[direction]
