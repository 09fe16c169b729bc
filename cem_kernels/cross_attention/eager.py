"""Gated cross attention for all classes at once, with absorbed projections, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels.cross_attention.weights import CrossAttentionWeights, absorb
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
    w = weights
    _, num_tokens, width = tokens.shape
    num_slots = slots.shape[1]
    keep = F.dropout(torch.ones_like(tokens), dropout) if dropout > 0 else None

    context = F.layer_norm(slots, (width,), w.ln_kv_weight, w.ln_kv_bias)
    queries, outputs = absorb(context, w, num_heads)  # [K, H·S, D] each
    inputs = F.layer_norm(tokens, (width,), w.ln_q_weight, w.ln_q_bias)
    inputs = groups.pad(inputs).flatten(1, 2)  # [K, L·T, D]
    logits = (inputs @ queries.mT).unflatten(-1, (num_heads, num_slots))
    read = torch.softmax(logits, dim=-1).flatten(-2) @ outputs  # [K, L·T, D]
    out = groups.unpad(read.unflatten(1, (-1, num_tokens))) + w.proj_bias
    if keep is not None:
        out = out * keep
    y = tokens + torch.tanh(w.alpha_xattn) * out

    hidden = F.layer_norm(y, (width,), w.ln_ff_weight, w.ln_ff_bias)
    hidden = F.gelu(F.linear(hidden, w.ffn_in_weight, w.ffn_in_bias))
    return y + torch.tanh(w.alpha_ffn) * F.linear(hidden, w.ffn_out_weight, w.ffn_out_bias)
