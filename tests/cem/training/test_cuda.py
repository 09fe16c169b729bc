"""What is different on CUDA: what a graph draws and waits for, where things lie, how they are timed, what is saved."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import attention, cuda
from small_terms import GAIN
from test_capture import batch, captured_of, slots

import cem
from cem.errors import UsageError
from cem.training import TrainConfig, load_run, read_summary, train
from cem.training.checkpoint import random_state, restore_random_state
from cem.training.evaluation import isolated_random
from cem.training.stopwatch import Stopwatch
from cem.training.weighted import gradients_of

pytestmark = cuda
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_replay_draws_its_own_random_numbers(dropout: float) -> None:
    captured = captured_of(slots(dropout=dropout).to(CUDA), CUDA)
    losses = [captured(batch(CUDA)).loss.clone() for _ in range(4)]
    assert len(set(torch.stack(losses).tolist())) == 4


def test_replay_draws_what_the_ordinary_way_would_and_leaves_the_generator_there() -> None:
    captured, plain = captured_of(slots(dropout=0.5).to(CUDA), CUDA), slots(dropout=0.5).to(CUDA)
    after, given = [], batch(CUDA)
    for way in (captured, lambda given: gradients_of(plain, given)):
        torch.manual_seed(7)
        way(given)
        after.append(torch.rand(4, device=CUDA))
    assert torch.equal(*after)


def test_replay_never_waits_for_the_device() -> None:
    captured, given = captured_of(slots().to(CUDA), CUDA), batch(CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Reads(cem.Term):
    """Says that it never waits, and does."""

    def measure(self, batch: cem.Batch) -> cem.Measured:
        return cem.Measured(batch.features.mean() * batch.features.abs().max().item(), {})


def test_term_that_waits_for_the_device_is_refused_and_the_device_goes_on() -> None:
    with pytest.raises(UsageError, match="--capture: a term waits for the device"):
        captured_of(Reads(), CUDA)
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.ones(3, device=CUDA).sum().item() == 3


@pytest.fixture
def small_run(tmp_path: Path) -> TrainConfig:
    """Two full batches and a smaller one."""
    return TrainConfig(train_size=90, batch_size=32, epochs=1, penalty_from=1, device="cuda", out=tmp_path / "plain")


@pytest.mark.parametrize("trained", [None, "frozen", "shared", 1e-4])
def test_captured_run_follows_the_run_without(tmp_path: Path, small_run: TrainConfig, trained: Any) -> None:
    own = {} if trained is None else {"lambd": 0.5, **attention(trained=trained)}
    plain = replace(small_run, defenses=(GAIN,), **own)
    rows = []
    for config in (replace(plain, capture=True, out=tmp_path / "captured"), plain):
        with open(train(config) / "metrics.csv", newline="") as file:
            rows.append(next(csv.DictReader(file)))
    for column in ("cross_entropy", "rob_loss", "intra_mse", "gain.loss"):
        assert float(rows[0][column]) == pytest.approx(float(rows[1][column]), rel=1e-2)


def test_traced_step_of_a_captured_run_launches_one_graph(small_run: TrainConfig) -> None:
    run_dir = train(replace(small_run, epochs=2, capture=True, profile_steps=1))
    with gzip.open(run_dir / "trace.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "cuda_runtime"]
    assert sum(name.endswith("GraphLaunch") for name in names) == 1


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
    watch, matrix = Stopwatch(CUDA), torch.randn(4096, 4096, device=CUDA)
    with watch:
        for _ in range(20):
            matrix = matrix @ matrix
    assert watch.read() > 0
    assert watch.read() == 0


def test_isolated_draws_leave_the_device_generator_as_it_was() -> None:
    state, draws = torch.cuda.get_rng_state(CUDA), []
    for _ in range(2):
        with isolated_random(3, CUDA):
            draws.append(torch.rand(4, device=CUDA))
    assert torch.equal(*draws)
    assert torch.equal(torch.cuda.get_rng_state(CUDA), state)


def test_device_generator_is_saved_and_restored() -> None:
    loader = torch.Generator()
    state = random_state(loader, CUDA)
    expected = torch.rand(4, device=CUDA)
    restore_random_state(state, loader, CUDA)
    assert torch.equal(torch.rand(4, device=CUDA), expected)
