"""Terms in a real CUDA graph: the gradients of the ordinary way, fresh draws, and no waiting."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import GAIN
from torch import Tensor

import cem
from cem.errors import UsageError
from cem.training import TrainConfig, train
from cem.training.capture import CapturedTerm
from cem.training.weighted import Answer, gradients_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

B, D, K = 32, 16, 4
CUDA = torch.device("cuda")

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "own": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-3),  # no steps from rounding errors
    "shared": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def attention(**options: Any) -> cem.SlotCrossAttentionCEM:
    """Under a static bound nothing waits, also where there are no kernels."""
    torch.manual_seed(0)
    bounded = {"max_class_size": B, "backend": "auto"} | options
    return cem.SlotCrossAttentionCEM(D, num_classes=K, reg_strength=0.3, **bounded).to(CUDA)


def captured_of(term: cem.Term) -> CapturedTerm:
    return CapturedTerm(term, (B, D), (B, 1, 2, 2), CUDA)


def batch(size: int = B, seed: int = 1) -> cem.Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (size,), generator=generator).to(CUDA)
    features = torch.randn(size, D, generator=generator).to(CUDA)
    return cem.Batch(torch.rand(size, 1, 2, 2, device=CUDA), labels, features, 2 * features)


def tensors(answer: Answer) -> list[Tensor]:
    found = [answer.loss, *answer.monitors.values(), answer.finite, answer.features_grad, answer.sent_grad]
    return [each for each in (*found, *answer.own_grads) if each is not None]


def assert_same(found: Answer, wanted: Answer) -> None:
    for ours, theirs in zip(tensors(found), tensors(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("trained", ["frozen", "own", "shared"])
def test_replays_give_the_ordinary_gradients_while_the_term_learns(trained: str) -> None:
    ours, plain = (attention(dropout=0.1).requires_grad_(trained != "frozen") for _ in range(2))
    captured = captured_of(ours)
    optimizers = [OPTIMIZERS[trained](list(each.parameters())) for each in (ours, plain) if trained != "frozen"]
    before = [parameter.clone() for parameter in ours.parameters()]
    for step in range(3):
        answers = []
        for way in (captured, lambda given: gradients_of(plain, given)):
            torch.manual_seed(step)  # the same draws, too
            answers.append(way(batch(seed=step)))
        assert_same(*answers)
        for optimizer, each, answer in zip(optimizers, (ours, plain), answers, strict=False):
            for parameter, grad in zip(each.parameters(), answer.own_grads, strict=True):
                assert grad is not None
                parameter.grad = grad.clone()
            optimizer.step()
    changed = [not torch.equal(*pair) for pair in zip(before, ours.parameters(), strict=True)]
    assert any(changed) is (trained != "frozen")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_replay_draws_its_own_random_numbers(dropout: float) -> None:
    captured = captured_of(attention(dropout=dropout))
    losses = [captured(batch()).loss.clone() for _ in range(4)]
    assert len(set(torch.stack(losses).tolist())) == 4


def test_replay_draws_what_the_ordinary_way_would_and_leaves_the_generator_there() -> None:
    captured, plain = captured_of(attention(dropout=0.5)), attention(dropout=0.5)
    after, given = [], batch()
    for way in (captured, lambda given: gradients_of(plain, given)):
        torch.manual_seed(7)
        way(given)
        after.append(torch.rand(4, device=CUDA))
    assert torch.equal(*after)


def test_smaller_batch_between_replays_takes_the_ordinary_way() -> None:
    captured, plain = captured_of(attention()), attention()
    for size in (B, B - 5, B):
        given = batch(size, seed=size)
        torch.manual_seed(size)
        found = captured(given)
        torch.manual_seed(size)
        assert_same(found, gradients_of(plain, given))


def test_replay_never_waits_for_the_device() -> None:
    captured, given = captured_of(attention()), batch()
    with never_waiting():
        captured(given)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_centroids_are_captured_without_a_bound_and_replays_move_them(backend: str) -> None:
    ours, plain = (cem.CentroidCEM(D, num_classes=K, noise_std=0.3, backend=backend).to(CUDA) for _ in range(2))
    captured = captured_of(ours)
    for seed in range(3):
        assert_same(captured(batch(seed=seed)), gradients_of(plain, batch(seed=seed)))
    for name, theirs in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], theirs)


class Reads(cem.Term):
    """Says that it never waits, and does."""

    def measure(self, batch: cem.Batch) -> cem.Measured:
        return cem.Measured(batch.features.mean() * batch.features.abs().max().item(), {})


def test_term_that_waits_for_the_device_is_refused_and_the_device_goes_on() -> None:
    with pytest.raises(UsageError, match="--capture: a term waits for the device"):
        captured_of(Reads())
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.ones(3, device=CUDA).sum().item() == 3


@pytest.fixture
def small_run(tmp_path: Path) -> TrainConfig:
    """Two full batches and a smaller one."""
    return TrainConfig(train_size=90, batch_size=32, epochs=1, penalty_from=1, device="cuda", out=tmp_path / "plain")


@pytest.mark.parametrize("trained", [None, "frozen", "shared", 1e-4])
def test_captured_run_follows_the_run_without(tmp_path: Path, small_run: TrainConfig, trained: Any) -> None:
    plain = replace(small_run, defenses=(GAIN,))
    if trained is not None:
        own = cem.SURROGATES["attention"].Options(reduction="linear16", trained=trained)
        plain = replace(plain, surrogate="attention", lambd=0.5, members={"attention": own})
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
