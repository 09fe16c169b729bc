"""Split inference that is hard to invert: conditional-entropy surrogates, a split trainer, and honest attacks."""

from cem.surrogates import (
    CrossAttention,
    GaussianMixtureCEM,
    NoSurrogate,
    SlotAttention,
    SlotCrossAttentionCEM,
    Surrogate,
    build_surrogate,
)

__all__ = [
    "CrossAttention",
    "GaussianMixtureCEM",
    "NoSurrogate",
    "SlotAttention",
    "SlotCrossAttentionCEM",
    "Surrogate",
    "build_surrogate",
]
__version__ = "0.1.0"
