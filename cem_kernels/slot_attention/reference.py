"""Slot attention, one class at a time: the definition that the other backends are held to.

Locatello et al. 2020, "Object-Centric Learning with Slot Attention", algorithm 1, with the second temperature
``D^-1/4`` on the logits that the original surrogate has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels.groups import ClassGroups
from cem_kernels.slot_attention.weights import SlotAttentionWeights


def slot_attention(
    tokens: Tensor,
    slots: Tensor,
    groups: ClassGroups,
    weights: SlotAttentionWeights,
    num_iterations: int,
    eps: float,
) -> Tensor:
    """``tokens [B, T, D]``, ``slots [K, S, D]`` to the final slots ``[K, S, D]``."""
    tokens = tokens.to(slots.dtype)
    bounds = groups.offsets.tolist()
    results = []
    for c in range(groups.num_classes):
        members = groups.order[bounds[c] : bounds[c + 1]]
        if len(members) == 0:
            results.append(slots[c])
        else:
            results.append(one_class(tokens[members].flatten(0, 1), slots[c], weights, num_iterations, eps))
    return torch.stack(results)


def one_class(tokens: Tensor, slots: Tensor, w: SlotAttentionWeights, num_iterations: int, eps: float) -> Tensor:
    """``tokens [N, D]`` of one class, its ``slots [S, D]``; ``N ≥ 1``."""
    width = tokens.shape[-1]
    inputs = F.layer_norm(tokens, (width,), w.norm_inputs_weight, w.norm_inputs_bias)
    k = F.linear(inputs, w.to_k)
    v = F.linear(inputs, w.to_v)
    for _ in range(num_iterations):
        previous = slots
        q = F.linear(F.layer_norm(slots, (width,), w.norm_slots_weight, w.norm_slots_bias), w.to_q) * width**-0.5
        logits = torch.einsum("nd,sd->ns", k, q) / width**0.25
        attention = torch.softmax(logits, dim=-1) + eps
        attention = attention / attention.sum(dim=0, keepdim=True)
        updates = torch.einsum("ns,nd->sd", attention, v)
        slots = torch.gru_cell(updates, previous, w.gru_weight_ih, w.gru_weight_hh, w.gru_bias_ih, w.gru_bias_hh)
        hidden = F.relu(
            F.linear(
                F.layer_norm(slots, (width,), w.norm_mlp_weight, w.norm_mlp_bias),
                w.mlp_in_weight,
                w.mlp_in_bias,
            )
        )
        slots = slots + F.linear(hidden, w.mlp_out_weight, w.mlp_out_bias)
    return slots
