"""The weights of gated cross attention, and their absorbed form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CrossAttentionWeights(NamedTuple):
    """Everything learned in gated cross attention; ``D`` is the token width. Layouts are those of ``torch.nn``."""

    to_q: Tensor  # [D, D]
    to_k: Tensor  # [D, D]
    to_v: Tensor  # [D, D]
    proj_weight: Tensor  # [D, D]
    proj_bias: Tensor  # [D]
    alpha_xattn: Tensor  # []
    alpha_ffn: Tensor  # []
    ffn_in_weight: Tensor  # [4D, D]
    ffn_in_bias: Tensor  # [4D]
    ffn_out_weight: Tensor  # [D, 4D]
    ffn_out_bias: Tensor  # [D]
    ln_q_weight: Tensor  # [D]
    ln_q_bias: Tensor  # [D]
    ln_kv_weight: Tensor  # [D]
    ln_kv_bias: Tensor  # [D]
    ln_ff_weight: Tensor  # [D]
    ln_ff_bias: Tensor  # [D]

    def expected_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape each weight must have, judged by ``to_q`` and ``ffn_in_weight``."""
        d, hidden = self.to_q.shape[0], self.ffn_in_weight.shape[0]
        projections = ((d, d),) * 4
        ffn = ((hidden, d), (hidden,), (d, hidden), (d,))
        return (*projections, (d,), (), (), *ffn, *((d,),) * 6)


def absorb(slots: Tensor, weights: CrossAttentionWeights, num_heads: int) -> tuple[Tensor, Tensor]:
    """What the tokens of a class multiply with, so that their queries and head outputs never exist.

    Per head ``h``: ``q_h·k_h = LN_q(x)·(W_q,hᵀ k_h)`` and ``W_p,h (p v_h) = p (W_p,h v_h)``. Differentiable.

    Args:
        slots: ``[K, S, D]``, normalized (``LN_kv``).
        weights: the block's weights, in the slots' dtype.
        num_heads: ``H``, a divisor of ``D``.

    Returns:
        ``G [K, H·S, D]``, scale ``(D/H)^-1/2`` included, and ``P [K, H·S, D]``; rows are head-major.
    """
    num_classes, num_slots, width = slots.shape
    head_width = width // num_heads
    rows = slots.reshape(-1, width)

    def by_head(x: Tensor) -> Tensor:  # [K·S, D] to [H, K·S, d]
        return x.view(-1, num_heads, head_width).transpose(0, 1)

    def by_class(x: Tensor) -> Tensor:  # [H, K·S, D] to [K, H·S, D]
        x = x.view(num_heads, num_classes, num_slots, width).transpose(0, 1)
        return x.reshape(num_classes, num_heads * num_slots, width)

    query_matrices = weights.to_q.view(num_heads, head_width, width) * head_width**-0.5
    output_matrices = weights.proj_weight.t().reshape(num_heads, head_width, width)
    keys = by_head(rows @ weights.to_k.t())
    values = by_head(rows @ weights.to_v.t())
    return by_class(keys @ query_matrices), by_class(values @ output_matrices)
