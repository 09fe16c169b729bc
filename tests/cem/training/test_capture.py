"""The surrogate in a CUDA graph: what can be held without a device, with a graph that computes again by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import cem
from cem.models import SplitModel
from cem.training import TrainConfig, capture, train
from cem.training import checkpoint as checkpoints
from cem.training import trainer as trainer_module
from cem.training.capture import CapturedPenalty
from cem.training.injection import Penalty, combined, penalty_of
from cem.training.presets import PRESETS

B, D, K = 12, 8, 3
CPU = torch.device("cpu")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let graphs compute again, into the memory of the first time, and count how often they do."""
    count: list[int] = []

    def record(work: Callable[[], Penalty], device: torch.device) -> tuple[Penalty, Callable[[], None]]:
        memory = work()

        def replay() -> None:
            count.append(1)
            for old, new in zip(tensors(memory), tensors(work()), strict=True):
                old.copy_(new)

        return memory, replay

    monkeypatch.setattr(capture, "record", record)
    return count


def tensors(penalty: Penalty) -> list[Tensor]:
    return [*penalty[:4], *penalty.grads]


def surrogate(**options: Any) -> cem.SlotCrossAttentionCEM:
    torch.manual_seed(0)
    return cem.SlotCrossAttentionCEM(D, num_classes=K, reg_strength=0.3, backend="eager", **options)


def batch(size: int = B, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, D, generator=generator), torch.arange(size) % K


def assert_same(found: Penalty, wanted: Penalty) -> None:
    for ours, theirs in zip(tensors(found), tensors(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "replayed"), [(B, 1), (B - 1, 0)])
def test_batch_of_the_captured_size_is_replayed_and_another_one_is_not(
    replays: list[int], size: int, replayed: int
) -> None:
    captured, plain = CapturedPenalty(surrogate(), (B, D), CPU), surrogate()
    torch.manual_seed(2)
    found = captured(*batch(size))
    torch.manual_seed(2)
    assert_same(found, penalty_of(plain, *batch(size)))
    assert len(replays) == replayed


def test_surrogate_in_the_other_mode_is_not_replayed(replays: list[int]) -> None:
    ours = surrogate()
    captured = CapturedPenalty(ours, (B, D), CPU)
    ours.eval()
    assert_same(captured(*batch()), penalty_of(surrogate().eval(), *batch()))
    assert not replays


def test_features_on_a_graph_can_be_replayed(replays: list[int]) -> None:
    captured = CapturedPenalty(surrogate(), (B, D), CPU)
    z, labels = batch()
    captured(z.requires_grad_(), labels)
    assert not captured(z, labels).z_grad.requires_grad
    assert len(replays) == 2


@pytest.mark.parametrize("trained", [False, True])
def test_step_leaves_nothing_that_the_next_replay_overwrites(replays: list[int], trained: bool) -> None:
    ours = surrogate().requires_grad_(trained)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, D))
    model = SplitModel(encoder, nn.Linear(D, K), image_shape=(1, 2, 2))
    captured = CapturedPenalty(ours, (B, D), CPU)
    _, labels = batch()
    step = combined(model, ours, torch.randn(B, 1, 2, 2), labels, 3.5, penalize=captured)
    kept = [*vars(step).values(), *(p.grad for p in (*model.parameters(), *ours.parameters()) if p.grad is not None)]
    before = [tensor.clone() for tensor in kept]
    captured(*batch(seed=5))
    assert len(replays) == 2
    assert all(map(torch.equal, kept, before))


@pytest.mark.parametrize("policy", ["frozen", "separate", "shared"])
def test_run_with_a_captured_surrogate_is_the_run_without_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replays: list[int], policy: Any
) -> None:
    for name in ("draw_tsne", "draw_curves"):
        monkeypatch.setattr(trainer_module, name, lambda *_, **__: None)
    plain = TrainConfig(train_size=90, batch_size=32, epochs=2, device="cpu", out=tmp_path / "plain")
    plain = replace(plain, **PRESETS["seed"] | {"reduce_dim": 16, "surrogate_policy": policy})
    train(plain)
    assert not replays
    # The options hold for CUDA, and everything else is on the CPU.
    monkeypatch.setattr("cem.training.config.resolve_device", lambda _: torch.device("cuda"))
    train(replace(plain, capture=True, out=tmp_path / "captured"))
    assert len(replays) == 2  # two full batches in the one epoch with a penalty, and a smaller one
    for part in ("encoder", "server", "surrogate"):
        ours, theirs = (checkpoints.load(tmp_path / name / "last.pt")[part] for name in ("captured", "plain"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_eager_surrogate_reads_nothing_from_the_device_under_a_static_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: whatever asks for one raises. Checks of values are left out as on CUDA."""
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda _: False)
    with FakeTensorMode():
        penalty = penalty_of(surrogate(max_class_size=B, dropout=0.1), *batch())
        assert penalty.z_grad.shape == (B, D)
        with pytest.raises(DataDependentOutputException):
            penalty_of(surrogate(), *batch())


def test_running_centroids_read_nothing_from_the_device_and_need_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda _: False)
    with FakeTensorMode():
        recommended = cem.build_surrogate("attention", feature_shape=(D,), num_classes=K, noise_std=0.3)
        assert penalty_of(recommended, *batch()).z_grad.shape == (B, D)


def test_replays_move_running_centroids_as_the_ordinary_way_does(replays: list[int]) -> None:
    ours, plain = (cem.build_surrogate("attention", feature_shape=(D,), num_classes=K, noise_std=0.3) for _ in range(2))
    captured = CapturedPenalty(ours, (B, D), CPU)
    for seed in range(3):
        assert_same(captured(*batch(seed=seed)), penalty_of(plain, *batch(seed=seed)))
    assert len(replays) == 3
    for name, theirs in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], theirs, rtol=0, atol=0)
