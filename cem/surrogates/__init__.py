"""Conditional-entropy surrogates: what features tell of an image, as a differentiable number. A file each."""

from cem.surrogates.attention import SlotCrossAttentionCEM, conv_reduction, linear_reduction
from cem.surrogates.base import NoSurrogate, Surrogate
from cem.surrogates.centroid import CentroidCEM
from cem.surrogates.mixture import GaussianMixtureCEM
from cem.surrogates.slots import SlotCEM
from cem.surrogates.threshold import Ramp
from cem.terms import Family

SURROGATES: Family[type[Surrogate]] = Family("surrogate", Surrogate, aliases={"gmm": "mixture"})
"""The surrogates by the name that ``--surrogate`` takes."""
for _member in (NoSurrogate, GaussianMixtureCEM, SlotCrossAttentionCEM, CentroidCEM, SlotCEM):
    SURROGATES.register(_member)

RECOMMENDED = SlotCEM.name
CONTROL = NoSurrogate.name
COMPARED = (CONTROL, GaussianMixtureCEM.name, RECOMMENDED)

__all__ = [
    "COMPARED", "CONTROL", "RECOMMENDED", "SURROGATES", "CentroidCEM", "GaussianMixtureCEM", "NoSurrogate", "Ramp",
    "SlotCEM", "SlotCrossAttentionCEM", "Surrogate", "conv_reduction", "linear_reduction",
]  # fmt: skip
