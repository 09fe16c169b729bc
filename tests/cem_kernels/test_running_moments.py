"""Running centroids of classes, how they move, and the variance around them; on a CUDA device the kernel compiled,
elsewhere in Triton's interpreter."""

import math

import pytest
import torch
from problems import DEVICE, every_backend

from cem_kernels import ClassGroups, LogHinge, Nats, RunningMoments
from cem_kernels.variance import centroid_variance
from cem_kernels.variance.running import EARLY, OF_A_SAMPLE, OUTGROWN, OUTLIER, PATIENCE, Spread, judged

THRESHOLD = 1e-9  # below every variance: what is paid is the logarithm over it
LOG = LogHinge(THRESHOLD, floor=1e-12, gamma=1e-20)


def batch(num_samples=24, width=6, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, width, generator=generator) + 3.0
    labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
    return features.to(DEVICE), labels.to(DEVICE)


def nothing_yet(num_classes=4, width=6, dtype=torch.float32):
    zeros = torch.zeros(num_classes, width, dtype=dtype, device=DEVICE)
    return RunningMoments(zeros, zeros.clone(), zeros[:, 0].long(), zeros[:, 0].long())


def measured(backend, running, features, labels, penalty=LOG, momentum=0.95):
    groups = ClassGroups.from_labels(labels, len(running.batches))
    return centroid_variance(features, groups, running, penalty, momentum=momentum, backend=backend)


def copied(running):
    return RunningMoments(*(each.clone() for each in running))


# how they move


@every_backend
@pytest.mark.parametrize(
    ("batches", "momentum", "share", "of_variances"),
    [(0, 0.95, 1.0, 1.0), (1, 0.95, 0.05, 0.1), (25, 0.8, 0.2, 0.1)],
    ids=["the first sets them", "the second moves them", "quick centroids"],
)
def test_batches_move_centroids_and_variances(backend, batches, momentum, share, of_variances):
    """A class that has no sample moves nothing."""
    (x, labels), (centroids, _) = batch(num_classes=3), batch(4, seed=1)
    counted = torch.full((4,), batches, device=DEVICE)
    running = RunningMoments(centroids, centroids.square() / 4, counted, torch.zeros_like(counted))
    before = copied(running)
    result = measured(backend, running, x, labels, momentum=momentum)
    for c in range(3):
        own, old = x[labels == c], before.variances[c]
        center = before.centroids[c] if batches else own.mean(dim=0)
        moved = old + of_variances * ((own - center).square().mean(dim=0) - old)
        torch.testing.assert_close(running.centroids[c], center + share * (own.mean(dim=0) - center))
        torch.testing.assert_close(running.variances[c], moved)
        torch.testing.assert_close(result.class_penalty[c], torch.log(moved / THRESHOLD).mean())
        torch.testing.assert_close(result.class_mse[c], own.var(dim=0, unbiased=False).mean())
    assert running.batches.tolist() == [batches + 1] * 3 + [batches]
    assert all(torch.equal(moved[3], old[3]) for moved, old in zip(running, before, strict=True))
    assert result.class_penalty[3] == result.class_mse[3] == 0


@every_backend
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize(
    ("column", "bad"),
    [(0, [math.inf]), (299, [math.nan]), (0, [1e20, -1e20]), (299, [1e20, -1e20])],  # the last, in squares only
)
def test_a_class_that_is_not_finite_does_not_move_and_is_not_hidden(backend, column, bad):
    (x, labels), running = batch(width=300), nothing_yet(width=300)
    measured(backend, running, x, labels)
    running.batches.fill_(50)
    before = copied(running)
    x = x + 1
    x[labels == 1, column] = 0
    x[(labels == 1).nonzero()[: len(bad), 0], column] = torch.tensor(bad, device=DEVICE)
    result = measured(backend, running, x, labels)
    assert result.class_penalty.isfinite().tolist() == [True, False, True, True]
    assert not result.rob_loss.isfinite()
    for moved, old in ((running.centroids, before.centroids), (running.variances, before.variances)):
        assert (moved == old).all(dim=1).tolist() == [False, True, False, False]
    assert (running.batches.tolist(), running.ignored.tolist()) == ([51, 50, 51, 51], [0] * 4)


