"""The surrogate in a real CUDA graph: the gradients of the ordinary way, fresh draws, and no waiting."""

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
from torch import Tensor

import cem
from cem.surrogates import Surrogate
from cem.training import ConfigError, TrainConfig, train
from cem.training import state as state_module
from cem.training import trainer as trainer_module
from cem.training.capture import CapturedPenalty
from cem.training.injection import Penalty, penalty_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

B, D, K = 32, 16, 4
CUDA = torch.device("cuda")

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "separate": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-3),  # no steps from rounding errors
    "shared": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def surrogate(**options: Any) -> cem.SlotCrossAttentionCEM:
    """Eager under a static bound, which no kernel has a say in and nothing waits for."""
    torch.manual_seed(0)
    bounded = {"max_class_size": B, "backend": "eager"} | options
    return cem.SlotCrossAttentionCEM(D, num_classes=K, reg_strength=0.3, **bounded).to(CUDA)


def batch(size: int = B, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (size,), generator=generator)
    return torch.randn(size, D, generator=generator).to(CUDA), labels.to(CUDA)


def assert_same(found: Penalty, wanted: Penalty) -> None:
    for ours, theirs in zip([*found[:4], *found.grads], [*wanted[:4], *wanted.grads], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", ["frozen", "separate", "shared"])
def test_replays_give_the_ordinary_gradients_while_the_surrogate_learns(policy: str) -> None:
    ours, plain = (surrogate(dropout=0.1).requires_grad_(policy != "frozen") for _ in range(2))
    captured = CapturedPenalty(ours, (B, D), CUDA)
    optimizers = [OPTIMIZERS[policy](list(each.parameters())) for each in (ours, plain) if policy != "frozen"]
    before = [parameter.clone() for parameter in ours.parameters()]
    for step in range(3):
        penalties = []
        for way in (captured, lambda z, labels: penalty_of(plain, z, labels)):
            torch.manual_seed(step)  # the same draws, too
            penalties.append(way(*batch(seed=step)))
        assert_same(*penalties)
        for optimizer, each, penalty in zip(optimizers, (ours, plain), penalties, strict=False):
            for parameter, grad in zip(each.parameters(), penalty.grads, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
    changed = [not torch.equal(*pair) for pair in zip(before, ours.parameters(), strict=True)]
    assert any(changed) is (policy != "frozen")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_replay_draws_its_own_random_numbers(dropout: float) -> None:
    captured = CapturedPenalty(surrogate(dropout=dropout), (B, D), CUDA)
    losses = [captured(*batch()).rob_loss.clone() for _ in range(4)]
    assert len(set(torch.stack(losses).tolist())) == 4


def test_replay_draws_what_the_ordinary_way_would_and_leaves_the_generator_there() -> None:
    captured, plain = CapturedPenalty(surrogate(dropout=0.5), (B, D), CUDA), surrogate(dropout=0.5)
    after = []
    for way in (captured, lambda z, labels: penalty_of(plain, z, labels)):
        torch.manual_seed(7)
        way(*batch())
        after.append(torch.rand(4, device=CUDA))
    assert torch.equal(*after)


def test_smaller_batch_between_replays_takes_the_ordinary_way() -> None:
    captured, plain = CapturedPenalty(surrogate(), (B, D), CUDA), surrogate()
    for size in (B, B - 5, B):
        torch.manual_seed(size)
        found = captured(*batch(size, seed=size))
        torch.manual_seed(size)
        assert_same(found, penalty_of(plain, *batch(size, seed=size)))


def test_replay_never_waits_for_the_device() -> None:
    captured, arguments = CapturedPenalty(surrogate(), (B, D), CUDA), batch()
    with never_waiting():
        captured(*arguments)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_running_centroids_are_captured_without_a_bound_and_replays_move_them(backend: str) -> None:
    options = {"feature_shape": (D,), "num_classes": K, "noise_std": 0.3, "backend": backend}
    ours, plain = (cem.build_surrogate("attention", **options).to(CUDA) for _ in range(2))
    captured = CapturedPenalty(ours, (B, D), CUDA)
    for seed in range(3):
        assert_same(captured(*batch(seed=seed)), penalty_of(plain, *batch(seed=seed)))
    for name, theirs in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], theirs)


def test_surrogate_that_waits_for_the_device_is_refused_and_the_device_goes_on() -> None:
    with pytest.raises(ConfigError, match="--capture: this surrogate waits for the device"):
        CapturedPenalty(surrogate(max_class_size=None), (B, D), CUDA)
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.ones(3, device=CUDA).sum().item() == 3


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Two full batches and a smaller one, under a surrogate that can be captured without kernels."""

    def bounded(*_: Any, feature_shape: tuple[int, ...], num_classes: int, **__: Any) -> Surrogate:
        width = feature_shape[0] * feature_shape[1] * feature_shape[2]
        return cem.SlotCrossAttentionCEM(
            width, num_classes=num_classes, max_class_size=32, reduce_dim=16, reg_strength=0.1, backend="eager"
        )

    monkeypatch.setattr(state_module, "build_surrogate", bounded)
    for name in ("draw_tsne", "draw_curves"):
        monkeypatch.setattr(trainer_module, name, lambda *_, **__: None)
    return TrainConfig(train_size=90, batch_size=32, epochs=1, penalty_from=1, device="cuda", out=tmp_path / "plain")


@pytest.mark.parametrize("policy", ["frozen", "separate", "shared"])
def test_captured_run_follows_the_run_without(tmp_path: Path, small_run: TrainConfig, policy: Any) -> None:
    plain = replace(small_run, measure="enhanced", anchor=0.0, surrogate_policy=policy)
    rows = []
    for config in (replace(plain, capture=True, out=tmp_path / "captured"), plain):
        with open(train(config) / "metrics.csv", newline="") as file:
            rows.append(next(csv.DictReader(file)))
    for column in ("cross_entropy", "rob_loss", "intra_mse"):
        assert float(rows[0][column]) == pytest.approx(float(rows[1][column]), rel=1e-2)


def test_traced_step_of_a_captured_run_launches_one_graph(small_run: TrainConfig) -> None:
    run_dir = train(replace(small_run, epochs=2, capture=True, profile_steps=1))
    with gzip.open(run_dir / "trace.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "cuda_runtime"]
    assert sum(name.endswith("GraphLaunch") for name in names) == 1
