"""The weights of slot attention, and their absorbed form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SlotAttentionWeights(NamedTuple):
    """Everything learned in slot attention; ``D`` is the token width. Layouts are those of ``torch.nn``.

    Projections have no bias; the GRU is ``torch.nn.GRUCell(D, D)``; the MLP is ``D → 2D → D`` (any hidden width
    works); each norm is an affine LayerNorm over ``D``.
    """

    to_q: Tensor  # [D, D]
    to_k: Tensor  # [D, D]
    to_v: Tensor  # [D, D]
    gru_weight_ih: Tensor  # [3D, D]
    gru_weight_hh: Tensor  # [3D, D]
    gru_bias_ih: Tensor  # [3D]
    gru_bias_hh: Tensor  # [3D]
    mlp_in_weight: Tensor  # [2D, D]
    mlp_in_bias: Tensor  # [2D]
    mlp_out_weight: Tensor  # [D, 2D]
    mlp_out_bias: Tensor  # [D]
    norm_inputs_weight: Tensor  # [D]
    norm_inputs_bias: Tensor  # [D]
    norm_slots_weight: Tensor  # [D]
    norm_slots_bias: Tensor  # [D]
    norm_mlp_weight: Tensor  # [D]
    norm_mlp_bias: Tensor  # [D]

    def expected_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape each weight must have, judged by ``to_q`` and ``mlp_in_weight``."""
        d, hidden = self.to_q.shape[0], self.mlp_in_weight.shape[0]
        projections = ((d, d),) * 3
        gru = ((3 * d, d), (3 * d, d), (3 * d,), (3 * d,))
        mlp = ((hidden, d), (hidden,), (d, hidden), (d,))
        return projections + gru + mlp + ((d,),) * 6


def logit_scale(width: int) -> float:
    """The scale of the attention logits: the seeds scale twice, by ``D^-1/2`` and then by ``D^-1/4``."""
    return float(width) ** -0.75


def absorb(weights: SlotAttentionWeights) -> tuple[Tensor, Tensor]:
    """Fold the projections of the tokens into matrices that act on slots.

    ``(W_k x)·(W_q s) = x·(W_kᵀ W_q s)`` and ``W_ih (Σ a W_v x) = (W_ih W_v) (Σ a x)``, so keys and values of the
    tokens never exist. Two small products, differentiable, in front of any backend.

    Returns:
        ``query_map [D, D]``, applied to normalized slots as ``s @ query_map`` (scale included), and
        ``input_map [3D, D]``, which takes the GRU's input-to-hidden place.
    """
    width = weights.to_q.shape[0]
    query_map = (weights.to_q.t() @ weights.to_k) * logit_scale(width)
    return query_map, weights.gru_weight_ih @ weights.to_v
