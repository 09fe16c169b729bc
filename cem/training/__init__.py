"""The split trainer: steps, gradient injection, checkpoints, logging."""

from cem.options import ConfigError
from cem.training.checkpoint import CheckpointError
from cem.training.config import TrainConfig
from cem.training.runs import load_run, read_summary
from cem.training.trainer import Trainer, TrainingDiverged, train

__all__ = [
    "CheckpointError",
    "ConfigError",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "load_run",
    "read_summary",
    "train",
]
