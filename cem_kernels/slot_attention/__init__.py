"""Slot attention: the tokens of every class summarized into that class's slots."""

from cem_kernels.slot_attention.api import slot_attention
from cem_kernels.slot_attention.weights import SlotAttentionWeights

__all__ = ["SlotAttentionWeights", "slot_attention"]
