"""Running centroids of classes, how they move, and the variance around them; on a CUDA device the kernel compiled,
elsewhere in Triton's interpreter."""

import math

import pytest
import torch
from exactness import (
    DEVICE,
    HOLES,
    assert_as_exact,
    assert_close_to_exact,
    every_labeling,
    interpreted,
    last_program_first,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import PENALTIES, Problem, centroid_problem

from cem_kernels import BackendUnavailableError, ClassGroups, LogHinge, RunningMoments
from cem_kernels.variance import centroid_variance, class_variance

every_backend = pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
SEEDS = range(4)
MOMENTUM, OF_VARIANCES = 0.95, 0.5
THRESHOLD = 1e-9  # below every variance: what is paid is the logarithm over it
LOG = LogHinge(THRESHOLD, floor=1e-12, gamma=1e-20)


def batch(num_samples=24, width=6, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, width, generator=generator) + 3.0
    labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
    return features.to(DEVICE), labels.to(DEVICE)


def nothing_yet(num_classes=4, width=6):
    zeros = torch.zeros(num_classes, width, device=DEVICE)
    return RunningMoments(zeros, zeros.clone(), torch.zeros(num_classes, dtype=torch.long, device=DEVICE))


def measured(backend, running, features, labels, penalty=LOG, momentum=MOMENTUM):
    groups = ClassGroups.from_labels(labels, len(running.batches))
    return centroid_variance(features, groups, running, penalty, momentum=momentum, backend=backend)


def copied(running):
    return RunningMoments(*(each.clone() for each in running))


# how they move


@every_backend
def test_the_first_batch_sets_centroids_and_variances(backend):
    (x, labels), running = batch(), nothing_yet()
    result = measured(backend, running, x, labels)
    for c in range(4):
        own = x[labels == c]
        spread = own.var(dim=0, unbiased=False)
        torch.testing.assert_close(running.centroids[c], own.mean(dim=0))
        torch.testing.assert_close(running.variances[c], spread)
        torch.testing.assert_close(result.class_penalty[c], torch.log(spread / THRESHOLD).mean())
        torch.testing.assert_close(result.class_mse[c], spread.mean())
    assert running.batches.tolist() == [1, 1, 1, 1]


@every_backend
def test_early_centroids_and_variances_are_means_over_batches(backend):
    (x, labels), (y, other), running = batch(seed=1), batch(seed=2), nothing_yet()
    measured(backend, running, x, labels)
    result = measured(backend, running, y, other)
    for c in range(4):
        old, new = x[labels == c], y[other == c]
        around = (new - old.mean(dim=0)).square().mean(dim=0)
        torch.testing.assert_close(running.centroids[c], (old.mean(dim=0) + new.mean(dim=0)) / 2)
        torch.testing.assert_close(running.variances[c], (old.var(dim=0, unbiased=False) + around) / 2)
        torch.testing.assert_close(result.class_penalty[c], torch.log(running.variances[c] / THRESHOLD).mean())
        torch.testing.assert_close(result.class_mse[c], new.var(dim=0, unbiased=False).mean())


@every_backend
def test_later_batches_move_them_by_the_momentum(backend):
    running = nothing_yet()
    for seed in range(25):
        measured("eager", running, *batch(seed=seed))
    before = copied(running)
    x, labels = batch(seed=7)
    measured(backend, running, x, labels)
    for c in range(4):
        own, old = x[labels == c], before.centroids[c]
        around = (own - old).square().mean(dim=0)
        torch.testing.assert_close(running.centroids[c], MOMENTUM * old + (1 - MOMENTUM) * own.mean(dim=0))
        moved = OF_VARIANCES * before.variances[c] + (1 - OF_VARIANCES) * around
        torch.testing.assert_close(running.variances[c], moved)


@every_backend
def test_variances_of_quick_centroids_are_the_batch_s(backend):
    running = nothing_yet()
    measured(backend, running, *batch(seed=0), momentum=0.8)
    before = copied(running)
    x, labels = batch(seed=7)
    measured(backend, running, x, labels, momentum=0.8)
    for c in range(4):
        around = (x[labels == c] - before.centroids[c]).square().mean(dim=0)
        torch.testing.assert_close(running.variances[c], around)


@every_backend
def test_a_class_without_samples_moves_nothing(backend):
    running = nothing_yet()
    result = measured(backend, running, batch(4)[0], torch.tensor([0, 0, 2, 2], device=DEVICE))
    assert running.batches.tolist() == [1, 0, 1, 0]
    for each in (running.centroids, running.variances, result.class_penalty, result.class_mse):
        assert (each[[0, 2]] != 0).all()
        assert not each[[1, 3]].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of inf − inf
@every_backend
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_column_that_is_not_finite_moves_nothing_of_its_own_and_is_not_hidden(backend, bad):
    (x, labels), running = batch(), nothing_yet()
    measured(backend, running, x, labels)
    before = copied(running)
    broken = x + 1
    broken[labels == 1, 0] = bad
    result = measured(backend, running, broken, labels)
    assert result.class_penalty.isfinite().tolist() == [True, False, True, True]
    assert not result.rob_loss.isfinite()
    still = torch.zeros(4, 6, dtype=torch.bool, device=DEVICE)
    still[1, 0] = True
    assert torch.equal(running.centroids == before.centroids, still)
    assert torch.equal(running.variances == before.variances, still)
    assert running.batches.tolist() == [2, 1, 2, 2]


@every_backend
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("column", [0, 299])
def test_a_square_that_overflows_around_a_finite_mean_moves_nothing_of_its_column(backend, column):
    (x, labels), running = batch(width=300), nothing_yet(width=300)
    measured(backend, running, x, labels)
    before = copied(running)
    x = x + 1
    first, second = (labels == 1).nonzero()[:2, 0]
    x[labels == 1, column] = 0
    x[first, column], x[second, column] = 1e20, -1e20
    result = measured(backend, running, x, labels)
    assert result.class_penalty.isfinite().tolist() == [True, False, True, True]
    assert (running.centroids == before.centroids).nonzero().tolist() == [[1, column]]
    assert (running.variances == before.variances).nonzero().tolist() == [[1, column]]
    assert running.batches.tolist() == [2, 1, 2, 2]


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
    (found,) = torch.autograd.grad((weight * measured(backend, running, y, other).class_penalty).sum(), y)
    per_column = weight[:, None] / 6 / running.variances / other.bincount(minlength=4)[:, None]
    torch.testing.assert_close(found, per_column[other] * 2 * (y.detach() - before[other]))


@every_backend
def test_monitors_have_no_gradient(backend):
    x, labels = batch()
    result = measured(backend, nothing_yet(), x.requires_grad_(), labels)
    assert (result.rob_loss.requires_grad, result.class_penalty.requires_grad) == (True, True)
    assert (result.intra_mse.requires_grad, result.class_mse.requires_grad) == (False, False)


@every_backend
def test_shrinking_all_features_makes_a_batch_s_variance_smaller_and_that_around_centroids_larger(backend):
    # Four classes far apart, and little spread inside each.
    spread, labels = 0.1 * batch(200)[0], (torch.arange(200) % 4).to(DEVICE)
    x, running = 10 * torch.eye(4, 6, device=DEVICE)[labels] + spread, nothing_yet()
    before = measured(backend, running, x, labels).rob_loss.item()
    around = measured(backend, running, 0.5 * x, labels).rob_loss.item()
    groups = ClassGroups.from_labels(labels, 4)
    whole, half = (class_variance(f * x, groups, LOG).intra_mse.item() for f in (1.0, 0.5))
    assert half == pytest.approx(0.25 * whole)
    assert around > before + math.log(1.5)


@every_backend
def test_a_single_sample_is_drawn_to_the_centroid_of_its_class(backend):
    running = nothing_yet()
    measured(backend, running, *batch())
    before = running.centroids[2].clone()
    x = batch(1)[0].requires_grad_()
    rob_loss = measured(backend, running, x, torch.tensor([2], device=DEVICE)).rob_loss
    (gradient,) = torch.autograd.grad(rob_loss, x)
    torch.testing.assert_close(gradient[0], 2 * (x[0].detach() - before) / running.variances[2] / 6)


@every_backend
def test_variances_below_the_floor_have_no_gradient(backend):
    x, labels = batch()
    x.requires_grad_()
    penalty = LogHinge(THRESHOLD, floor=1e3)
    (gradient,) = torch.autograd.grad(measured(backend, nothing_yet(), x, labels, penalty).rob_loss, x)
    assert torch.equal(gradient, torch.zeros_like(x))


@every_backend
def test_no_sample_gives_an_attached_zero(backend):
    x, running = torch.zeros(0, 6, device=DEVICE, requires_grad=True), nothing_yet()
    result = measured(backend, running, x, torch.zeros(0, dtype=torch.long, device=DEVICE))
    (gradient,) = torch.autograd.grad(result.rob_loss, x)
    assert (result.rob_loss.item(), result.intra_mse.item(), gradient.shape) == (0.0, 0.0, (0, 6))
    assert not running.batches.any()


@every_backend
def test_every_axis_after_the_first_is_a_column(backend):
    x, labels = batch(width=24)
    maps, flat = nothing_yet(width=24), nothing_yet(width=24)
    found = measured(backend, maps, x.unflatten(1, (4, 3, 2)), labels)
    assert torch.equal(found.rob_loss, measured(backend, flat, x, labels).rob_loss)
    assert torch.equal(maps.variances, flat.variances)


# the kernel against the reference in fp64


@every_labeling
@pytest.mark.parametrize("tokens_per_sample", [1, 3])
@pytest.mark.usefixtures("uninitialized_memory_is_nan")
def test_the_kernel_is_as_exact_as_the_reference(labels, num_classes, tokens_per_sample):
    assert_as_exact(centroid_problem(labels, num_classes, T=tokens_per_sample, D=12))


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("uninitialized_memory_is_nan")
def test_the_kernel_is_as_exact_for_every_penalty_and_dtype(penalty, dtype):
    assert_as_exact(*(centroid_problem(HOLES, 7, T=5, D=37, penalty=penalty, seed=s) for s in SEEDS), dtype=dtype)


@pytest.mark.parametrize("batches", [0, 1, 500])
@pytest.mark.usefixtures("uninitialized_memory_is_nan")
def test_the_kernel_is_exact_where_a_class_is_split_and_columns_are_many(batches):
    labels = torch.cat([torch.zeros(700, dtype=torch.long), torch.ones(90, dtype=torch.long)]).to(DEVICE)
    assert_as_exact(centroid_problem(labels, 3, D=24, batches=batches))
    assert_as_exact(centroid_problem(HOLES, 7, T=3, D=300, batches=batches))


@pytest.mark.parametrize("samples", [6, 400])
@pytest.mark.parametrize("batches", [0, 500])
def test_variance_of_tight_classes_far_from_zero_keeps_its_digits(samples, batches):
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(samples) % 2).to(DEVICE)
    features = (1000 + 0.01 * torch.randn(samples, 20, generator=generator, dtype=torch.float64)).float().to(DEVICE)
    centroids = (1000 + 0.01 * torch.randn(2, 20, generator=generator, dtype=torch.float64)).float().to(DEVICE)
    groups = ClassGroups.from_labels(labels, 2)

    def run(backend, features):
        counted = torch.full((2,), batches, device=DEVICE)
        variances = torch.full((2, 20), 1e-4, dtype=features.dtype, device=DEVICE)
        running = RunningMoments(centroids.to(features.dtype, copy=True), variances, counted)
        penalty = LogHinge(1e-6, floor=1e-8)
        result = centroid_variance(features, groups, running, penalty, momentum=0.95, backend=backend)
        return result.rob_loss, result.class_penalty

    assert_as_exact(Problem({"features": features.double()}, run))


