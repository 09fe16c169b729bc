"""What is done to features, besides the entropy penalty, before they leave the client."""

from cem.defenses.noise import GaussianNoise

__all__ = ["GaussianNoise"]
