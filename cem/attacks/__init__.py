"""Model inversion: decoders and pixels against features, metrics, controls, and an information bound."""

from cem.attacks.config import AttackConfig
from cem.attacks.decoders import build_decoder
from cem.attacks.fit import AttackDiverged
from cem.attacks.run import Attack
from cem.attacks.splits import AttackSplits, attack_splits

__all__ = ["Attack", "AttackConfig", "AttackDiverged", "AttackSplits", "attack_splits", "build_decoder"]