@every_backend
def test_an_outlier_is_measured_and_not_remembered(backend):
    (x, labels), running = batch(width=300), nothing_yet(width=300)
    measured(backend, running, x, labels)
    running.batches.fill_(50)
    before, tenfold = copied(running), x.clone()
    tenfold[(labels == 1).nonzero()[0]] *= 10
    result = measured(backend, running, tenfold, labels)
    around = (tenfold[labels == 1] - before.centroids[1]).square().mean(dim=0)
    cost = LOG.cost(torch.lerp(before.variances[1], around, 0.1)).mean()
    torch.testing.assert_close(result.class_penalty[1], cost)
    for moved, old in zip(running, before, strict=True):
        assert torch.equal(moved[1], old[1]) is (moved is not running.ignored)
    assert (running.batches.tolist(), running.ignored.tolist()) == ([51, 50, 51, 51], [0, 1, 0, 0])


FAR, NEAR = OUTLIER + OF_A_SAMPLE + 0.1, OUTLIER + OF_A_SAMPLE - 0.1  # of one sample, in units of the running variance
TWICE = OUTGROWN * (OUTLIER + OF_A_SAMPLE)


@pytest.mark.parametrize(
    ("batches", "ignored", "batch", "running", "moves", "counted", "outliers"),
    [
        (EARLY, 0, (FAR, FAR), (1, 1), False, EARLY, 1),
        (EARLY - 1, 0, (FAR, FAR), (1, 1), True, EARLY, 0),  # too early to tell
        (EARLY, 3, (NEAR, FAR), (1, 1), True, EARLY + 1, 0),  # around the centroid it is none, and ends the row
        (99, PATIENCE - 2, (FAR, FAR), (1, 1), False, 99, PATIENCE - 1),
        (99, PATIENCE - 1, (FAR, FAR), (1, 1), False, 0, PATIENCE),
        (0, PATIENCE, (FAR, FAR), (1, 1), True, 1, 0),
        (1, 0, (1, 9), (TWICE + 0.1, 9), True, 0, 0),  # its first batch was an outlier
        (1, 0, (9, 1), (9, TWICE + 0.1), True, 0, 0),  # likewise, with samples close to each other
        (1, 0, (1, 1), (TWICE - 0.1, TWICE - 0.1), True, 2, 0),
        (2 * EARLY - 1, 0, (1, 1), (99, 99), True, 0, 0),
        (2 * EARLY, 0, (1, 1), (99, 99), True, 2 * EARLY + 1, 0),  # forgotten by itself
        (0, 0, (1, 1), (99, 99), True, 1, 0),  # which is not looked at
        (EARLY, 2, (math.inf, 1), (1, 1), False, EARLY, 2),
    ],
)
def test_what_a_batch_is_for_the_moments_of_a_class(batches, ignored, batch, running, moves, counted, outliers):
    shown, known = (Spread(*(torch.tensor([float(each), 1e9]) for each in of)) for of in (batch, running))
    counters = torch.tensor([batches, 7]), torch.tensor([ignored, 7])
    found = judged(shown, known, torch.tensor([1, 0]), 1e-9, *counters, shown.around.isfinite())
    assert [each.tolist() for each in found] == [
        [moves, False],
        [counted, 7],
        [outliers, 7],
    ]  # the second has no sample


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize(
    ("backend", "penalty"), [("eager", Nats(0.5)), ("eager", LogHinge(0.05)), ("triton", Nats(0.5))], ids=str
)
def test_backends_judge_as_the_reference_in_double_precision(backend, penalty):
    """A row of outliers, a first batch that was one, what is not finite, and classes that are absent."""
    exact, seen = nothing_yet(5, dtype=torch.float64), set()
    x, labels = batch(seed=99)
    measured("reference", exact, torch.where(labels == 1, 1e3, 1.0)[:, None] * x.double(), labels, penalty)
    exact.batches.copy_(torch.tensor([50, 3, 15, 50, 0]))
    found = RunningMoments(exact.centroids.float(), exact.variances.float(), *map(torch.clone, exact[2:]))
    for step in range(PATIENCE + 2):
        x, labels = batch(seed=step, num_classes=4 if step % 3 else 3)
        factors = torch.tensor([10.0 if step < PATIENCE else 1.0, 1.0, {3: math.nan, 4: 1e8}.get(step, 1.0), 1.0])
        x *= factors.to(DEVICE)[labels][:, None]
        old = copied(exact)
        measured(backend, found, x, labels, penalty)
        measured("reference", exact, x.double(), labels, penalty)
        assert [each.tolist() for each in found[2:]] == [each.tolist() for each in exact[2:]], step
        for moved, want in zip(found[:2], exact[:2], strict=True):
            live = exact.batches > 0
            torch.testing.assert_close(moved[live].double(), want[live], rtol=1e-4, atol=1e-4)
        seen |= set(zip((exact.batches < old.batches).tolist(), (exact.ignored > old.ignored).tolist(), strict=True))
    assert len(seen) == 4  # nothing, an outlier, moments that were outliers, and a lasting change


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_what_only_the_features_dtype_can_hold_moves_nothing(backend):
    (x, labels), running = batch(), nothing_yet()
    x = x.double()
    x[labels == 1, 0] *= 1e30
    assert measured(backend, running, x, labels).rob_loss.isfinite()
    assert not running.variances[1, 0]
    assert running.variances.isfinite().all()
    assert running.batches.tolist() == [1, 0, 1, 1]


