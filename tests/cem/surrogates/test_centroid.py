"""CentroidCEM: nats through the noise, around running centroids of the classes."""

import copy
import math

import pytest
import torch

import cem
from cem.errors import UsageError
from cem_kernels import Nats

WIDTH, CLASSES, STD = 6, 4, 0.5


def batch(num_samples=24, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, WIDTH, generator=generator, dtype=dtype) + 3.0
    return features, torch.randint(0, CLASSES, (num_samples,), generator=generator)


def surrogate(noise_std=STD, **options):
    return cem.CentroidCEM(WIDTH, CLASSES, noise_std, **options).double()


def nats(variance, noise_std=STD):
    return 0.5 * torch.log(1 + variance / noise_std**2).mean()


def gradient_of(module, features, labels):
    """``rob_loss``, and its gradient to the features."""
    x = features.detach().clone().requires_grad_()
    loss = module(x, labels)[0]
    return loss.detach(), torch.autograd.grad(loss, x)[0]


# what it measures


def test_the_loss_is_the_nats_that_cross_the_noise():
    x, labels = batch(50)
    x *= torch.linspace(0.01, 3, WIDTH)
    rob_loss, intra_mse = surrogate().eval()(x, labels)
    share = labels.bincount() / 50
    of_class = [nats(x[labels == c].var(dim=0)) for c in range(CLASSES)]
    squares = [x[labels == c].var(dim=0, unbiased=False).mean() for c in range(CLASSES)]
    assert rob_loss.item() == pytest.approx(sum(share * torch.stack(of_class)).item())
    assert intra_mse.item() == pytest.approx(sum(share * torch.stack(squares)).item())


def test_training_measures_around_the_running_centroids():
    x, labels = batch(40)
    module = surrogate(momentum=0.9)
    module(*batch(40, seed=1))
    centroids = module.centroids.clone()
    found = module(x, labels)[0]
    # Of the second batch, and at this momentum of each later one, the variance is taken whole.
    around = [nats((x[labels == c] - centroids[c]).square().mean(dim=0)) for c in range(CLASSES)]
    want = sum(labels.bincount() / 40 * torch.stack(around))
    assert found.item() == pytest.approx(want.item())


def test_identical_samples_cross_nothing():
    x = batch(1)[0].expand(10, WIDTH)
    for training in (True, False):
        loss, _ = surrogate().train(training)(x, torch.zeros(10, dtype=torch.long))
        assert loss.item() == pytest.approx(0, abs=1e-6)


def test_there_is_no_floor():
    x = 1e-4 * batch(50)[0]
    loss, gradient = gradient_of(surrogate(noise_std=1e-4).eval(), x, torch.zeros(50, dtype=torch.long))
    assert loss.item() == pytest.approx(0.5 * math.log(2), rel=0.2)
    assert bool((gradient != 0).all())


def test_features_far_above_the_noise_pay_a_nat_for_every_factor_of_e():
    x, labels = batch()
    near, far = (surrogate(noise_std=1e-3).eval()(scale * x, labels)[0].item() for scale in (1, math.e))
    assert far - near == pytest.approx(1, abs=1e-4)


def test_more_noise_lets_less_through():
    x, labels = batch()
    losses = [surrogate(noise_std=std).eval()(x, labels)[0].item() for std in (0.1, 0.5, 2.0)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("training", [True, False])
def test_eager_is_the_reference_batch_after_batch(training):
    modules = [surrogate(backend=backend).train(training) for backend in ("eager", "reference")]
    for seed in range(3):
        found, want = (gradient_of(each, *batch(seed=seed)) for each in modules)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict(), rtol=1e-9, atol=1e-9)


def test_gradient_descent_on_the_features_lowers_it():
    x, labels = batch()
    x, module = x.requires_grad_(), surrogate()
    before = module(x, labels)[0].item()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        module(x, labels)[0].backward()
        optimizer.step()
    assert module(x, labels)[0].item() < 0.5 * before


# running centroids


def test_the_first_batch_is_nearly_what_evaluation_measures():
    x, labels = batch(4000)
    module = surrogate()
    # But for n / (n - 1).
    torch.testing.assert_close(module(x, labels), module.eval()(x, labels), rtol=1e-2, atol=0)


def test_smaller_features_are_no_way_out():
    x, labels = batch(200)
    module = surrogate(momentum=0.9)
    before = module(x, labels)[0].item()
    assert module(x / 2, labels)[0].item() > before
    assert module.eval()(x / 2, labels)[0].item() < before


