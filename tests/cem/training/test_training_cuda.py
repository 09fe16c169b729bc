"""What is different about training on CUDA: where things lie, how they are timed, and which states are saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cem.training import TrainConfig, load_run, read_summary, train
from cem.training.checkpoint import random_state, restore_random_state
from cem.training.evaluation import isolated_random
from cem.training.stopwatch import Stopwatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("surrogate", ["centroid", "attention", "mixture"])
def test_run_on_cuda_names_its_device_and_times_its_surrogate(tmp_path: Path, surrogate: str) -> None:
    train(TrainConfig(surrogate=surrogate, train_size=200, epochs=2, device="cuda", out=tmp_path / "run"))
    summary = read_summary(tmp_path / "run")
    assert summary is not None
    assert summary["device"].startswith("cuda (")
    assert 0 < summary["surrogate_seconds"] < summary["train_seconds"]
    _, model = load_run(tmp_path / "run", device="cpu")
    assert next(model.parameters()).device.type == "cpu"


def test_stopwatch_measures_the_device_and_not_the_launch() -> None:
    watch, device = Stopwatch(torch.device("cuda")), torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    with watch:
        for _ in range(20):
            matrix = matrix @ matrix
    assert watch.read() > 0
    assert watch.read() == 0


def test_isolated_draws_leave_the_device_generator_as_it_was() -> None:
    device = torch.device("cuda")
    state = torch.cuda.get_rng_state(device)
    with isolated_random(3, device):
        first = torch.rand(4, device=device)
    with isolated_random(3, device):
        again = torch.rand(4, device=device)
    assert torch.equal(first, again)
    assert torch.equal(torch.cuda.get_rng_state(device), state)


def test_device_generator_is_saved_and_restored() -> None:
    device, loader = torch.device("cuda"), torch.Generator()
    state = random_state(loader, device)
    expected = torch.rand(4, device=device)
    restore_random_state(state, loader, device)
    assert torch.equal(torch.rand(4, device=device), expected)
