"""Terms in a CUDA graph, or in one that computes again by hand: the gradients of the ordinary way."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from small_runs import attention, cuda, fitted, tensors
from small_terms import GAIN, Size
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import cem
from cem.defenses.inversion import NeighborAttacker
from cem.errors import UsageError
from cem.models import SplitModel
from cem.training import capture, train
from cem.training import checkpoint as checkpoints
from cem.training.capture import CapturedTerm
from cem.training.injection import combined
from cem.training.weighted import WeightedTerm, gradients_of

B, D, K = 32, 16, 4
OPTIMIZERS = {
    1e-4: lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-3),  # no steps from rounding errors
    "shared": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def replays(device, monkeypatch):
    """Count replays; without a device, let graphs compute again, into the memory of the first time."""
    count = []
    real = capture.record

    def record(work, device):
        memory, replay = (work(), None) if device.type == "cpu" else real(work, device)

        def counted():
            count.append(1)
            if replay is not None:
                return replay()
            for old, new in zip(tensors(memory), tensors(work()), strict=True):
                old.copy_(new)

        return memory, counted

    monkeypatch.setattr(capture, "record", record)
    return count


class Remembers(Size):
    """Reads images, and moves a buffer in every call."""

    needs_images = True

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def measure(self, batch):
        assert batch.images is not None
        self.seen += batch.images.mean()
        size, monitors, own_loss = super().measure(batch)
        return cem.Measured(size * self.seen + batch.features.abs().mean(), monitors, own_loss)


def slots(trained="frozen", **options):
    """Under a static bound nothing waits, also where there are no kernels."""
    torch.manual_seed(0)
    term = cem.SlotCrossAttentionCEM(D, num_classes=K, reg_strength=0.3, **{"max_class_size": B, **options})
    term.trained = trained
    return term.requires_grad_(trained != "frozen")


def centroid(backend="auto"):
    return cem.CentroidCEM(D, num_classes=K, noise_std=0.3, backend=backend)


def running_slots():
    return cem.SlotCEM(D, num_classes=K, noise_std=0.3)


def attacker():
    return NeighborAttacker(D, (1, 2, 2), memory=12)


def captured_of(term, device):
    return CapturedTerm(term, (B, D), (B, 1, 2, 2), device)


def batch(device, size=B, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features, images = torch.randn(size, D, generator=generator), torch.rand(size, 1, 2, 2, generator=generator)
    labels = torch.randint(K, (size,), generator=generator)
    return cem.Batch(images.to(device), labels.to(device), features.to(device), 2 * features.to(device))


def check(captured, plain, given):
    """Answers of both ways to a batch, under the same draws: the same on the CPU, close where sums are split."""
    torch.manual_seed(2)
    found = captured(given)
    torch.manual_seed(2)
    wanted = gradients_of(plain, given)
    exact = given.labels.device.type == "cpu"
    for ours, theirs in zip(tensors(found), tensors(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)
    return found, wanted


@pytest.mark.parametrize(
    ("term", "trained"),
    [
        *((lambda trained=trained: slots(trained, dropout=0.1), trained) for trained in ("frozen", "shared", 1e-4)),
        (centroid, "frozen"),
        (lambda: centroid("eager"), "frozen"),
        (running_slots, "frozen"),
        (attacker, "frozen"),
        (Remembers, "frozen"),
    ],
    ids=["frozen", "shared", "Adam", "centroid", "eager centroid", "slots", "attacker", "images"],
)
def test_replays_give_the_ordinary_gradients_and_move_what_the_ordinary_way_moves(device, replays, term, trained):
    ours, plain = (term().to(device) for _ in range(2))
    captured = captured_of(ours, device)
    optimizers = [OPTIMIZERS[trained](list(each.parameters())) for each in (ours, plain) if trained != "frozen"]
    before = [parameter.clone() for parameter in ours.parameters()]
    for seed in range(3):
        answers = check(captured, plain, batch(device, seed=seed))
        for optimizer, each, answer in zip(optimizers, (ours, plain), answers, strict=False):
            for parameter, grad in zip(each.parameters(), answer.own_grads, strict=True):
                assert grad is not None
                parameter.grad = grad.clone()
            optimizer.step()
    changed = [not torch.equal(*pair) for pair in zip(before, ours.parameters(), strict=True)]
    assert any(changed) is (trained != "frozen")
    assert len(replays) == 3
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


def test_smaller_batch_and_the_other_mode_take_the_ordinary_way(device, replays):
    ours, plain = (slots().to(device) for _ in range(2))
    captured = captured_of(ours, device)
    for size in (B, B - 5, B):
        check(captured, plain, batch(device, size, seed=size))
    assert len(replays) == 2
    ours.eval()
    check(captured, plain.eval(), batch(device))
    assert len(replays) == 2


@pytest.mark.parametrize("trained", ["frozen", "shared"])
def test_step_leaves_nothing_that_the_next_replay_overwrites_but_the_answer(device, replays, trained):
    ours = slots(trained).to(device)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, D))
    model = SplitModel(encoder, nn.Linear(D, K), image_shape=(1, 2, 2)).to(device)
    each = WeightedTerm("surrogate", "attention", ours, lambda _: 3.5, 0, device)
    each.before_epoch(0, 1)
    captured, given = captured_of(ours, device), batch(device)
    each.answer = captured
    step = combined(model, [each], given.images, given.labels)
    kept = [step.cross_entropy, step.correct]
    kept += [p.grad for p in (*model.parameters(), *ours.parameters()) if p.grad is not None]
    before = [tensor.clone() for tensor in kept]
    given.features.requires_grad_()  # and what lies on a graph can be replayed
    assert not captured(given).features_grad.requires_grad
    assert len(replays) == 2
    assert all(map(torch.equal, kept, before))


@pytest.mark.parametrize("term", [cem.GaussianMixtureCEM(D, K), slots(backend="eager", max_class_size=None)])
def test_term_that_waits_for_the_device_is_refused(term):
    with pytest.raises(UsageError, match="--capture: a term waits for the device in every call"):
        captured_of(term, torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize(
    "options",
    [{"defenses": (GAIN,)}, attention(), attention(trained=1e-4), attention(trained="shared")],
    ids=["two terms", "attention", "attention with Adam", "attention with SGD"],
)
def test_captured_run_is_the_run_without_bit_for_bit(make, monkeypatch, replays, options):
    plain = make("plain", epochs=2, penalty_from=2, **options)
    theirs = checkpoints.load(train(plain) / "last.pt")
    assert not replays
    # The options hold for CUDA, and everything else is on the CPU.
    monkeypatch.setattr("cem.training.config.resolve_device", lambda _: torch.device("cuda"))
    trainer = fitted(replace(plain, capture=True, out=make("captured").out))
    # Two full batches in the one epoch with a penalty, of each term; and a smaller one.
    assert len(replays) == 2 + 2 * len(plain.defenses)
    ours = checkpoints.load(trainer.run_dir / "last.pt")
    for part in trainer.state.parts():
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])


@pytest.mark.parametrize(
    ("term", "waits"),
    [(lambda: slots(dropout=0.1), False), (lambda: slots(max_class_size=None), True), (centroid, False)],
    ids=["bounded attention", "attention", "centroid"],
)
def test_eager_terms_read_nothing_from_the_device_under_a_static_bound(monkeypatch, term, waits):
    """Fake tensors have no values: whatever asks for one raises. Checks of values are left out as on CUDA."""
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda _: False)
    expected = pytest.raises(DataDependentOutputException) if waits else nullcontext()
    with FakeTensorMode(), expected:
        assert gradients_of(term(), batch(torch.device("cpu"))).features_grad.shape == (B, D)