def test_a_batch_of_one_sample_a_class_is_penalized_for_its_distance_to_the_centroids():
    x, labels = torch.eye(CLASSES, WIDTH, dtype=torch.float64), torch.arange(CLASSES)
    module = surrogate()
    module(x, labels)
    loss, gradient = gradient_of(module, 1.5 * x, labels)
    assert loss.item() > 0
    # Back toward where it was: along the class's own axis alone.
    assert torch.equal(gradient > 0, x > 0)


def test_a_class_of_one_sample_is_nothing_in_evaluation():
    x, labels = batch(CLASSES)[0], torch.arange(CLASSES)
    module = surrogate()
    module(*batch())
    loss, gradient = gradient_of(module.eval(), x, labels)
    assert loss.item() == 0
    assert not gradient.any()


def test_evaluation_measures_the_batch_alone_and_moves_nothing():
    module = surrogate()
    module(*batch())
    before = copy.deepcopy(module.state_dict())
    x, labels = batch(seed=5)
    torch.testing.assert_close(module.eval()(x, labels), surrogate().eval()(x, labels))
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())


def test_a_call_in_training_moves_the_classes_that_it_has():
    x, labels = batch()
    module = surrogate()
    module(x, labels.clamp(max=2))
    assert module.batches.tolist() == [1, 1, 1, 0]
    torch.testing.assert_close(module.centroids[0], x[labels == 0].mean(dim=0))
    assert not module.centroids[3].any()


def test_moments_are_the_state_and_nothing_is_trained():
    state = {name: (list(each.shape), each.dtype) for name, each in cem.CentroidCEM(6, 4, 0.5).state_dict().items()}
    moments = ([CLASSES, WIDTH], torch.float32)
    assert state == {"centroids": moments, "variances": moments, "batches": ([CLASSES], torch.int64)}
    assert list(surrogate().parameters()) == []


def test_a_sample_that_is_not_finite_stays_out_of_the_moments():
    x, labels = batch()
    module, (later, of_later) = surrogate(), batch(seed=1)
    module(x, labels)
    x[0] = math.inf
    module(x, labels)
    assert all(each.isfinite().all() for each in module.buffers())
    assert module(later, of_later)[0].isfinite()


def test_double_features_are_measured_by_a_single_precision_module():
    x, labels = batch()
    module = cem.CentroidCEM(WIDTH, CLASSES, STD)
    loss = module(x, labels)[0]
    assert (loss.dtype, module.centroids.dtype) == (torch.float64, torch.float32)
    assert loss.item() == pytest.approx(surrogate()(x, labels)[0].item())


def test_half_precision_features_keep_their_spread():
    x, labels = batch(200, dtype=torch.float32)
    narrow = (3.0 + 0.05 * (x - 3.0)).bfloat16()  # what is left inside a class when training succeeds
    found, want = (
        gradient_of(cem.CentroidCEM(WIDTH, CLASSES, STD), narrow.to(dtype), labels)[1].float()
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert float((found - want).norm() / want.norm()) < 0.005  # bf16 rounds by 0.4 %


@pytest.mark.slow
def test_it_compiles_as_one_graph():
    module, other = (surrogate(backend="eager") for _ in range(2))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for seed in range(2):
        torch.testing.assert_close(gradient_of(compiled, *batch(seed=seed)), gradient_of(other, *batch(seed=seed)))
    torch.testing.assert_close(module.state_dict(), other.state_dict())


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"noise_std": 0.0}, "noise_std must be finite and positive, got 0.0"),
        ({"noise_std": math.inf}, "noise_std must be finite and positive, got inf"),
        ({"momentum": 0.0}, "momentum must lie between 0 and 1, got 0.0"),
        ({"momentum": 1.0}, "momentum must lie between 0 and 1, got 1.0"),
        ({"momentum": math.nan}, "momentum must lie between 0 and 1, got nan"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, eager, reference, got 'cuda'"),
    ],
)
def test_bad_construction_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cem.CentroidCEM(**{"feature_dim": WIDTH, "num_classes": CLASSES, "noise_std": STD, **options})


@pytest.mark.parametrize("momentum", [0.0, 1.0, math.nan])
def test_a_momentum_out_of_range_is_refused_by_its_option(momentum):
    with pytest.raises(UsageError, match=rf"--centroid\.momentum must be .*above 0 and below 1, got {momentum}"):
        cem.CentroidCEM.Options(momentum=momentum).checked("centroid.")


def test_build_takes_the_run_and_the_option():
    context = cem.Context((8, 2, 2), (3, 32, 32), num_classes=10, noise_std=0.1, backend="reference")
    module = cem.CentroidCEM.build(cem.CentroidCEM.Options(momentum=0.97), context)
    found = (module.feature_dim, module.num_classes, module.penalty, module.momentum, module.backend)
    assert found == (32, 10, Nats(0.1), 0.97, "reference")
