"""Slot attention for all classes at once, with absorbed projections, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels.groups import ClassGroups
from cem_kernels.slot_attention.weights import SlotAttentionWeights, absorb


def slot_attention(
    tokens: Tensor,
    slots: Tensor,
    groups: ClassGroups,
    weights: SlotAttentionWeights,
    num_iterations: int,
    eps: float,
) -> Tensor:
    """``tokens [B, T, D]``, ``slots [K, S, D]`` to the final slots ``[K, S, D]``.

    Classes are padded to ``L`` samples, ``N = L·T`` tokens. A padded row is a zero row, so it adds nothing to
    ``Σ_n a_n x_n``; only the normalizer ``Σ_n a_n`` has to leave it out. Slots are kept as ``K·S`` rows, and attention
    as ``[K, S, N]``, whose softmax over slots runs along contiguous tokens.
    """
    num_classes, num_slots, width = slots.shape
    w = weights
    query_map, input_map = absorb(w)
    tokens = groups.kept(tokens.to(slots.dtype))
    inputs = F.layer_norm(tokens, (width,), w.norm_inputs_weight, w.norm_inputs_bias)
    inputs = groups.pad(inputs).flatten(1, 2)  # [K, N, D]
    inputs_t = inputs.mT
    mask = groups.padding.mask.to(inputs.dtype).repeat_interleave(tokens.shape[1], dim=1)[:, :, None]  # [K, N, 1]
    has_tokens = (groups.counts > 0)[:, None, None]
    # Keeps the normalizer of an empty class off zero.
    no_tokens = (~has_tokens).to(inputs.dtype).expand(-1, num_slots, 1)

    rows = initial = slots.reshape(-1, width)  # [K·S, D]
    for _ in range(num_iterations):
        query = F.layer_norm(rows, (width,), w.norm_slots_weight, w.norm_slots_bias) @ query_map
        logits = torch.bmm(query.view(num_classes, num_slots, width), inputs_t)
        attention = torch.softmax(logits, dim=1) + eps  # [K, S, N]
        attention = attention / torch.baddbmm(no_tokens, attention, mask)
        updates = torch.bmm(attention, inputs).view(-1, width)
        rows = torch.gru_cell(updates, rows, input_map, w.gru_weight_hh, w.gru_bias_ih, w.gru_bias_hh)
        hidden = F.layer_norm(rows, (width,), w.norm_mlp_weight, w.norm_mlp_bias)
        hidden = F.relu(F.linear(hidden, w.mlp_in_weight, w.mlp_in_bias))
        rows = rows + F.linear(hidden, w.mlp_out_weight, w.mlp_out_bias)
    return torch.where(has_tokens, rows.view(slots.shape), initial.view(slots.shape))
