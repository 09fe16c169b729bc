"""CentroidCEM: nats through the noise, around running centroids of the classes."""

import copy
import math

import pytest
import torch
from small_surrogates import CLASSES, WIDTH, batch, build, seen

import cem
from cem.errors import UsageError
from cem_kernels import Nats

STD = 0.5


def centroid(noise_std=STD, **options):
    return cem.CentroidCEM(WIDTH, CLASSES, noise_std, **options).double()


def off_center(num_samples=50, seed=0):
    """Features in double precision, whose classes lie around 3."""
    features, labels = batch(num_samples, seed=seed)
    return features.double() + 3.0, labels


def nats(variance):
    return 0.5 * torch.log(1 + variance / STD**2).mean()


# what it measures


def test_evaluation_measures_the_nats_of_the_batch_alone_that_cross_the_noise():
    x, labels = off_center()
    x *= torch.linspace(0.01, 3, WIDTH)
    module = centroid()
    module(*off_center(seed=1))
    rob_loss, intra_mse = module.eval()(x, labels)
    share = labels.bincount() / 50
    of_class = [nats(x[labels == c].var(dim=0)) for c in range(CLASSES)]
    squares = [x[labels == c].var(dim=0, unbiased=False).mean() for c in range(CLASSES)]
    assert rob_loss.item() == pytest.approx(sum(share * torch.stack(of_class)).item())
    assert intra_mse.item() == pytest.approx(sum(share * torch.stack(squares)).item())


def test_training_measures_around_the_running_centroids():
    x, labels = off_center()
    module = centroid()
    module(*off_center(seed=1))
    centroids, variances = module.centroids.clone(), module.variances.clone()
    around = torch.stack([(x[labels == c] - centroids[c]).square().mean(dim=0) for c in range(CLASSES)])
    moved = torch.lerp(variances.to(x.dtype), around, 0.1)
    want = sum(labels.bincount() / 50 * torch.stack([nats(each) for each in moved]))
    assert module(x, labels)[0].item() == pytest.approx(want.item())


def test_the_momentum_decides_how_far_centroids_look_back():
    quick, slow = centroid(momentum=0.5), centroid(momentum=0.999)
    for seed in range(4):
        x, labels = off_center(seed=seed)
        x += seed
        for module in (quick, slow):
            module(x, labels)
    assert (quick.centroids > slow.centroids).all()


# its state


def test_a_call_in_training_moves_the_classes_that_it_has():
    x, labels = off_center()
    module = centroid()
    module(x, labels.clamp(max=3))
    assert module.batches.tolist() == [1, 1, 1, 1, 0]
    torch.testing.assert_close(module.centroids[0], x[labels == 0].mean(dim=0))
    assert not module.centroids[4].any()


def test_a_class_of_one_sample_counts_in_training_alone():
    x, labels = off_center(CLASSES)[0], torch.arange(CLASSES)
    module = centroid()
    module(*off_center())
    assert seen(module, x, labels).gradient.ne(0).any(dim=1).all()
    found = seen(module.eval(), x, labels)
    assert found.rob_loss.item() == 0
    assert not found.gradient.any()


def test_moments_are_the_state_and_nothing_is_trained():
    module = cem.CentroidCEM(WIDTH, CLASSES, STD)
    state = {name: (list(each.shape), each.dtype) for name, each in module.state_dict().items()}
    moments = ([CLASSES, WIDTH], torch.float32)
    counters = ([CLASSES], torch.int64)
    assert state == {"centroids": moments, "variances": moments, "batches": counters, "ignored": counters}
    assert list(module.parameters()) == []


def test_double_features_are_measured_by_a_single_precision_module():
    module = cem.CentroidCEM(WIDTH, CLASSES, STD)
    loss = module(*off_center())[0]
    assert (loss.dtype, module.centroids.dtype) == (torch.float64, torch.float32)
    assert loss.item() == pytest.approx(centroid()(*off_center())[0].item())


# what one batch may do to it

SAMPLES = 12  # of each class in a batch


