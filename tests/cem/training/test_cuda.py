"""What is different on CUDA: what a graph draws and waits for, where things lie, how they are timed, what is saved."""

import gzip
import json
from dataclasses import replace

import pytest
import torch
from small_runs import attention, cuda, fitted, rows
from small_terms import GAIN
from test_capture import batch, captured_of, slots

import cem
from cem.errors import UsageError
from cem.training import load_run, train
from cem.training.checkpoint import random_state, restore_random_state
from cem.training.evaluation import isolated_random

pytestmark = cuda
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_replay_draws_its_own_random_numbers(dropout):
    captured = captured_of(slots(dropout=dropout).to(CUDA), CUDA)
    losses = [captured(batch(CUDA)).loss.clone() for _ in range(4)]
    assert len(set(torch.stack(losses).tolist())) == 4


def test_replay_never_waits_for_the_device():
    captured, given = captured_of(slots().to(CUDA), CUDA), batch(CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Reads(cem.Term):
    """Says that it never waits, and does."""

    def measure(self, batch):
        return cem.Measured(batch.features.mean() * batch.features.abs().max().item(), {})


def test_term_that_waits_for_the_device_is_refused_and_the_device_goes_on():
    with pytest.raises(UsageError, match="--capture: a term waits for the device"):
        captured_of(Reads(), CUDA)
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.ones(3, device=CUDA).sum().item() == 3


@pytest.mark.parametrize(
    "options",
    [{}, attention(), attention(trained="shared"), attention(trained=1e-4)],
    ids=["centroid", "", "SGD", "Adam"],
)
def test_captured_run_follows_the_run_without(make, options):
    config = make(epochs=1, device="cuda", defenses=(GAIN,), lambd=0.5, **options)
    ours, theirs = (rows(train(replace(config, capture=each, out=make(str(each)).out)))[0] for each in (True, False))
    for column in ("cross_entropy", "rob_loss", "intra_mse", "gain.loss"):
        assert ours[column] == pytest.approx(theirs[column], rel=1e-2)


def test_traced_step_of_a_captured_run_launches_one_graph(make):
    run_dir = train(make(epochs=2, device="cuda", capture=True, profile_steps=1))
    with gzip.open(run_dir / "trace.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "cuda_runtime"]
    assert sum(name.endswith("GraphLaunch") for name in names) == 1


@pytest.mark.parametrize("surrogate", ["centroid", "slots", "attention", "mixture"])
def test_run_on_cuda_names_its_device_and_times_its_surrogate(make, surrogate):
    trainer = fitted(make(surrogate=surrogate, arch="resnet20", cut_layer=4, epochs=2, device="cuda"))
    assert trainer.finished["device"].startswith("cuda (")
    assert 0 < trainer.finished["surrogate_seconds"] < trainer.finished["train_seconds"]
    _, model = load_run(trainer.run_dir, device="cpu")
    assert next(model.parameters()).device.type == "cpu"


def test_isolated_draws_leave_the_device_generator_as_it_was():
    state, draws = torch.cuda.get_rng_state(CUDA), []
    for _ in range(2):
        with isolated_random(3, CUDA):
            draws.append(torch.rand(4, device=CUDA))
    assert torch.equal(*draws)
    assert torch.equal(torch.cuda.get_rng_state(CUDA), state)


def test_device_generator_is_saved_and_restored():
    loader = torch.Generator()
    state = random_state(loader, CUDA)
    expected = torch.rand(4, device=CUDA)
    restore_random_state(state, loader, CUDA)
    assert torch.equal(torch.rand(4, device=CUDA), expected)
