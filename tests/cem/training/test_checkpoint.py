"""Checkpoint files: whole or not at all, and only ours."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cem.errors import CheckpointError
from cem.training import checkpoint
from cem.training.checkpoint import FORMAT, load, load_state, save, seed_everything


@pytest.mark.parametrize(("module", "step"), [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_failure_while_saving_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, module, step):
    save(tmp_path / "a.pt", {"epoch": 1})

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.pt", {"epoch": 2})
    assert load(tmp_path / "a.pt")["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def truncated(path, kept):
    save(path, {"weights": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:kept])


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


WRONG = {
    "missing": (lambda path: None, "there is no checkpoint .*a.pt"),
    "empty": (lambda path: truncated(path, 0), "cannot read checkpoint .*a.pt"),
    "all but a byte": (lambda path: truncated(path, -1), "cannot read checkpoint .*a.pt"),
    "text": (lambda path: path.write_text("weights, honestly"), "cannot read checkpoint .*a.pt"),
    "code": (lambda path: torch.save({"format": FORMAT, "x": Payload()}, path), "cannot read checkpoint .*a.pt"),
    "another program's": (lambda path: torch.save({"state_dict": {}}, path), r"a.pt is not a checkpoint of cem\.train"),
    "another version's": (lambda path: torch.save({"format": "cem-checkpoint-1"}, path), "is not a checkpoint of cem"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "is not a checkpoint of cem"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_whole_checkpoint_of_ours_is_refused_and_runs_no_code(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "a.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [{}, {"encoder": nn.Linear(2, 3).state_dict()}])
def test_state_of_another_network_is_refused_with_file_and_part(content):
    with pytest.raises(CheckpointError, match=r"a\.pt does not fit this run's encoder"):
        load_state(nn.Linear(2, 2), content, "encoder", Path("a.pt"))


def draw(loader=None):
    """From every generator that a run draws from."""
    ours = [random.random(), np.random.normal(), np.random.rand()]  # noqa: NPY002
    return [*ours, torch.rand(()).item(), torch.rand((), generator=loader).item()]


def test_random_states_survive_the_file(tmp_path):
    loader, cpu = torch.Generator().manual_seed(5), torch.device("cpu")
    seed_everything(4)
    np.random.normal()  # noqa: NPY002 - leaves half of a pair cached, which is part of the state
    save(tmp_path / "a.pt", {"random": checkpoint.random_state(loader, cpu)})
    expected = draw(loader)
    assert draw(loader) != expected
    checkpoint.restore_random_state(load(tmp_path / "a.pt")["random"], loader, cpu)
    assert draw(loader) == expected


def test_seed_everything_seeds_every_global_generator():
    seed_everything(6)
    first = draw()
    seed_everything(6)
    assert draw() == first
