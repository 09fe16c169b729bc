"""Runs that take a second or two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cem.training import TrainConfig
from cem.training import trainer as trainer_module

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures have tests of their own, and t-SNE takes longer than training here."""
    monkeypatch.setattr(trainer_module, "draw_tsne", lambda *_, **__: None)
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_, **__: None)


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Options of a run of three steps an epoch, in the directory of that name."""

    def make(name: str = "run", **options: Any) -> TrainConfig:
        small = TrainConfig(train_size=96, batch_size=32, epochs=4, penalty_from=1, noise_std=0.1, device="cpu")
        return replace(small, out=tmp_path / name, **options)

    return make
