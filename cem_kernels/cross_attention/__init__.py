"""Gated cross attention: every token reads its class's slots."""

from cem_kernels.cross_attention.api import cross_attention
from cem_kernels.cross_attention.weights import CrossAttentionWeights

__all__ = ["CrossAttentionWeights", "cross_attention"]
