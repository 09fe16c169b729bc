"""What is done besides the surrogate so that features tell less. A file each."""

from cem.defenses.base import Chain, Defense
from cem.defenses.inversion import AttentionInversion
from cem.defenses.noise import GaussianNoise
from cem.terms import Family

DEFENSES: Family[type[Defense]] = Family("defenses", Defense)
"""The defenses by the names that ``--defenses`` takes."""
for _member in (GaussianNoise, AttentionInversion):
    DEFENSES.register(_member)

NOISE = GaussianNoise.name

__all__ = ["DEFENSES", "NOISE", "AttentionInversion", "Chain", "Defense", "GaussianNoise"]
