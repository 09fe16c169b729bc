"""Running slots of classes, how they begin and move, and the variance around them; the kernel is compiled on a CUDA
device, elsewhere in Triton's interpreter."""

import copy
import math

import pytest
import torch
from exactness import assert_as_exact
from problems import DEVICE, every_backend, slots_problem

from cem_kernels import ClassGroups, Nats, RunningMoments, RunningSlots
from cem_kernels.slot_variance import slot_variance
from cem_kernels.slot_variance.reference import first_slots
from cem_kernels.variance import centroid_variance
from cem_kernels.variance.running import PATIENCE

STD = 0.3
NATS = Nats(STD)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def nothing_yet(num_classes=4, num_slots=3, width=6, dtype=torch.float32):
    zeros = torch.zeros(num_classes, num_slots, width, dtype=dtype, device=DEVICE)
    counters = (torch.zeros(num_classes, dtype=torch.long, device=DEVICE) for _ in range(2))
    return RunningSlots(zeros, zeros.clone(), zeros[..., 0].clone(), *counters)


def batch(num_samples=40, width=6, num_classes=4, seed=0, modes=3):
    """Samples of several modes a class."""
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(num_classes, modes, width, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
    mode = torch.randint(0, modes, (num_samples,), generator=generator)
    noise = 0.5 * torch.randn(num_samples, width, generator=generator)
    return (centers[labels, mode] + noise).to(DEVICE), labels.to(DEVICE)


def measured(backend, running, features, labels, penalty=NATS):
    groups = ClassGroups.from_labels(labels, len(running.batches))
    return slot_variance(features, groups, running, penalty, backend=backend)


def begun(num_slots=3, width=6, batches=50, dtype=torch.float32):
    """Slots that have seen a batch, and are said to have seen more."""
    running = nothing_yet(4, num_slots, width, dtype)
    x, labels = batch(300, width=width)
    measured("reference", running, x.to(dtype), labels)
    running.batches.fill_(batches)
    return running


def course(step):
    """A batch of a long training: an outlier begins a class, rows of outliers, what is not finite, and missing classes.

    Class 3 is in few batches, with fewer samples than slots, class 4 in none, and one batch is empty.
    """
    x, labels = batch(0 if step == 17 else 40, num_classes=3, seed=step)
    x, labels = x.double(), torch.where(torch.arange(len(x), device=DEVICE) < step % 4 % 3, 3, labels)
    if step == 0:
        x[labels == 1] *= 100
    if step in range(30, 30 + PATIENCE + 1):
        x[labels == 0] *= 10
    if step == 25:
        x[labels == 2] = math.nan
    labels[5:7] = -100
    return x, labels


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_eager_is_the_reference_over_a_long_course(num_slots):
    found, exact = (nothing_yet(5, num_slots, dtype=torch.float64) for _ in range(2))
    fell, rows, revived = 0, 0, 0
    for step in range(60):
        if step in (5, 6):
            for shares in (found.shares[:3], exact.shares[:3]):
                shares[:, 0] *= 0.01  # it dies
                shares /= shares.sum(dim=1, keepdim=True)
        old, results = copy.deepcopy(exact), []
        x, labels = course(step)
        for backend, running in (("eager", found), ("reference", exact)):
            features = x.clone().requires_grad_()
            result = measured(backend, running, features, labels)
            (gradient,) = torch.autograd.grad(result.rob_loss + result.class_penalty.square().sum(), features)
            results.append([*(each.detach() for each in result), gradient, *running])
        for each, want in zip(*results, strict=True):
            torch.testing.assert_close(each, want, equal_nan=True, **EXACT)
        torch.testing.assert_close(exact.shares.sum(dim=1), torch.where(exact.shares.any(dim=1), 1.0, 0.0).double())
        fell += int((exact.batches < old.batches).sum())
        rows += int((exact.ignored > old.ignored).sum())
        revived += int(((exact.shares[:3] > 10 * old.shares[:3]) & (old.batches[:3] > 1)[:, None]).sum())
    assert fell >= 2  # an outlier that began a class, and a lasting change
    assert rows >= PATIENCE
    assert revived or num_slots == 1
    assert not exact.batches[4]


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")
def test_the_kernel_judges_and_moves_as_the_reference_in_double_precision_over_a_long_course():
    found, exact = nothing_yet(5), nothing_yet(5, dtype=torch.float64)
    for step in (*range(8), 17, *range(25, 30 + PATIENCE + 3)):
        if step == 25:
            found.batches.fill_(30), exact.batches.fill_(30)
        x, labels = course(step)
        results = [measured("triton", found, x.float(), labels), measured("reference", exact, x, labels)]
        for each, want in zip(*results, strict=True):
            torch.testing.assert_close(each.double(), want, rtol=1e-4, atol=1e-4, equal_nan=True)
        for each, want in zip(found, exact, strict=True):
            torch.testing.assert_close(each.double(), want.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ({"S": 1, "D": 700}, torch.float32),
        ({"S": 2, "D": 1}, torch.float32),
        ({"S": 5, "D": 150}, torch.bfloat16),
        ({"S": 8, "D": 37}, torch.float16),
        ({"S": 16, "D": 40, "T": 2}, torch.float32),
    ],
    ids=str,
)
def test_the_kernel_is_as_exact_for_every_number_of_slots_and_dtype(sizes, dtype):
    labels = torch.tensor([0] * 40 + [1] * 25 + [3] * 3, device=DEVICE)
    assert_as_exact(*(slots_problem(labels, 5, seed=seed, **sizes) for seed in range(2)), dtype=dtype)


