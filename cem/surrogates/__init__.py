"""Conditional-entropy surrogates, one protocol."""

from cem.surrogates.attention import SlotCrossAttentionCEM
from cem.surrogates.base import NoSurrogate, Surrogate
from cem.surrogates.build import SURROGATES, build_surrogate
from cem.surrogates.mixture import GaussianMixtureCEM
from cem.surrogates.modules import CrossAttention, SlotAttention

__all__ = [
    "SURROGATES",
    "CrossAttention",
    "GaussianMixtureCEM",
    "NoSurrogate",
    "SlotAttention",
    "SlotCrossAttentionCEM",
    "Surrogate",
    "build_surrogate",
]
