"""Checkpoint files: written atomically, read without running code, complete down to the random states."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cem.errors import CheckpointError
from cem.files import replacing

FORMAT = "cem-checkpoint-2"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors and plain Python values) to ``path``, or leave what was there."""
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote, with all tensors on the CPU.

    Only tensors and plain values are accepted (``weights_only=True``), so a checkpoint from elsewhere cannot
    run code.

    Raises:
        CheckpointError: if there is no such file, it cannot be read, or it is something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"cannot read checkpoint {path}: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of cem.train (format {FORMAT!r})")
    return content


def load_state(module: torch.nn.Module, content: dict[str, Any], part: str, path: Path) -> None:
    """Load ``content[part]`` into ``module``.

    Raises:
        CheckpointError: if the checkpoint has no such part, or its names or shapes are those of another
            network.
    """
    try:
        module.load_state_dict(content[part])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this run's {part}; it belongs to another model. {error}") from error


def random_state(loader: torch.Generator, device: torch.device) -> dict[str, Any]:
    """Every random state that a run draws from, as tensors and plain values."""
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the state libraries draw from
    return {
        "python": random.getstate(),
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "rest": (int(position), int(has_gauss), float(cached)),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "loader": loader.get_state(),
    }


def restore_random_state(state: dict[str, Any], loader: torch.Generator, device: torch.device) -> None:
    """Inverse of :func:`random_state`. A CUDA state is left alone by a run that continues on the CPU."""
    random.setstate(state["python"])
    keys = state["numpy"]["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *state["numpy"]["rest"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    loader.set_state(state["loader"])


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, on all devices."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