@every_backend
def test_autograd_knows_that_they_moved(backend):
    running = nothing_yet()
    weight = torch.ones(4, 6, device=DEVICE, requires_grad=True)
    product = (weight * running.centroids).sum()
    measured(backend, running, *batch())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@every_backend
def test_a_class_begins_with_its_first_batch_that_is_finite(backend):
    (x, labels), running = batch(), nothing_yet()
    broken = x.clone()
    broken[labels == 1, 0] = math.nan
    measured(backend, running, broken, labels)
    measured(backend, running, x, labels)
    torch.testing.assert_close(running.centroids[1], x[labels == 1].mean(dim=0))
    torch.testing.assert_close(running.variances[1], x[labels == 1].var(dim=0, unbiased=False))


# what is measured


@every_backend
def test_gradients_are_those_of_the_batch_s_own_variance_around_the_centroids_of_before(backend):
    (x, labels), (y, other), running = batch(seed=1), batch(seed=2), nothing_yet()
    measured(backend, running, x, labels)
    before = running.centroids.clone()
    y.requires_grad_()
    weight = torch.rand(4, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    result = measured(backend, running, y, other)
    assert (result.intra_mse.requires_grad, result.class_mse.requires_grad) == (False, False)
    (found,) = torch.autograd.grad((weight * result.class_penalty).sum(), y)
    per_column = weight[:, None] / 6 / running.variances / other.bincount(minlength=4)[:, None]
    torch.testing.assert_close(found, per_column[other] * 2 * (y.detach() - before[other]))


@every_backend
def test_no_sample_gives_an_attached_zero(backend):
    x, running = torch.zeros(0, 6, device=DEVICE, requires_grad=True), nothing_yet()
    result = measured(backend, running, x, torch.zeros(0, dtype=torch.long, device=DEVICE))
    (gradient,) = torch.autograd.grad(result.rob_loss, x)
    assert (result.rob_loss.item(), result.intra_mse.item(), gradient.shape) == (0.0, 0.0, (0, 6))
    assert not running.batches.any()


def test_the_kernel_keeps_digits_of_the_first_batch_that_a_mean_in_fp32_loses():
    labels = (torch.arange(128) % 2).to(DEVICE)
    x = (1000 + 1e-3 * (batch(128)[0].double() - 3)).float()
    found, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    measured("triton", nothing_yet(2), found, labels).rob_loss.backward()
    measured("reference", nothing_yet(2, dtype=torch.float64), exact, labels).rob_loss.backward()
    assert float((found.grad - exact.grad).norm() / exact.grad.norm()) < 1e-3
