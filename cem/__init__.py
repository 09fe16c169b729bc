"""Split inference that is hard to invert: conditional-entropy surrogates, defenses, a split trainer, honest attacks."""

from cem.defenses import DEFENSES, Defense, GaussianNoise
from cem.errors import CemError
from cem.surrogates import (
    SURROGATES,
    CentroidCEM,
    GaussianMixtureCEM,
    Ramp,
    SlotCEM,
    SlotCrossAttentionCEM,
    Surrogate,
    conv_reduction,
    linear_reduction,
)
from cem.terms import Batch, Context, Measured, Term

__all__ = [
    "DEFENSES", "SURROGATES", "Batch", "CemError", "CentroidCEM", "Context", "Defense", "GaussianMixtureCEM",
    "GaussianNoise", "Measured", "Ramp", "SlotCEM", "SlotCrossAttentionCEM", "Surrogate", "Term",
    "conv_reduction", "linear_reduction",
]  # fmt: skip
__version__ = "0.2.0.dev0"