def drawn(step):
    """A batch of rectified features, whose classes differ."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.arange(SAMPLES * CLASSES) % CLASSES
    centers = torch.randn(CLASSES, 32, generator=torch.Generator().manual_seed(1))
    return (centers[labels] + 0.5 * torch.randn(len(labels), 32, generator=generator)).relu(), labels


def trained(module, steps, disturbed=None, samples=0, factor=1.0):
    """``samples`` of each class are multiplied in step ``disturbed``."""
    for step in steps:
        x, labels = drawn(step)
        if step == disturbed:
            x[: samples * CLASSES] *= factor
        module(x, labels)
    return module


def new():
    return cem.CentroidCEM(32, CLASSES, noise_std=0.1)


def assert_gradients_close(module, undisturbed, batch):
    """In every class, within 10 %."""
    found, want = (seen(each, *batch).gradient.unflatten(0, (SAMPLES, CLASSES)) for each in (module, undisturbed))
    difference = (found - want).norm(dim=(0, 2)) / want.norm(dim=(0, 2))
    assert (difference < 0.1).all(), difference


@pytest.fixture(scope="module")
def after_150():
    return trained(new(), range(150))


@pytest.mark.parametrize("factor", [0.0, 0.01, 10.0, 1e2, 1e4, 1e8])
@pytest.mark.parametrize("samples", [1, SAMPLES], ids=["a sample", "all"])
def test_ten_batches_after_an_outlier_gradients_are_as_if_there_had_been_none(after_150, samples, factor):
    module = trained(copy.deepcopy(after_150), range(150, 160), 150, samples, factor)
    assert_gradients_close(module, trained(copy.deepcopy(after_150), range(150, 160)), drawn(160))


@pytest.mark.parametrize("nth", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("factor", [10.0, 1e8])
@pytest.mark.parametrize("samples", [1, SAMPLES], ids=["a sample", "all"])
def test_a_hundred_batches_after_an_outlier_among_its_first_a_class_has_forgotten_it(samples, factor, nth):
    module = trained(new(), range(1, nth + 100), nth, samples, factor)
    assert_gradients_close(module, trained(new(), range(1, nth + 100)), drawn(nth + 100))


@pytest.mark.parametrize("of", ["features", "deviations"])
def test_a_lasting_change_of_scale_is_followed_within_a_hundred_batches(after_150, of):
    def larger(step):
        x, labels = drawn(step)
        means = torch.zeros_like(x) if of == "features" else after_150.centroids[labels]
        return means + 4 * (x - means), labels

    module, fresh = copy.deepcopy(after_150), new()
    for step in range(200, 299):
        module(*larger(step)), fresh(*larger(step))
    assert_gradients_close(module, fresh, larger(299))


def test_it_says_how_many_classes_ignored_the_batch(after_150):
    module = copy.deepcopy(after_150)
    x, labels = drawn(150)
    x[labels < 2] *= 100
    found = [module.measure(cem.Batch(None, labels, each, each)).monitors["outliers"] for each in (x, x, drawn(1)[0])]
    assert ([each.item() for each in found], found[0].shape) == ([2, 2, 0], ())
    assert module.eval().measure(cem.Batch(None, labels, x, x)).monitors["outliers"] == 0


# how it is made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
        ({"noise_std": 0.0}, "noise_std must be finite and positive, got 0.0"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, eager, reference, got 'cuda'"),
    ],
)
def test_bad_construction_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cem.CentroidCEM(**{"feature_dim": WIDTH, "num_classes": CLASSES, "noise_std": STD, **options})


@pytest.mark.parametrize("momentum", [0.0, 1.0, math.nan])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match=f"momentum must lie between 0 and 1, got {momentum}"):
        centroid(momentum=momentum)
    with pytest.raises(UsageError, match=rf"--centroid\.momentum must be .*above 0 and below 1, got {momentum}"):
        build("centroid", {"momentum": momentum})


def test_build_takes_the_run_and_the_option():
    module = build("centroid", {"momentum": 0.9}, num_classes=7, noise_std=0.1, backend="reference")
    found = (module.feature_dim, module.num_classes, module.penalty, module.momentum, module.backend)
    assert found == (WIDTH, 7, Nats(0.1), 0.9, "reference")