def test_the_kernel_keeps_digits_of_the_first_batch_that_a_mean_in_fp32_loses():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(128) % 2).to(DEVICE)
    x = (1000 + 1e-3 * torch.randn(128, 6, generator=generator, dtype=torch.float64)).float().to(DEVICE)
    found, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    measured("triton", nothing_yet(2), found, labels).rob_loss.backward()
    state = RunningMoments(*(each.double() for each in nothing_yet(2)[:2]), nothing_yet(2).batches)
    measured("reference", state, exact, labels).rob_loss.backward()
    assert float((found.grad - exact.grad).norm() / exact.grad.norm()) < 1e-3


@interpreted
def test_the_order_in_which_programs_arrive_changes_no_bit(monkeypatch):
    problem = centroid_problem(torch.arange(700, device=DEVICE) % 3, 4, D=200)
    leaves = {name: leaf.float() for name, leaf in problem.leaves.items()}
    forwards = problem.results("triton", **leaves)
    last_program_first(monkeypatch)
    backwards = problem.results("triton", **leaves)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


@settings(max_examples=20, deadline=None)
@given(labels=st.lists(st.integers(0, 6), max_size=40), T=st.integers(1, 3), D=st.integers(1, 40))
def test_the_kernel_is_as_exact_for_any_labels(labels, T, D):
    labels = torch.tensor(labels, dtype=torch.long, device=DEVICE)
    assert_close_to_exact(centroid_problem(labels, 7, T=T, D=D))


