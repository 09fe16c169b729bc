"""The strongest ways to do the whole surrogate's work without this library, for comparison in the same run.

Both take the parameters of a :class:`cem.SlotCrossAttentionCEM` (no reduction, no dropout, ReLU hinge, a threshold that
stays, classes of two samples or more), and compute the same losses, so that each is checked against it before it is
timed. All but the statistics of classes, which are fp32, is computed in the features' dtype, to which parameters are
cast.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from cem import SlotCrossAttentionCEM
from cem_kernels import CrossAttentionWeights, SlotAttentionWeights
from cem_kernels.slot_attention.reference import one_class as slots_of_class


class Peer(nn.Module):
    """What both peers share: tokens, first slots and weights, in the features' dtype."""

    def __init__(self, surrogate: SlotCrossAttentionCEM) -> None:
        super().__init__()
        assert isinstance(surrogate.threshold, float)
        self.surrogate, self.threshold = surrogate, surrogate.threshold

    def tokens(self, features: Tensor) -> Tensor:
        """``[B, D]`` or ``[B, D, H, W]`` to ``[B, T, D]``, normalized."""
        tokens = features[:, None] if features.dim() == 2 else features.flatten(2).mT.contiguous()
        return F.layer_norm(tokens, tokens.shape[2:])

    def slots(self, slot_noise: Tensor, dtype: torch.dtype) -> Tensor:
        return self.surrogate.slot_attention.initial_slots(len(slot_noise), slot_noise).to(dtype)

    def weights(self, dtype: torch.dtype) -> tuple[SlotAttentionWeights, CrossAttentionWeights]:
        slot, cross = self.surrogate.slot_attention.weights(), self.surrogate.cross_attention.weights()
        return SlotAttentionWeights(*(w.to(dtype) for w in slot)), CrossAttentionWeights(*(w.to(dtype) for w in cross))


class PerClassLoop(Peer):
    """One Python loop over classes with boolean masks and keys and values materialized, as first published."""

    def forward(self, features: Tensor, labels: Tensor, slot_noise: Tensor) -> tuple[Tensor, Tensor]:
        """``features [B, D]`` or ``[B, D, H, W]``, ``labels [B]``, ``slot_noise [K, S, D]`` to the two losses."""
        m = self.surrogate
        initial = self.slots(slot_noise, features.dtype)
        slot_weights, cross_weights = self.weights(features.dtype)
        total_penalty = total_mse = total_weight = torch.zeros((), device=features.device)
        log_threshold = math.log(self.threshold + m.penalty.gamma)
        for label in torch.unique(labels):
            mask = labels == label
            x = features[mask]
            if x.shape[0] < m.min_samples:
                continue
            x = self.tokens(x)
            a = m.slot_attention
            slots = slots_of_class(x.flatten(0, 1), initial[label], slot_weights, a.num_iterations, a.eps)
            y = peers.read_of_class(x, slots, cross_weights, m.cross_attention.num_heads)
            enhanced = peers.feed_forward(y, cross_weights).flatten(1).float()
            mean = enhanced.mean(dim=0)
            variance = torch.clamp(enhanced.var(dim=0, unbiased=True), min=m.penalty.floor)
            penalty = F.relu(torch.log(variance + m.penalty.gamma) - log_threshold).mean()
            weight = x.shape[0] / features.shape[0]
            total_penalty = total_penalty + weight * penalty
            total_mse = total_mse + weight * F.mse_loss(enhanced, mean.expand_as(enhanced))
            total_weight = total_weight + weight
        return total_penalty / total_weight, total_mse / total_weight


class PaddedBatch(Peer):
    """All classes at once the usual way: padded to ``max_class_size`` and masked, keys and values materialized.

    Only what needs classes side by side is padded, three times for that reason: keys and values, queries, and what
    variances are taken of. The feed-forward network and every normalization see no padding.
    """

    def __init__(self, surrogate: SlotCrossAttentionCEM, max_class_size: int) -> None:
        super().__init__(surrogate)
        self.max_class_size = max_class_size

    def forward(self, features: Tensor, labels: Tensor, slot_noise: Tensor) -> tuple[Tensor, Tensor]:
        """``features [B, D]`` or ``[B, D, H, W]``, ``labels [B]``, ``slot_noise [K, S, D]`` to the two losses."""
        m = self.surrogate
        a, num_heads = m.slot_attention, m.cross_attention.num_heads
        classes = peers.Classes.of(labels, len(slot_noise), self.max_class_size)
        slot_weights, cross_weights = self.weights(features.dtype)
        tokens, initial = self.tokens(features), self.slots(slot_noise, features.dtype)
        slots = peers.padded_slots(tokens, initial, slot_weights, a.num_iterations, a.eps, classes)
        y = peers.padded_read(tokens, slots, cross_weights, num_heads, classes)
        _, squares = peers.padded_moments(peers.feed_forward(y, cross_weights).flatten(1), classes)
        return peers.variance_losses(squares, classes, m.penalty)
