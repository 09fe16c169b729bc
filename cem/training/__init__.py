"""The split trainer: steps, gradient injection, checkpoints, logging."""

from cem.errors import CheckpointError
from cem.training.config import TrainConfig

__all__ = ["CheckpointError", "TrainConfig", "Trainer", "load_run", "read_config", "read_summary", "train"]


def __getattr__(name: str) -> object:
    """Import what computes when it is asked for: a command that only shows its help needs none of it."""
    if name in ("Trainer", "train"):
        from cem.training import trainer

        return getattr(trainer, name)
    if name in ("load_run", "read_config", "read_summary"):
        from cem.training import runs

        return getattr(runs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
