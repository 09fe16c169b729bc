"""Terms in a CUDA graph: what can be held without a device, with a graph that computes again by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import GAIN, Size
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import cem
from cem.errors import UsageError
from cem.models import SplitModel
from cem.training import TrainConfig, Trainer, capture, train
from cem.training import checkpoint as checkpoints
from cem.training.capture import CapturedTerm
from cem.training.injection import combined
from cem.training.weighted import Answer, WeightedTerm, gradients_of

B, D, K = 12, 8, 3
CPU = torch.device("cpu")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let graphs compute again, into the memory of the first time, and count how often they do."""
    count: list[int] = []

    def record(work: Callable[[], Answer], device: torch.device) -> tuple[Answer, Callable[[], None]]:
        memory = work()

        def replay() -> None:
            count.append(1)
            for old, new in zip(tensors(memory), tensors(work()), strict=True):
                old.copy_(new)

        return memory, replay

    monkeypatch.setattr(capture, "record", record)
    return count


def tensors(answer: Answer) -> list[Tensor]:
    found = [answer.loss, *answer.monitors.values(), answer.finite, answer.features_grad, answer.sent_grad]
    return [each for each in (*found, *answer.own_grads) if each is not None]


class Remembers(Size):
    """Reads images, and moves a buffer in every call."""

    needs_images = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def measure(self, batch: cem.Batch) -> cem.Measured:
        assert batch.images is not None
        self.seen += batch.images.mean()
        size, monitors, own_loss = super().measure(batch)
        return cem.Measured(size * self.seen + batch.features.abs().mean(), monitors, own_loss)


def attention(**options: Any) -> cem.SlotCrossAttentionCEM:
    torch.manual_seed(0)
    return cem.SlotCrossAttentionCEM(D, num_classes=K, reg_strength=0.3, **options)


def centroid() -> cem.CentroidCEM:
    return cem.CentroidCEM(D, num_classes=K, noise_std=0.3)


def captured_of(term: cem.Term) -> CapturedTerm:
    return CapturedTerm(term, (B, D), (B, 1, 2, 2), CPU)


def batch(size: int = B, seed: int = 1) -> cem.Batch:
    generator = torch.Generator().manual_seed(seed)
    features, images = torch.randn(size, D, generator=generator), torch.rand(size, 1, 2, 2, generator=generator)
    return cem.Batch(images, torch.arange(size) % K, features, 2 * features)


def assert_same(found: Answer, wanted: Answer) -> None:
    for ours, theirs in zip(tensors(found), tensors(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "replayed"), [(B, 1), (B - 1, 0)])
def test_batch_of_the_captured_size_is_replayed_and_another_one_is_not(
    replays: list[int], size: int, replayed: int
) -> None:
    captured, plain = captured_of(attention()), attention()
    torch.manual_seed(2)
    found = captured(batch(size))
    torch.manual_seed(2)
    assert_same(found, gradients_of(plain, batch(size)))
    assert len(replays) == replayed


def test_term_in_the_other_mode_is_not_replayed(replays: list[int]) -> None:
    ours = attention()
    captured = captured_of(ours)
    ours.eval()
    assert_same(captured(batch()), gradients_of(attention().eval(), batch()))
    assert not replays


@pytest.mark.parametrize("term", [centroid, Remembers])
def test_replays_see_every_batch_and_move_what_the_ordinary_way_moves(
    replays: list[int], term: Callable[[], cem.Term]
) -> None:
    ours, plain = term(), term()
    captured = captured_of(ours)
    for seed in range(3):
        assert_same(captured(batch(seed=seed)), gradients_of(plain, batch(seed=seed)))
    assert len(replays) == 3
    for name, theirs in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], theirs, rtol=0, atol=0)


def test_features_on_a_graph_can_be_replayed(replays: list[int]) -> None:
    captured, given = captured_of(attention()), batch()
    given.features.requires_grad_()
    for _ in range(2):
        grad = captured(given).features_grad
        assert grad is not None
        assert not grad.requires_grad
    assert len(replays) == 2


@pytest.mark.parametrize("trained", [False, True])
def test_step_leaves_nothing_that_the_next_replay_overwrites_but_the_answer(replays: list[int], trained: bool) -> None:
    ours = attention().requires_grad_(trained)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, D))
    model = SplitModel(encoder, nn.Linear(D, K), image_shape=(1, 2, 2))
    each = WeightedTerm("surrogate", "attention", ours, lambda _: 3.5, 0, CPU)
    each.before_epoch(0, 1)
    captured = each.answer = captured_of(ours)
    step = combined(model, [each], torch.rand(B, 1, 2, 2), batch().labels)
    kept = [step.cross_entropy, step.correct]
    kept += [p.grad for p in (*model.parameters(), *ours.parameters()) if p.grad is not None]
    before = [tensor.clone() for tensor in kept]
    captured(batch(seed=5))
    assert len(replays) == 2
    assert all(map(torch.equal, kept, before))


@pytest.mark.parametrize("term", [lambda: cem.GaussianMixtureCEM(D, K), lambda: attention(backend="eager")])
def test_term_that_waits_for_the_device_is_refused(term: Callable[[], cem.Term]) -> None:
    with pytest.raises(UsageError, match="--capture: a term waits for the device in every call"):
        captured_of(term())


@pytest.mark.parametrize(
    "options",
    [
        {"surrogate": "centroid"},
        {"surrogate": "centroid", "defenses": (GAIN,)},
        {"surrogate": "attention", "trained": "frozen"},
        {"surrogate": "attention", "trained": 1e-4},
        {"surrogate": "attention", "trained": "shared"},
    ],
    ids=["centroid", "two terms", "attention", "attention with Adam", "attention with SGD"],
)
def test_captured_run_is_the_run_without_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replays: list[int], options: dict[str, Any]
) -> None:
    plain = TrainConfig(train_size=90, batch_size=32, epochs=2, device="cpu", out=tmp_path / "plain")
    if "trained" in options:
        own = cem.SURROGATES["attention"].Options(reduction="linear16", trained=options.pop("trained"))
        plain = replace(plain, members={"attention": own})
    plain = replace(plain, **options)
    train(plain)
    assert not replays
    # The options hold for CUDA, and everything else is on the CPU.
    monkeypatch.setattr("cem.training.config.resolve_device", lambda _: torch.device("cuda"))
    trainer = Trainer(replace(plain, capture=True, out=tmp_path / "captured"))
    trainer.fit()
    # Two full batches in the one epoch with a penalty, in both with a defense's term; and a smaller one each.
    assert len(replays) == 2 + 4 * len(plain.defenses)
    for part in trainer.state.parts():
        ours, theirs = (checkpoints.load(tmp_path / name / "last.pt")[part] for name in ("captured", "plain"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_eager_attention_reads_nothing_from_the_device_under_a_static_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: whatever asks for one raises. Checks of values are left out as on CUDA."""
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda _: False)
    with FakeTensorMode():
        answer = gradients_of(attention(max_class_size=B, dropout=0.1), batch())
        assert answer.features_grad is not None
        assert answer.features_grad.shape == (B, D)
        with pytest.raises(DataDependentOutputException):
            gradients_of(attention(), batch())


def test_centroids_read_nothing_from_the_device_and_need_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda _: False)
    with FakeTensorMode():
        answer = gradients_of(centroid(), batch())
        assert answer.features_grad is not None
        assert answer.features_grad.shape == (B, D)
