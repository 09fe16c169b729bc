"""Gated cross attention for all classes at once, with absorbed projections, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels.cross_attention.weights import CrossAttentionWeights, absorb
from cem_kernels.groups import ClassGroups


def cross_attention(
    tokens: Tensor, slots: Tensor, groups: ClassGroups, weights: CrossAttentionWeights, num_heads: int, dropout: float
) -> Tensor:
    """``tokens [B, T, D]`` read ``slots [K, S, D]`` of their own class; returns ``[B, T, D]``."""
    w = weights
    y = gated_read(tokens, slots, groups, w, num_heads, dropout)
    hidden = F.layer_norm(y, y.shape[-1:], w.ln_ff_weight, w.ln_ff_bias)
    hidden = F.gelu(F.linear(hidden, w.ffn_in_weight, w.ffn_in_bias))
    return groups.kept(y + torch.tanh(w.alpha_ffn) * F.linear(hidden, w.ffn_out_weight, w.ffn_out_bias))


def gated_read(
    tokens: Tensor, slots: Tensor, groups: ClassGroups, weights: CrossAttentionWeights, num_heads: int, dropout: float
) -> Tensor:
    """``y [B, T, D]``: the operator without its feed-forward network."""
    w = weights
    tokens = groups.kept(tokens.to(slots.dtype))
    num_samples, num_tokens, width = tokens.shape
    num_classes, num_slots, _ = slots.shape
    keep = F.dropout(torch.ones_like(tokens), dropout) if dropout > 0 else None

    context = F.layer_norm(slots, (width,), w.ln_kv_weight, w.ln_kv_bias)
    inputs = F.layer_norm(tokens, (width,), w.ln_q_weight, w.ln_q_bias)
    # Absorbing costs two more D × D products a slot and saves two a token. Both counts are known on the host.
    absorbing = num_samples * num_tokens >= num_classes * num_slots
    read = read_absorbed if absorbing else read_materialized
    out = read(inputs, context, groups, w, num_heads) + w.proj_bias
    if keep is not None:
        out = out * keep
    return groups.kept(tokens + torch.tanh(w.alpha_xattn) * out)


def read_absorbed(
    inputs: Tensor, context: Tensor, groups: ClassGroups, w: CrossAttentionWeights, num_heads: int
) -> Tensor:
    """``W_p o`` of the normalized tokens ``[B, T, D]``, without queries and head outputs of the tokens."""
    queries, outputs = absorb(context, w, num_heads)  # [K, H·S, D] each
    padded = groups.pad(inputs).flatten(1, 2)  # [K, N, D], N = L·T
    logits = (queries @ padded.mT).unflatten(1, (num_heads, -1))  # [K, H, S, N]
    attention = torch.softmax(logits, dim=2).flatten(1, 2)
    return groups.unpad((attention.mT @ outputs).unflatten(1, (-1, inputs.shape[1])))


def read_materialized(
    inputs: Tensor, context: Tensor, groups: ClassGroups, w: CrossAttentionWeights, num_heads: int
) -> Tensor:
    """The same through queries of the tokens and keys of the slots, cheaper where slots outnumber tokens."""

    def heads(x: Tensor) -> Tensor:  # [K, N, D] to [K, H, N, d]
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    head_width = inputs.shape[-1] // num_heads
    queries = groups.pad(F.linear(inputs, w.to_q * head_width**-0.5)).flatten(1, 2)
    keys, values = F.linear(context, w.to_k), F.linear(context, w.to_v)
    attention = torch.softmax(heads(keys) @ heads(queries).mT, dim=2)  # [K, H, S, N]
    outputs = (attention.mT @ heads(values)).transpose(1, 2).flatten(2)  # [K, N, D]
    return F.linear(groups.unpad(outputs.unflatten(1, (-1, inputs.shape[1]))), w.proj_weight)
