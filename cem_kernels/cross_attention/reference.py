"""Gated cross attention, one class at a time: the definition that the other backends are held to.

Alayrac et al. 2022, "Flamingo", gated cross attention and dense layers (GATED XATTN-DENSE).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels.cross_attention.weights import CrossAttentionWeights
from cem_kernels.groups import ClassGroups


def cross_attention(
    tokens: Tensor,
    slots: Tensor,
    groups: ClassGroups,
    weights: CrossAttentionWeights,
    num_heads: int,
    dropout: float,
) -> Tensor:
    """``tokens [B, T, D]`` read ``slots [K, S, D]`` of their own class; returns ``[B, T, D]``."""
    tokens = tokens.to(slots.dtype)
    keep = F.dropout(torch.ones_like(tokens), dropout)
    bounds = groups.offsets.tolist()
    # Samples of no class come last; an empty slice's sum is zero, and belongs to the graph.
    rows = [groups.order[bounds[-1] :]]
    results = [torch.zeros_like(tokens[rows[0]]) + tokens[:0].sum()]
    for c in range(groups.num_classes):
        members = groups.order[bounds[c] : bounds[c + 1]]
        if len(members) > 0:
            flat = one_class(tokens[members].flatten(0, 1), slots[c], keep[members].flatten(0, 1), weights, num_heads)
            rows.append(members)
            results.append(flat.unflatten(0, (len(members), -1)))
    batch_order = torch.argsort(torch.cat(rows))
    return torch.cat(results)[batch_order]


def one_class(tokens: Tensor, slots: Tensor, keep: Tensor, w: CrossAttentionWeights, num_heads: int) -> Tensor:
    """``tokens [N, D]`` of one class, its ``slots [S, D]``, the dropout factors ``keep [N, D]``."""
    width = tokens.shape[-1]
    context = F.layer_norm(slots, (width,), w.ln_kv_weight, w.ln_kv_bias)

    def heads(x: Tensor) -> Tensor:  # [N, D] to [H, N, d]
        return x.unflatten(-1, (num_heads, -1)).transpose(0, 1)

    q = heads(F.linear(F.layer_norm(tokens, (width,), w.ln_q_weight, w.ln_q_bias), w.to_q))
    k = heads(F.linear(context, w.to_k))
    v = heads(F.linear(context, w.to_v))
    attention = torch.softmax(q @ k.mT * (width // num_heads) ** -0.5, dim=-1)
    out = F.linear((attention @ v).transpose(0, 1).flatten(1), w.proj_weight, w.proj_bias) * keep
    y = tokens + torch.tanh(w.alpha_xattn) * out
    hidden = F.gelu(F.linear(F.layer_norm(y, (width,), w.ln_ff_weight, w.ln_ff_bias), w.ffn_in_weight, w.ffn_in_bias))
    return y + torch.tanh(w.alpha_ffn) * F.linear(hidden, w.ffn_out_weight, w.ffn_out_bias)
