"""Checkpoint files: whole or not at all, and only ours."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cem.errors import CheckpointError
from cem.training.checkpoint import (
    FORMAT,
    load,
    load_state,
    random_state,
    restore_random_state,
    save,
    seed_everything,
)

CPU = torch.device("cpu")


def test_load_gives_back_what_was_saved(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", {"weights": torch.arange(3.0), "history": [{"epoch": 1}], "best": (0.5, 0.9)})
    content = load(tmp_path / "a.pt")
    assert torch.equal(content["weights"], torch.arange(3.0))
    assert (content["history"], content["best"]) == ([{"epoch": 1}], (0.5, 0.9))


@pytest.mark.parametrize("step", ["save", "fsync", "replace"])
def test_failure_while_saving_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    save(tmp_path / "a.pt", {"epoch": 1})

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch if step == "save" else os, step, fail)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.pt", {"epoch": 2})
    monkeypatch.undo()
    assert load(tmp_path / "a.pt")["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*last\.pt"):
        load(tmp_path / "last.pt")


@pytest.mark.parametrize("kept", [0, 10, 500, -1])
def test_truncated_checkpoint_is_refused(tmp_path: Path, kept: int) -> None:
    save(tmp_path / "a.pt", {"weights": torch.randn(1000)})
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*a\.pt"):
        load(tmp_path / "a.pt")


def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("weights, honestly")
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"format": "cem-checkpoint-1"}, [1, 2], torch.ones(2)])
def test_checkpoint_of_another_program_or_version_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of cem\.train"):
        load(tmp_path / "a.pt")


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


def test_checkpoint_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": FORMAT, "x": _Payload()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        load(tmp_path / "a.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [{}, {"encoder": nn.Linear(2, 3).state_dict()}])
def test_state_of_another_network_is_refused_with_file_and_part(content: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"a\.pt does not fit this run's encoder"):
        load_state(nn.Linear(2, 2), content, "encoder", Path("a.pt"))


def test_random_states_survive_the_file(tmp_path: Path) -> None:
    loader = torch.Generator().manual_seed(5)
    seed_everything(4)
    np.random.normal()  # noqa: NPY002 - leaves half of a pair cached, which is part of the state

    def draw() -> list[float]:
        return [
            random.random(),
            np.random.normal(),  # noqa: NPY002
            np.random.rand(),  # noqa: NPY002
            torch.rand(()).item(),
            torch.rand((), generator=loader).item(),
        ]

    save(tmp_path / "a.pt", {"random": random_state(loader, CPU)})
    expected = draw()
    assert draw() != expected
    restore_random_state(load(tmp_path / "a.pt")["random"], loader, CPU)
    assert draw() == expected


def test_seed_everything_seeds_every_global_generator() -> None:
    seed_everything(6)
    first = (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002
    seed_everything(6)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == first  # noqa: NPY002