def test_the_first_slots_are_the_mean_and_what_is_farthest_and_then_the_means_of_those_nearest():
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [10.0, 0.0], [10.0, 1.0], [0.0, 20.0]])  # the mean is [4, 4.4]
    centroids, variances = first_slots(x, 3)
    torch.testing.assert_close(centroids, torch.tensor([[0.0, 0.5], [0.0, 20.0], [10.0, 0.5]]))
    torch.testing.assert_close(variances, torch.tensor([0.0, 0.2]).expand(3, 2))


@every_backend
@pytest.mark.parametrize("samples", [1, 3])
def test_a_class_of_fewer_samples_than_slots_begins_with_slots_on_them(backend, samples):
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    running = nothing_yet(1, 5)
    measured(backend, running, x, torch.zeros(samples, dtype=torch.long, device=DEVICE))
    closest = torch.cdist(x.double(), running.centroids[0].double()).amin(dim=1)
    assert closest.max() < (1e-6 if samples == 1 else 0.1 * x.std())
    assert running.centroids.isfinite().all()
    assert running.batches.item() == 1


@every_backend
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN slice):RuntimeWarning")
def test_one_slot_is_the_centroid(backend):
    """But for the monitors, from the first batch on, with outliers, absent classes and a lasting change."""
    slots = nothing_yet(5, 1)
    moments = RunningMoments(slots.centroids[:, 0].clone(), slots.variances[:, 0].clone(), *map(torch.clone, slots[3:]))
    for step in (*range(12), 17, 25, *range(30, 32 + PATIENCE)):
        x, labels = course(step)
        found, want = (x.float().requires_grad_() for _ in range(2))
        groups = ClassGroups.from_labels(labels, 5)
        ours = measured(backend, slots, found, labels)
        theirs = centroid_variance(want, groups, moments, NATS, backend=backend)
        assert [each.requires_grad for each in ours] == [True, False, True, False]
        ours.rob_loss.backward(), theirs.rob_loss.backward()
        pairs = [(ours.class_penalty, theirs.class_penalty), (found.grad, want.grad)]
        pairs += [(slots.centroids[:, 0], moments.centroids), (slots.variances[:, 0], moments.variances)]
        for one, centroid in (*pairs, *zip(slots[3:], moments[2:], strict=True)):
            torch.testing.assert_close(one, centroid, equal_nan=True, rtol=1e-4, atol=1e-5)


@every_backend
def test_a_slot_that_has_died_goes_where_the_class_is_explained_worst(backend):
    running = begun(batches=5)
    running.centroids[1, 2] = 20.0  # nobody is near
    running.shares[1] = torch.tensor([0.6, 0.39, 0.01])
    x, labels = batch(seed=1)
    far = (labels == 1).nonzero()[2, 0]
    x[far] += 12.0
    measured(backend, running, x, labels)
    heaviest = int(running.variances[1].eq(running.variances[1, 2]).all(dim=1).nonzero()[0])
    torch.testing.assert_close(running.centroids[1, 2], x[far])
    assert heaviest < 2
    torch.testing.assert_close(running.shares[1, 2], running.shares[1, heaviest])
    assert 0.25 < running.shares[1, 2] < 0.35


