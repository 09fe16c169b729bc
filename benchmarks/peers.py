"""The strongest ways to do the surrogate's work without this library, for comparison in the same run.

Both take the parameters of a :class:`cem.SlotCrossAttentionCEM` (``features [B, D]``, no reduction, no dropout) and
compute the same losses, so that each is checked against it before it is timed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cem import SlotCrossAttentionCEM


class PerClassLoop(nn.Module):
    """One Python loop over classes with boolean masks and keys and values materialised, as first published."""

    def __init__(self, surrogate: SlotCrossAttentionCEM) -> None:
        super().__init__()
        self.surrogate = surrogate

    def slots_of(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """``tokens [1, M, D]`` of one class and its draw ``[1, S, D]`` to slots ``[1, S, D]``."""
        m = self.surrogate.slot_attention
        width = tokens.shape[-1]
        inputs = m.norm_inputs(tokens)
        k, v = m.to_k(inputs), m.to_v(inputs)
        slots = m.slot_mu + m.slot_log_sigma.exp() * noise
        for _ in range(m.num_iterations):
            previous = slots
            q = m.to_q(m.norm_slots(slots)) * width**-0.5
            logits = torch.einsum("bnd,bsd->bns", k, q) / width**0.25
            attention = torch.softmax(logits, dim=-1) + m.eps
            attention = attention / attention.sum(dim=1, keepdim=True)
            updates = torch.einsum("bns,bnd->bsd", attention, v)
            slots = m.gru(updates.reshape(-1, width), previous.reshape(-1, width)).reshape(previous.shape)
            slots = slots + m.mlp(m.norm_mlp(slots))
        return slots

    def enhance(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """``tokens [M, D]`` of one class after reading its slots ``[1, S, D]``."""
        m = self.surrogate.cross_attention
        head_width = m.feature_dim // m.num_heads
        context = m.ln_kv(slots[0])

        def heads(x: Tensor) -> Tensor:
            return x.view(-1, m.num_heads, head_width).transpose(0, 1)

        q, k, v = heads(m.to_q(m.ln_q(tokens))), heads(m.to_k(context)), heads(m.to_v(context))
        attention = torch.softmax(q @ k.mT * head_width**-0.5, dim=-1)
        out = m.proj((attention @ v).transpose(0, 1).reshape(tokens.shape))
        y = tokens + torch.tanh(m.alpha_xattn) * out
        return y + torch.tanh(m.alpha_ffn) * m.ffn(m.ln_ff(y))

    def forward(self, features: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``features [B, D]``, ``labels [B]``, ``noise [K, S, D]`` to the two losses."""
        m = self.surrogate
        total_penalty = total_mse = total_weight = torch.zeros((), device=features.device)
        log_threshold = torch.log(torch.tensor(m.threshold + m.gamma, device=features.device))
        for label in torch.unique(labels):
            mask = labels == label
            x = features[mask]
            if x.shape[0] < m.min_samples:
                continue
            x = F.layer_norm(x, x.shape[1:])
            slots = self.slots_of(x[None], noise[label][None])
            enhanced = self.enhance(x, slots)
            mean = enhanced.mean(dim=0)
            variance = torch.clamp(enhanced.var(dim=0, unbiased=True), min=m.eps_var)
            penalty = F.relu(torch.log(variance + m.gamma) - log_threshold).mean()
            weight = x.shape[0] / features.shape[0]
            total_penalty = total_penalty + weight * penalty
            total_mse = total_mse + weight * F.mse_loss(enhanced, mean.expand_as(enhanced))
            total_weight = total_weight + weight
        return total_penalty / total_weight, total_mse / total_weight


class PaddedBatch(nn.Module):
    """All classes at once the usual way: padded to ``max_class_size``, masked, keys and values materialised."""

    def __init__(self, surrogate: SlotCrossAttentionCEM, max_class_size: int) -> None:
        super().__init__()
        self.surrogate = surrogate
        self.max_class_size = max_class_size

    def slots_of(self, tokens: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """``tokens [K, L, D]``, ``mask [K, L, 1]``, ``noise [K, S, D]`` to slots ``[K, S, D]``."""
        m = self.surrogate.slot_attention
        width = tokens.shape[-1]
        inputs = m.norm_inputs(tokens)
        k, v = m.to_k(inputs), m.to_v(inputs)
        slots = m.slot_mu + m.slot_log_sigma.exp() * noise
        for _ in range(m.num_iterations):
            q = m.to_q(m.norm_slots(slots)) * width**-0.75
            attention = (torch.softmax(k @ q.mT, dim=-1) + m.eps) * mask
            attention = attention / attention.sum(dim=1, keepdim=True).clamp(min=m.eps)
            updates = attention.mT @ v
            slots = m.gru(updates.reshape(-1, width), slots.reshape(-1, width)).reshape(slots.shape)
            slots = slots + m.mlp(m.norm_mlp(slots))
        return slots

    def enhance(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """``tokens [K, L, D]`` after reading ``slots [K, S, D]``."""
        m = self.surrogate.cross_attention
        context = m.ln_kv(slots)

        def heads(x: Tensor) -> Tensor:  # [K, L, D] to [K, H, L, d]
            return x.unflatten(-1, (m.num_heads, -1)).transpose(1, 2)

        q, k, v = heads(m.to_q(m.ln_q(tokens))), heads(m.to_k(context)), heads(m.to_v(context))
        out = m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        y = tokens + torch.tanh(m.alpha_xattn) * out
        return y + torch.tanh(m.alpha_ffn) * m.ffn(m.ln_ff(y))

    def forward(self, features: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``features [B, D]``, ``labels [B]``, ``noise [K, S, D]`` to the two losses."""
        m = self.surrogate
        num_classes, size = noise.shape[0], self.max_class_size
        member = F.one_hot(labels, num_classes)
        counts = member.sum(dim=0)
        row = labels * size + (member.cumsum(dim=0) * member).sum(dim=1) - 1
        tokens = features.new_zeros(num_classes * size, features.shape[1]).index_copy(
            0, row, F.layer_norm(features, features.shape[1:])
        )
        tokens = tokens.unflatten(0, (num_classes, size))
        mask = (torch.arange(size, device=labels.device) < counts[:, None])[:, :, None].to(features.dtype)
        enhanced = self.enhance(tokens, self.slots_of(tokens, mask, noise))
        count = counts.to(features.dtype)[:, None]
        mean = (enhanced * mask).sum(dim=1) / count.clamp(min=1)
        squares = ((enhanced - mean[:, None]).square() * mask).sum(dim=1)
        variance = (squares / (count - 1).clamp(min=1)).clamp(min=m.eps_var)
        penalty = F.relu(torch.log(variance + m.gamma) - math.log(m.threshold + m.gamma)).mean(dim=1)
        weight = torch.where(counts >= m.min_samples, counts, 0).to(features.dtype)
        weight = weight / weight.sum().clamp(min=1)
        return (weight * penalty).sum(), (weight * (squares / count.clamp(min=1)).mean(dim=1)).sum()