def test_threshold_may_be_a_tensor():
    x, labels = batch()
    number, tensor = (
        measured("triton", nothing_yet(), x, labels, LogHinge(threshold)).class_penalty
        for threshold in (0.25, torch.tensor(0.25))
    )
    assert torch.equal(number, tensor)


# refusals


COUNTS = torch.zeros(4, dtype=torch.long, device=DEVICE)


def running_with(**replaced):
    return nothing_yet()._replace(**replaced)


BAD_VALUES = [
    ({"running": running_with(centroids=torch.zeros(3, 6))}, r"running.centroids must have shape \[K=4, C=6\], got"),
    ({"running": running_with(variances=torch.zeros(4, 5))}, r"running.variances must have shape \[K=4, C=6\], got"),
    ({"running": running_with(batches=COUNTS[:, None])}, r"running.batches must have shape \[K=4\], got \[4, 1\]"),
    ({"running": running_with(batches=COUNTS.to("meta"))}, "running.batches must be on the features' device"),
    ({"running": running_with(centroids=torch.zeros(4, 6, requires_grad=True))}, "running.centroids takes no gradient"),
    ({"momentum": 1.0}, "momentum must lie between 0 and 1, got 1.0"),
    ({"momentum": math.nan}, "momentum must lie between 0 and 1, got nan"),
    ({"penalty": LogHinge(torch.tensor(0.1, requires_grad=True))}, "threshold takes no gradient here"),
    ({"backend": "cuda"}, "backend must be one of auto, triton, eager, reference, got 'cuda'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_VALUES, ids=[message for _, message in BAD_VALUES])
def test_bad_values_are_refused(options, message):
    x, labels = batch()
    with pytest.raises(ValueError, match=message):
        measured(**{"backend": "eager", "running": nothing_yet(), "features": x, "labels": labels, **options})


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_batches_that_are_no_int64_are_refused(dtype):
    with pytest.raises(TypeError, match=f"running.batches must be torch.int64, got {dtype}"):
        measured("eager", running_with(batches=COUNTS.to(dtype)), *batch())


OTHER_LAYOUTS = {
    "fp64": {"centroids": torch.zeros(4, 6, dtype=torch.float64)},
    "transposed": {"variances": torch.zeros(6, 4).T},
    "every second count": {"batches": torch.zeros(4, 2, dtype=torch.long)[:, 0]},
    "one count": {"batches": torch.zeros(1, dtype=torch.long).expand(4)},
}


@pytest.mark.parametrize("replaced", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS.keys())
def test_running_moments_that_kernels_do_not_take_are_refused_by_name(replaced):
    running = running_with(**{name: each.to(DEVICE) for name, each in replaced.items()})
    with pytest.raises(BackendUnavailableError, match="kernels take running moments that are fp32 and contiguous"):
        measured("triton", running, *batch())