@every_backend
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")
@pytest.mark.parametrize("bad", [[math.inf], [math.nan], [1e20, -1e20]], ids=str)  # the last, in squares only
@pytest.mark.parametrize("batches", [0, 50])
def test_a_class_that_is_not_finite_does_not_move_and_is_not_hidden(backend, bad, batches):
    running = begun(width=150, batches=batches)
    (x, labels), before = batch(width=150, seed=1), copy.deepcopy(running)
    x[(labels == 1).nonzero()[: len(bad), 0], -1] = torch.tensor(bad, device=DEVICE)
    result = measured(backend, running, x, labels)
    assert result.class_penalty.isfinite().tolist() == [True, False, True, True]
    assert not result.rob_loss.isfinite()
    for moved, old in zip(running[:3], before[:3], strict=True):
        assert (moved == old).flatten(1).all(dim=1).tolist() == [False, True, False, False]
    assert running.batches.tolist() == [batches + 1, batches, batches + 1, batches + 1]
    assert not running.ignored.any()


@every_backend
@pytest.mark.parametrize("held", [math.nan, 1e38])
def test_what_an_absent_class_holds_is_not_looked_at(backend, held):
    running, (x, labels) = begun(), batch(seed=1, num_classes=3)
    for each in running[:2]:
        each[3] = held
    result = measured(backend, running, x, labels, Nats(1e-3))
    assert result.rob_loss.isfinite()
    assert result.class_penalty[3] == result.class_mse[3] == 0


@every_backend
def test_an_outlier_is_measured_and_not_remembered(backend):
    running, (x, labels) = begun(), batch(seed=1)
    before, usual = copy.deepcopy(running), measured("reference", begun(), x, labels)
    x[labels == 1] *= 20
    result = measured(backend, running, x, labels)
    assert (result.class_penalty[1] > 1.5 * usual.class_penalty[1]) & (result.class_mse[1] > 50 * usual.class_mse[1])
    for moved, old in zip(running, before, strict=True):
        assert torch.equal(moved[1], old[1]) is (moved is not running.ignored)
    assert (running.batches.tolist(), running.ignored.tolist()) == ([51, 50, 51, 51], [0, 1, 0, 0])


@every_backend
def test_autograd_knows_that_they_moved(backend):
    running = nothing_yet()
    weight = torch.ones_like(running.centroids, requires_grad=True)
    product = (weight * running.centroids).sum()
    measured(backend, running, *batch())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradients_are_those_of_the_batch_s_own_squares_and_so_are_their_gradients(backend):
    """``u`` under the attention of the step, added to a running variance of which it is no part."""
    start = begun(dtype=torch.float64)
    (x, labels), running = batch(seed=1), copy.deepcopy(start)
    x, direction = x.double(), batch(seed=2)[0].double()

    def by_hand(x):
        total = 0.0
        for c in range(4):
            own, (center, variance, share) = x[labels == c], (each[c] for each in start[:3])
            with torch.no_grad():
                away, wide = own[:, None] - center, variance + STD**2
                p = (share.log() - (away.square() / wide + wide.log()).sum(dim=2) / 2).div(math.sqrt(6)).softmax(dim=1)
            u = torch.einsum("ns,nsd->sd", p, (own[:, None] - center).square()) / p.sum(dim=0)[:, None]
            w = p.mean(dim=0)
            v = variance + (0.3 * w).clamp(max=0.5)[:, None] * (u.detach() - variance)
            total = total + (c + 1) * (w * NATS.cost(v + u - u.detach()).mean(dim=1)).sum()
        return total

    def by_backend(x):
        return (measured(backend, running, x, labels).class_penalty * torch.arange(1, 5, device=DEVICE)).sum()

    results = []
    for call in (by_backend, by_hand):
        leaf = x.clone().requires_grad_()
        loss = call(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad((gradient * direction).sum(), leaf)
        results.append((loss.detach(), gradient.detach(), second))
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, **EXACT)
