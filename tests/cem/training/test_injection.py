"""How the gradients of classification and penalty meet in the encoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cem.models import SplitModel
from cem.surrogates import Surrogate
from cem.training.injection import INJECTIONS, Step, combined, two_pass
from cem.training.meter import EpochMeter

Injection = Callable[..., Step]
LAMBDA = 3.5
each_injection = pytest.mark.parametrize("inject", INJECTIONS.values(), ids=INJECTIONS)


class Spread(Surrogate):
    """A smooth penalty with a parameter: the log variance of a projection of the batch."""

    def __init__(self, width: int, loss_factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.loss_factor = loss_factor
        self.seen: list[Tensor] = []

    def forward(self, features: Tensor, labels: Tensor, unique_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.seen.append(features.detach().clone())
        variance = (features.flatten(1) @ self.weight).var(dim=0)
        return variance.add(1e-3).log().mean() * self.loss_factor, variance.mean().detach()


class InfiniteGradient(Spread):
    """A penalty that is finite and has a gradient that is not: the square root at zero."""

    def forward(self, features: Tensor, labels: Tensor, unique_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rob_loss, intra_mse = super().forward(features, labels, unique_labels)
        return rob_loss + (features - features.detach()).abs().sum().sqrt(), intra_mse


def network(noise_std: float = 0.3) -> SplitModel:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh())
    server = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    model = SplitModel(encoder, server, image_shape=(1, 4, 4)).double()
    model.defense.std = noise_std
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(12, 1, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.arange(12) % 3


def gradients(inject: Injection, surrogate: Surrogate | None) -> tuple[list[Tensor], Step]:
    """Gradients of a fresh model's parameters, and then the surrogate's, after one step."""
    model = network()
    torch.manual_seed(2)
    step = inject(model, surrogate, *batch(), LAMBDA)
    parameters = [*model.parameters(), *(surrogate.parameters() if surrogate is not None else ())]
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters], step


def plain_sum(
    model: SplitModel, surrogate: Surrogate | None, images: Tensor, labels: Tensor, lambda_eff: float
) -> None:
    """The textbook: one backward of the sum."""
    z = model.encoder(images)
    loss = F.cross_entropy(model.server(model.defense(z)), labels)
    if surrogate is not None:
        loss = loss + lambda_eff * surrogate(z, labels)[0]
    loss.backward()


def spread(**options: float) -> Spread:
    torch.manual_seed(3)
    return Spread(8, **options).double()


@each_injection
def test_gradient_is_that_of_the_weighted_sum(inject: Injection) -> None:
    ours, _ = gradients(inject, spread())
    expected, _ = gradients(plain_sum, spread())
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


def test_combined_and_two_pass_agree() -> None:
    one, _ = gradients(combined, spread())
    two, _ = gradients(two_pass, spread())
    for got, wanted in zip(one, two, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


def test_combined_and_two_pass_measure_the_same() -> None:
    _, one = gradients(combined, spread())
    _, two = gradients(two_pass, spread())
    assert vars(one) == vars(two)


@each_injection
def test_penalty_changes_the_encoder_and_not_the_server(inject: Injection) -> None:
    with_penalty, _ = gradients(inject, spread())
    without, _ = gradients(inject, None)
    encoder = len(list(network().encoder.parameters()))
    server = encoder + len(list(network().server.parameters()))
    assert not torch.equal(with_penalty[0], without[0])
    assert all(map(torch.equal, with_penalty[encoder:server], without[encoder:server]))


@each_injection
def test_surrogate_sees_clean_features(inject: Injection) -> None:
    surrogate = spread()
    gradients(inject, surrogate)
    assert torch.equal(surrogate.seen[0], network().encoder(batch()[0]))


@each_injection
def test_under_amp_the_network_is_bfloat16_and_what_crosses_the_cut_is_not(inject: Injection) -> None:
    model, surrogate = network().float(), spread().float()
    seen: dict[str, torch.dtype] = {}
    model.encoder[0].register_forward_hook(lambda _, __, out: seen.update(encoder=out.dtype))
    model.server[1].register_forward_hook(lambda _, __, out: seen.update(server=out.dtype))
    model.defense.register_forward_hook(lambda _, __, out: seen.update(defense=out.dtype))
    images, labels = batch()
    step = inject(model, surrogate, images.float(), labels, LAMBDA, amp=True)
    assert seen == {"encoder": torch.bfloat16, "server": torch.bfloat16, "defense": torch.float32}
    assert surrogate.seen[0].dtype == step.cross_entropy.dtype == step.rob_loss.dtype == torch.float32


@each_injection
def test_under_amp_gradients_are_near_those_of_fp32(inject: Injection) -> None:
    images, labels = batch()
    grads = []
    for amp in (False, True):
        model = network(noise_std=0.0).float()
        inject(model, spread().float(), images.float(), labels, LAMBDA, amp=amp)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert not torch.equal(*grads)
    assert F.cosine_similarity(*grads, dim=0) > 0.999


@each_injection
def test_frozen_surrogate_gets_no_gradient(inject: Injection) -> None:
    frozen = spread().requires_grad_(False)
    ours, _ = gradients(inject, frozen)
    trained, _ = gradients(inject, spread())
    assert frozen.weight.grad is None
    torch.testing.assert_close(ours[0], trained[0], rtol=1e-11, atol=1e-13)


@each_injection
@pytest.mark.parametrize("broken", [Spread, InfiniteGradient], ids=["penalty is NaN", "gradient is infinite"])
def test_step_without_finite_penalty_keeps_exactly_the_classification_gradient(
    inject: Injection, broken: type[Spread]
) -> None:
    surrogate = broken(8, loss_factor=float("nan") if broken is Spread else 1.0).double()
    ours, step = gradients(inject, surrogate)
    alone, _ = gradients(inject, None)
    for got, wanted in zip(ours, alone, strict=False):  # the surrogate's gradients come last
        assert torch.equal(got.view(torch.int64), wanted.view(torch.int64))
    assert torch.equal(ours[-1], torch.zeros_like(ours[-1]))
    assert step.skipped.item() is True
    assert step.rob_loss.item() == 0.0


@each_injection
def test_step_with_finite_penalty_is_not_skipped(inject: Injection) -> None:
    _, step = gradients(inject, spread())
    assert step.skipped.item() is False
    assert step.rob_loss.item() != 0.0


@each_injection
def test_step_without_surrogate_measures_classification_alone(inject: Injection) -> None:
    _, step = gradients(inject, None)
    model = network()
    torch.manual_seed(2)
    images, labels = batch()
    logits = model(images)
    torch.testing.assert_close(step.cross_entropy, F.cross_entropy(logits, labels).detach())
    assert step.correct == (logits.argmax(1) == labels).sum()
    assert (step.rob_loss, step.intra_mse, step.skipped) == (0.0, 0.0, False)


def test_combined_runs_the_encoder_backward_once() -> None:
    model, calls = network(), []
    model.encoder[1].register_full_backward_hook(lambda *_: calls.append(1))
    combined(model, spread(), *batch(), LAMBDA)
    assert len(calls) == 1


def test_encoder_and_server_graphs_do_not_touch() -> None:
    """What a split system needs: the server's side works from a leaf, so nothing but z crosses the cut."""
    model, inputs = network(noise_std=0.0), []
    model.server.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    combined(model, spread(), *batch(), LAMBDA)
    assert inputs[0].is_leaf


@each_injection
@pytest.mark.parametrize("policy", ["frozen", "trained"])
def test_step_and_its_measurement_never_wait_for_the_device(inject: Injection, policy: str) -> None:
    """Tensors on the meta device have no values: whatever asks for one raises."""
    model, surrogate = network().to("meta"), spread().requires_grad_(policy == "trained").to("meta")
    images, labels = (tensor.to("meta") for tensor in batch())
    meter = EpochMeter(torch.device("meta"))
    meter.add(inject(model, surrogate, images, labels, LAMBDA), len(labels))
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.read()
