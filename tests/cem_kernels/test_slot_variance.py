"""Variance inside slots against its definition, and the attention that says which slots a token belongs to."""

import math
import statistics

import pytest
import torch
from exactness import every_labelling
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, assert_same, labels_with_holes, random_slot_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cem_kernels import (
    BackendUnavailableError,
    ClassGroups,
    SlotAttentionWeights,
    class_variance,
    set_debug,
    slot_assignments,
    slot_attention,
    slot_variance,
)
from cem_kernels.class_variance import HINGES
from cem_kernels.slot_variance import IMPLEMENTATIONS

both_backends = pytest.mark.parametrize("backend", ["eager", "reference"])
every_hinge = pytest.mark.parametrize("hinge", HINGES)
LABELS = labels_with_holes(13, 5)  # classes 1 and 3; the others are empty
OPTIONS = {"threshold": 0.05, "eps_var": 1e-4, "gamma": 1e-6, "min_samples": 2}


def random_features(num_samples, T, D, seed=0):
    """Columns on both sides of the threshold and below the floor."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-3, 0.5, T * D, dtype=torch.float64).view(T, D)
    return torch.randn(num_samples, T, D, generator=generator, dtype=torch.float64) * spread + 3.0


def random_attention(num_samples, T, S, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed + 1)
    logits = torch.randn(num_samples, T, S, generator=generator, dtype=torch.float64)
    return torch.softmax(sharpness * logits, dim=2)


def hard_attention(choices, num_slots, dtype=torch.float64):
    """Each sample, at its one token, belongs to one slot only."""
    return torch.nn.functional.one_hot(torch.as_tensor(choices), num_slots)[:, None].to(dtype)


def variance_problem(
    labels, num_classes, *, T=1, D=6, S=3, seed=0, dtype=torch.float64, attention=None, bound=None, **options
):
    groups = ClassGroups.from_labels(labels, num_classes, max_class_size=bound)
    if attention is None:
        attention = random_attention(len(labels), T, S, seed)
    attention = attention.to(labels.device, dtype)

    def run(backend, features):
        weights = attention.double() if features.dtype == torch.float64 else attention
        return tuple(slot_variance(features, weights, groups, backend=backend, **(OPTIONS | options)))

    return Problem({"features": random_features(len(labels), T, D, seed).to(labels.device, dtype)}, run)


HINGE_OF_NUMBER = {
    "relu": lambda h: max(h, 0.0),
    "softplus": lambda h: math.log1p(math.exp(h)),
    "identity": lambda h: h,
}


def by_loops(x, p, labels, num_classes, hinge="relu", *, threshold, eps_var, gamma, min_samples):
    """The definition, number by number: ``(rob_loss, intra_mse, penalty of each class, mse of each class)``."""
    x, p, labels = x.tolist(), p.tolist(), labels.tolist()
    penalties, errors, weights = [0.0] * num_classes, [0.0] * num_classes, [0] * num_classes
    for c in range(num_classes):
        members = [n for n, label in enumerate(labels) if label == c]
        if len(members) < min_samples:
            continue
        weights[c] = len(members)
        T, D, S = len(x[0]), len(x[0][0]), len(p[0][0])
        for t in range(T):
            for s in range(S):
                W = math.fsum(p[n][t][s] for n in members)
                if W == 0:
                    continue
                n_eff = 1 / math.fsum((p[n][t][s] / W) ** 2 for n in members)  # p² may underflow
                for d in range(D):
                    mean = math.fsum(p[n][t][s] * x[n][t][d] for n in members) / W
                    mse = math.fsum(p[n][t][s] * (x[n][t][d] - mean) ** 2 for n in members) / W
                    of_class = statistics.variance([x[n][t][d] for n in members])
                    var = mse * n_eff / (n_eff - 1) if n_eff >= 2 else mse * n_eff + (2 - n_eff) * of_class
                    height = math.log(max(var, eps_var) + gamma) - math.log(threshold + gamma)
                    penalties[c] += W / len(members) * HINGE_OF_NUMBER[hinge](height) / (T * D)
                    errors[c] += W / len(members) * mse / (T * D)
    total = max(sum(weights), 1)
    rob_loss = math.fsum(w * penalty for w, penalty in zip(weights, penalties, strict=True)) / total
    intra_mse = math.fsum(w * error for w, error in zip(weights, errors, strict=True)) / total
    return rob_loss, intra_mse, penalties, errors


def assert_values_by_loops(result, *args, **options):
    for found, want in zip(result, by_loops(*args, **(OPTIONS | options)), strict=True):
        torch.testing.assert_close(found.cpu(), torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ the definition


@both_backends
@every_hinge
@pytest.mark.parametrize("min_samples", [2, 4])
def test_all_four_results_are_those_of_the_definition(backend, hinge, min_samples):
    labels = torch.tensor([3, 1, 3, 0, 3, 1, 3, 1, 3, 5])  # five, three, one and one sample, and none
    x, p = random_features(10, 2, 5), random_attention(10, 2, 3)
    options = {**OPTIONS, "min_samples": min_samples}
    groups = ClassGroups.from_labels(labels, 7)
    result = slot_variance(x, p, groups, hinge=hinge, backend=backend, **options)
    assert_values_by_loops(result, x, p, labels, 7, hinge, min_samples=min_samples)


@both_backends
@pytest.mark.parametrize("of", [0, 1], ids=["rob_loss", "intra_mse"])
@every_hinge
def test_gradients_are_differences_of_the_definition(backend, of, hinge):
    labels = torch.tensor([2, 0, 2, 1, 0, 2])
    x, p = random_features(6, 2, 2, seed=3), random_attention(6, 2, 3, seed=3)
    leaf = x.clone().requires_grad_()
    result = slot_variance(leaf, p, ClassGroups.from_labels(labels, 4), hinge=hinge, backend=backend, **OPTIONS)
    (found,) = torch.autograd.grad(result[of], leaf)
    want, step = torch.zeros_like(x), 1e-6
    for place in range(x.numel()):
        up, down = x.clone(), x.clone()
        up.view(-1)[place] += step
        down.view(-1)[place] -= step
        losses = (by_loops(moved, p, labels, 4, hinge, **OPTIONS)[of] for moved in (up, down))
        want.view(-1)[place] = (next(losses) - next(losses)) / (2 * step)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)


@both_backends
@every_hinge
def test_gradcheck_of_features_and_threshold(backend, hinge):
    problem = variance_problem(torch.tensor([0, 2, 2, 0, 2]), 4, D=4, hinge=hinge)
    groups, p = ClassGroups.from_labels(torch.tensor([0, 2, 2, 0, 2]), 4), random_attention(5, 1, 3)
    features = problem.leaves["features"].requires_grad_()
    threshold = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def call(features, threshold):
        return tuple(slot_variance(features, p, groups, threshold=threshold, hinge=hinge, backend=backend))

    assert torch.autograd.gradcheck(call, (features, threshold))


@both_backends
def test_slot_variance_of_a_case_worked_by_hand(backend):
    features = torch.tensor([[0.0], [2.0], [6.0], [5.0]], dtype=torch.float64)[:, :, None]
    attention = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)[:, None]
    groups = ClassGroups.from_labels(torch.tensor([0, 0, 0, 1]), 2)
    result = slot_variance(features, attention, groups, threshold=0.5, backend=backend)
    # Slot 0 holds two samples of variance 2. Slot 1 holds one, and has the variance of the class, 28/3. Class 1 has one
    # sample.
    variances = (2, 28 / 3)
    heights = [math.log(v + 1e-6) - math.log(0.5 + 1e-6) for v in variances]
    penalty = 2 / 3 * heights[0] + 1 / 3 * heights[1]
    assert result.class_penalty.tolist() == pytest.approx([penalty, 0.0])
    assert result.class_mse.tolist() == pytest.approx([2 / 3, 0.0])
    assert float(result.rob_loss) == pytest.approx(penalty)
    assert float(result.intra_mse) == pytest.approx(2 / 3)


@both_backends
def test_losses_weight_classes_by_their_samples(backend):
    problem = variance_problem(torch.tensor([0] * 3 + [1] * 6), 2)
    rob_loss, intra_mse, penalty, mse = problem.run(backend, **problem.leaves)
    weight = torch.tensor([3.0, 6.0]).double() / 9
    assert float(rob_loss) == pytest.approx(float(penalty @ weight))
    assert float(intra_mse) == pytest.approx(float(mse @ weight))


@both_backends
@every_hinge
def test_classes_of_too_few_samples_are_exactly_zero(backend, hinge):
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    problem = variance_problem(labels, 4, hinge=hinge, min_samples=4)
    rob_loss, intra_mse, penalty, mse = problem.run(backend, **problem.leaves)
    assert torch.equal(penalty[[0, 2, 3]], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(mse[[0, 2, 3]], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(torch.stack([rob_loss, intra_mse]), torch.stack([penalty[1], mse[1]]))


@both_backends
@pytest.mark.parametrize("num_samples", [0, 4])
def test_no_class_with_enough_samples_gives_an_attached_zero(backend, num_samples):
    features = torch.randn(num_samples, 2, 3, requires_grad=True)
    groups = ClassGroups.from_labels(torch.arange(num_samples), 4)
    attention = torch.full((num_samples, 2, 2), 0.5)
    result = slot_variance(features, attention, groups, threshold=0.1, hinge="identity", backend=backend)
    assert result.rob_loss.item() == 0
    assert result.intra_mse.item() == 0
    (result.rob_loss + result.intra_mse).backward()
    assert torch.equal(features.grad, torch.zeros(num_samples, 2, 3))


@both_backends
def test_variance_below_its_floor_has_no_gradient(backend):
    features = (torch.randn(8, 1, 3) * 1e-4).requires_grad_()
    attention = random_attention(8, 1, 2).float()
    groups = ClassGroups.from_labels(torch.zeros(8, dtype=torch.long), 1)
    result = slot_variance(features, attention, groups, threshold=1e-6, eps_var=1e-4, backend=backend)
    assert result.rob_loss.item() == pytest.approx(math.log((1e-4 + 1e-6) / (1e-6 + 1e-6)), rel=1e-5)
    result.rob_loss.backward()
    assert torch.equal(features.grad, torch.zeros(8, 1, 3))


# ------------------------------------------------------------------------------------------------- eager and reference


@every_labelling
@pytest.mark.parametrize("tokens_per_sample", [1, 3])
@every_hinge
def test_eager_equals_reference(labels, num_classes, tokens_per_sample, hinge):
    problem = variance_problem(labels, num_classes, T=tokens_per_sample, hinge=hinge)
    assert_same(problem.results("eager"), problem.results("reference"))


@every_labelling
@every_hinge
def test_eager_equals_reference_in_single_precision(labels, num_classes, hinge):
    problem = variance_problem(labels, num_classes, T=3, hinge=hinge, dtype=torch.float32)
    assert_same(problem.results("eager"), problem.results("reference"), tolerance=2e-4)


some_problem = {
    "labels": st.lists(st.integers(0, 5), max_size=14),
    "sizes": st.fixed_dictionaries({"T": st.integers(1, 3), "D": st.integers(1, 5), "S": st.integers(1, 5)}),
    "hinge": st.sampled_from(HINGES),
    "min_samples": st.integers(2, 5),
    "sharpness": st.sampled_from([0.0, 1.0, 10.0, 1000.0]),
    "seed": st.integers(0, 2**31),
}


@pytest.mark.parametrize("bound", [int(LABELS.bincount().max()), 13])
def test_eager_equals_reference_under_a_static_bound(bound):
    problem = variance_problem(LABELS, 5, T=2, bound=bound)
    assert_same(problem.results("eager"), problem.results("reference"))


@given(**some_problem)
@settings(max_examples=60, deadline=None)
def test_eager_equals_reference_for_any_labels_and_sizes(labels, sizes, hinge, min_samples, sharpness, seed):
    attention = random_attention(len(labels), sizes["T"], sizes["S"], seed, sharpness)
    labels = torch.tensor(labels, dtype=torch.long)
    problem = variance_problem(labels, 6, seed=seed, attention=attention, hinge=hinge, min_samples=min_samples, **sizes)
    assert_same(problem.results("eager"), problem.results("reference"))


@given(**some_problem)
@settings(max_examples=40, deadline=None)
def test_eager_equals_the_definition_for_any_labels_and_sizes(labels, sizes, hinge, min_samples, sharpness, seed):
    T, D, S = sizes.values()
    x, p = random_features(len(labels), T, D, seed), random_attention(len(labels), T, S, seed, sharpness)
    labels = torch.tensor(labels, dtype=torch.long)
    groups = ClassGroups.from_labels(labels, 6)
    options = OPTIONS | {"min_samples": min_samples}
    result = slot_variance(x, p, groups, hinge=hinge, backend="eager", **options)
    assert_values_by_loops(result, x, p, labels, 6, hinge, min_samples=min_samples)


@both_backends
def test_permuting_the_samples_permutes_gradients(backend):
    labels = labels_with_holes(19, 6)
    shuffle = torch.randperm(19, generator=torch.Generator().manual_seed(3))
    attention = random_attention(19, 2, 3)
    plain = variance_problem(labels, 6, T=2, attention=attention)
    shuffled = variance_problem(labels[shuffle], 6, T=2, attention=attention[shuffle])
    want = plain.results(backend)
    want["gradient of features"] = want["gradient of features"][shuffle]
    found = shuffled.results(backend, features=plain.leaves["features"][shuffle])
    assert_same(found, want, tolerance=1e-12)


def test_permuting_the_slots_changes_nothing():
    attention = random_attention(13, 2, 4)
    want = variance_problem(LABELS, 5, T=2, attention=attention).results("eager")
    found = variance_problem(LABELS, 5, T=2, attention=attention[..., [2, 0, 3, 1]]).results("eager")
    assert_same(found, want, tolerance=1e-12)


# --------------------------------------------------------------------------------------------- what attention may look


@both_backends
@every_labelling
@every_hinge
def test_uniform_attention_is_class_variance(backend, labels, num_classes, hinge):
    uniform = torch.full((len(labels), 2, 3), 1 / 3, dtype=torch.float64)
    problem = variance_problem(labels, num_classes, T=2, attention=uniform, hinge=hinge)
    groups = ClassGroups.from_labels(labels, num_classes)

    def run(backend, features):
        return tuple(class_variance(features, groups, hinge=hinge, backend=backend, **OPTIONS))

    want = Problem(problem.leaves, run).results("reference")
    assert_same(problem.results(backend), want, tolerance=1e-12)


@both_backends
@pytest.mark.parametrize("num_slots", [1, 4])
def test_any_number_of_slots_of_uniform_attention_is_class_variance_in_single_precision(backend, num_slots):
    uniform = torch.full((13, 2, num_slots), 1 / num_slots)
    problem = variance_problem(LABELS, 5, T=2, attention=uniform, dtype=torch.float32)
    groups = ClassGroups.from_labels(LABELS, 5)
    want = class_variance(problem.leaves["features"], groups, backend="reference", **OPTIONS)
    for found, expected in zip(problem.run(backend, **problem.leaves), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@both_backends
def test_hard_assignments_give_the_weighted_mean_over_slots_of_their_own_unbiased_variance(backend):
    slot_of = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0, 1])
    x = random_features(9, 1, 4)
    groups = ClassGroups.from_labels(torch.zeros(9, dtype=torch.long), 1)
    result = slot_variance(
        x, hard_attention(slot_of, 3), groups, threshold=0.05, eps_var=1e-30, hinge="identity", backend=backend
    )
    penalty = mse = 0.0
    for s in range(3):
        own = x[slot_of == s, 0]
        heights = torch.log(own.var(dim=0) + 1e-6) - math.log(0.05 + 1e-6)
        penalty += len(own) / 9 * float(heights.mean())
        mse += len(own) / 9 * float(own.var(dim=0, unbiased=False).mean())
    assert float(result.rob_loss) == pytest.approx(penalty, rel=1e-12)
    assert float(result.intra_mse) == pytest.approx(mse, rel=1e-12)


@both_backends
def test_a_slot_of_one_sample_has_the_variance_of_its_class(backend):
    x = random_features(4, 1, 3)
    groups = ClassGroups.from_labels(torch.zeros(4, dtype=torch.long), 1)
    alone = slot_variance(x, hard_attention([0, 1, 2, 3], 4), groups, threshold=0.05, backend=backend)
    of_class = class_variance(x, groups, threshold=0.05, backend=backend)
    assert alone.rob_loss.item() == pytest.approx(of_class.rob_loss.item(), rel=1e-12)
    assert alone.intra_mse.item() == 0.0


@both_backends
def test_the_variance_of_few_samples_a_slot_is_on_average_that_of_their_class(backend):
    # Features that know nothing of their slots: sharp attention must not make them look narrower than they are.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400 * 12, 1, 16, generator=generator, dtype=torch.float64)
    attention = hard_attention(torch.randint(6, (400 * 12,), generator=generator), 6)
    groups = ClassGroups.from_labels(torch.arange(400).repeat_interleave(12), 400)
    # A threshold so far above that the logarithm is the variance's linear function.
    penalty = slot_variance(
        x, attention, groups, threshold=1e4, gamma=1e4, eps_var=1e-9, hinge="identity", backend=backend
    ).rob_loss
    variance = 2e4 * math.exp(float(penalty)) - 1e4
    assert variance == pytest.approx(1.0, abs=0.02)


@both_backends
@every_hinge
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_slot_to_which_nothing_belongs_changes_nothing(backend, hinge, dtype):
    attention = random_attention(13, 2, 2)
    unused = torch.cat([attention[..., :1], torch.zeros(13, 2, 2), attention[..., 1:]], dim=2)
    want = variance_problem(LABELS, 5, T=2, attention=attention, hinge=hinge, dtype=dtype).results(backend)
    found = variance_problem(LABELS, 5, T=2, attention=unused, hinge=hinge, dtype=dtype).results(backend)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_same(found, want, tolerance=1e-12 if dtype == torch.float64 else 1e-5)


@both_backends
def test_a_slot_to_which_nothing_of_one_class_belongs_is_a_slot_of_the_others(backend):
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    attention = torch.cat([hard_attention([0, 0, 0], 2), random_attention(3, 1, 2)])
    problem = variance_problem(labels, 2, attention=attention)
    x = problem.leaves["features"]
    found = problem.results(backend)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_values_by_loops(problem.run(backend, x), x, attention, labels, 2)


@both_backends
@pytest.mark.parametrize("weight", [1e-20, 1e-37, 1e-40, 1e-45])
def test_a_slot_to_which_next_to_nothing_belongs_stays_finite(backend, weight):
    attention = torch.cat([torch.ones(13, 1, 1), torch.full((13, 1, 1), weight)], dim=2)
    want = variance_problem(LABELS, 5, attention=torch.ones(13, 1, 1), dtype=torch.float32, hinge="identity")
    found = variance_problem(LABELS, 5, attention=attention, dtype=torch.float32, hinge="identity")
    assert_same(found.results(backend), want.results(backend), tolerance=1e-5)


@both_backends
def test_a_slot_to_which_nothing_belongs_changes_nothing_of_features_whose_square_overflows(backend):
    x = 1e20 + 1e18 * torch.randn(6, 1, 3, generator=torch.Generator().manual_seed(0))
    groups = ClassGroups.from_labels(torch.zeros(6, dtype=torch.long), 1)
    want = class_variance(x, groups, threshold=1.0, backend=backend)
    assert want.rob_loss.isfinite()
    found = slot_variance(x, hard_attention([0] * 6, 2, torch.float32), groups, threshold=1.0, backend=backend)
    torch.testing.assert_close(found.rob_loss, want.rob_loss, rtol=1e-4, atol=0)


@both_backends
def test_classes_of_several_sizes_may_have_features_whose_square_overflows(backend):
    x = 1e20 + 1e18 * torch.randn(6, 1, 3, generator=torch.Generator().manual_seed(0))
    groups = ClassGroups.from_labels(torch.tensor([0, 0, 0, 0, 1, 1]), 2)
    want = class_variance(x, groups, threshold=1.0, backend=backend)
    assert want.rob_loss.isfinite()
    found = slot_variance(x, torch.full((6, 1, 2), 0.5), groups, threshold=1.0, backend=backend)
    torch.testing.assert_close(found.class_penalty, want.class_penalty, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------------------ gradients


@both_backends
def test_no_gradient_reaches_the_attention(backend):
    logits = torch.randn(13, 2, 3, requires_grad=True)
    features = torch.randn(13, 2, 4, requires_grad=True)
    groups = ClassGroups.from_labels(LABELS, 5)
    result = slot_variance(features, torch.softmax(logits, dim=2), groups, backend=backend, **OPTIONS)
    found = torch.autograd.grad(result.rob_loss + result.intra_mse, [features, logits], allow_unused=True)
    assert found[0].abs().max() > 0
    assert found[1] is None
    frozen = slot_variance(features.detach(), torch.softmax(logits, dim=2), groups, backend=backend, **OPTIONS)
    assert not any(tensor.requires_grad for tensor in frozen)


@both_backends
@pytest.mark.parametrize("sharpness", [0.0, 3.0])
@pytest.mark.parametrize("of", [0, 1], ids=["rob_loss", "intra_mse"])
def test_gradients_of_a_class_do_not_move_its_centroids(backend, sharpness, of):
    attention = random_attention(13, 2, 3, sharpness=sharpness)
    problem = variance_problem(LABELS, 5, T=2, attention=attention)
    features = problem.leaves["features"].requires_grad_()
    (gradient,) = torch.autograd.grad(problem.run(backend, features)[of], features)
    for c in (1, 3):
        total = gradient[c == LABELS].sum(dim=0)
        assert gradient[c == LABELS].abs().max() > 1e-3
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)


@both_backends
def test_moving_a_class_changes_nothing(backend):
    problem = variance_problem(LABELS, 5, T=2)
    moved = problem.leaves["features"] + torch.arange(5.0).double()[LABELS][:, None, None]
    assert_same(problem.results(backend, features=moved), problem.results(backend), tolerance=1e-10)


# ------------------------------------------------------------------------------------------------- what is not finite


@both_backends
@every_hinge
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_sample_alone_in_its_class_leaves_the_others_alone(backend, hinge, bad):
    labels = torch.tensor([0, 0, 4, 2, 2, 0])
    attention = random_attention(6, 2, 3)
    problem = variance_problem(labels, 5, T=2, attention=attention, hinge=hinge)
    want = problem.results(backend)
    assert torch.equal(want["gradient of features"][2], torch.zeros(2, 6, dtype=torch.float64))
    features = problem.leaves["features"].clone()
    features[2] = bad
    found = problem.results(backend, features=features)
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name


@both_backends
def test_attention_of_a_sample_alone_in_its_class_may_be_nan(backend):
    labels = torch.tensor([0, 0, 4, 2, 2, 0])
    attention = random_attention(6, 2, 3)
    want = variance_problem(labels, 5, T=2, attention=attention).results(backend)
    attention[2] = math.nan
    found = variance_problem(labels, 5, T=2, attention=attention).results(backend)
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name


@both_backends
def test_classes_below_the_minimum_may_be_infinite(backend):
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    problem = variance_problem(labels, 2, min_samples=4)
    want = problem.results(backend)
    features = problem.leaves["features"].clone()
    features[labels == 0] = math.inf
    found = problem.results(backend, features=features)
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name


@both_backends
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_sample_that_is_not_finite_stays_in_its_class(backend, bad):
    labels = torch.tensor([0, 1, 0, 3, 1, 3, 3])
    problem = variance_problem(labels, 5, hinge="identity")
    features = problem.leaves["features"].clone()
    features[1] = bad
    plain, broken = problem.results(backend), problem.results(backend, features=features)
    others = torch.tensor([0, 2, 3, 4])  # classes 2 and 4 are empty, and promised to be zero
    assert torch.equal(broken["output 2"][others], plain["output 2"][others])
    assert torch.equal(broken["output 3"][others], plain["output 3"][others])
    gradient = "gradient of features"
    assert torch.equal(broken[gradient][labels != 1], plain[gradient][labels != 1])


# -------------------------------------------------------------------------------------------------------- few digits


def far_from_zero(num_samples, mean, uniform, backend, seed=0):
    """``intra_mse`` and ``rob_loss`` of a tight class far from zero, over what they should be."""
    generator = torch.Generator().manual_seed(seed)
    features = (torch.randn(num_samples, 1, 4, generator=generator) * 0.5 + mean).float()
    logits = torch.randn(num_samples, 1, 3, generator=generator)
    attention = torch.softmax(0 * logits if uniform else logits, dim=2)
    groups = ClassGroups.from_labels(torch.zeros(num_samples, dtype=torch.long), 1)
    exact = slot_variance(features.double(), attention.double(), groups, threshold=1e-3, backend="reference")
    found = slot_variance(features, attention, groups, threshold=1e-3, backend=backend)
    return float(found.intra_mse / exact.intra_mse), float(found.rob_loss / exact.rob_loss)


every_attention = pytest.mark.parametrize("uniform", [False, True], ids=["slots", "uniform"])


@both_backends
@every_attention
def test_variance_survives_a_mean_ten_thousand_times_its_spread(backend, uniform):
    mse, penalty = far_from_zero(64, 1e4, uniform, backend)
    assert mse == pytest.approx(1, rel=1e-4)
    assert penalty == pytest.approx(1, rel=1e-4)


@both_backends
def test_variance_of_many_samples_survives_a_mean_of_a_thousand(backend):
    mse, penalty = far_from_zero(4096, 1e3, False, backend)
    assert mse == pytest.approx(1, rel=1e-4)
    assert penalty == pytest.approx(1, rel=1e-4)


@both_backends
def test_variance_survives_a_mean_a_million_times_its_spread(backend):
    for seed in range(4):
        for uniform in (False, True):
            _, penalty = far_from_zero(64, 1e5, uniform, backend, seed)
            assert penalty == pytest.approx(1, rel=1e-4)  # what class variance is held to


@both_backends
@every_attention
def test_variance_of_many_samples_survives_a_mean_a_million_times_its_spread(backend, uniform):
    mse, penalty = far_from_zero(4096, 1e5, uniform, backend)
    assert mse == pytest.approx(1, rel=5e-3)
    assert penalty == pytest.approx(1, rel=5e-3)


class ProductsInTF32(TorchDispatchMode):
    """Factors of matrix products keep ten bits, as ``torch.set_float32_matmul_precision("high")`` allows a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "mv", "dot"):
            args = [self.rounded(arg) for arg in args]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_products_in_tf32_round_their_factors():
    with ProductsInTF32():
        assert float(torch.full((1, 1), 1 + 2.0**-12) @ torch.ones(1, 1)) == 1


@both_backends
@every_attention
def test_variance_does_not_lose_its_digits_to_products_in_tf32(backend, uniform):
    with ProductsInTF32():
        mse, penalty = far_from_zero(64, 1e4, uniform, backend)
    assert mse == pytest.approx(1, rel=1e-2)
    assert penalty == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_computed_in_fp32(dtype):
    problem = variance_problem(labels_with_holes(23, 7), 7, T=2, dtype=dtype)
    exact = problem.run("reference", problem.leaves["features"].double())
    for found, want in zip(problem.run("eager", **problem.leaves), exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)


@both_backends
def test_bf16_features_give_fp32_losses_and_bf16_gradients(backend):
    features = torch.randn(13, 2, 4).bfloat16().requires_grad_()
    attention = random_attention(13, 2, 3).float()  # what slot_assignments returns for them
    result = slot_variance(features, attention, ClassGroups.from_labels(LABELS, 5), backend=backend, **OPTIONS)
    assert [tensor.dtype for tensor in result] == [torch.float32] * 4
    (result.rob_loss + result.intra_mse).backward()
    assert features.grad.dtype == torch.bfloat16
    assert features.grad.abs().max() > 0


@both_backends
def test_fp64_features_give_fp64_losses(backend):
    problem = variance_problem(LABELS, 5)
    assert [tensor.dtype for tensor in problem.run(backend, **problem.leaves)] == [torch.float64] * 4


@both_backends
def test_autocast_changes_nothing(backend):
    problem = variance_problem(labels_with_holes(64, 7), 7, T=2, dtype=torch.float32)
    want = problem.results(backend)
    found = problem.results(backend, forward_under=torch.autocast("cpu", dtype=torch.bfloat16))
    for name in want:
        assert torch.equal(found[name], want[name]), name


# ---------------------------------------------------------------------------------------------- threshold and hosts


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_may_be_a_tensor_that_changes_in_place(backend, dtype):
    groups, attention = ClassGroups.from_labels(LABELS, 5), random_attention(13, 2, 3)
    features, threshold = random_features(13, 2, 4), torch.tensor(0.05, dtype=dtype)
    want = slot_variance(features, attention, groups, threshold=0.25, backend=backend)
    threshold.fill_(0.25)
    found = slot_variance(features, attention, groups, threshold=threshold, backend=backend)
    torch.testing.assert_close(tuple(found), tuple(want), rtol=1e-12, atol=0)


@pytest.mark.parametrize("threshold", [0.05, "tensor"])
@every_hinge
def test_a_static_bound_needs_no_host_sync(threshold, hinge, monkeypatch):
    # Fake tensors have shapes and no values: whatever reads a value, or makes a shape depend on one, raises.
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    with FakeTensorMode():
        threshold = torch.tensor(0.05) if threshold == "tensor" else threshold
        problem = variance_problem(torch.zeros(23, dtype=torch.long), 7, bound=20, hinge=hinge, threshold=threshold)
        results = problem.results("eager")
    assert results["output 2"].shape == (7,)
    assert results["gradient of features"].shape == (23, 1, 6)


def test_eager_compiles_whole():
    torch.compiler.reset()
    features, attention = random_features(13, 2, 4), random_attention(13, 2, 3)

    def losses(features, attention, labels):
        groups = ClassGroups.from_labels(labels, 5, max_class_size=10)
        return tuple(slot_variance(features, attention, groups, backend="eager", **OPTIONS))

    compiled = torch.compile(losses, fullgraph=True, backend="eager")
    for labels in (LABELS, LABELS.flip(0)):
        found = Problem({"features": features}, lambda _, features: compiled(features, attention, labels))  # noqa: B023
        plain = Problem({"features": features}, lambda _, features: losses(features, attention, labels))  # noqa: B023
        assert_same(found.results("eager"), plain.results("eager"), tolerance=1e-12)


def test_the_same_call_twice_gives_the_same_bits():
    problem = variance_problem(labels_with_holes(23, 7), 7, T=2, dtype=torch.float32)
    first, second = problem.results("eager"), problem.results("eager")
    for name in first:
        assert torch.equal(first[name], second[name]), name


@both_backends
def test_layout_of_any_input_changes_nothing(backend):
    groups = ClassGroups.from_labels(LABELS, 5)
    inputs = [random_features(13, 3, 4), random_attention(13, 3, 2)]
    want = slot_variance(*inputs, groups, backend=backend, **OPTIONS)
    for place in range(2):
        transposed = list(inputs)
        transposed[place] = inputs[place].mT.contiguous().mT
        assert not transposed[place].is_contiguous()
        found = slot_variance(*transposed, groups, backend=backend, **OPTIONS)
        torch.testing.assert_close(tuple(found), tuple(want), rtol=1e-13, atol=1e-13)


# --------------------------------------------------------------------------------------------------------- refusals

FEATURES, ATTENTION = torch.randn(4, 2, 8), torch.full((4, 2, 3), 1 / 3)
GROUPS = ClassGroups.from_labels(torch.tensor([0, 1, 1, 2]), 3)


def variance(features=FEATURES, attention=ATTENTION, groups=GROUPS, **kwargs):
    return slot_variance(features, attention, groups, **{"threshold": 0.1, **kwargs})


BAD_VALUES = [
    ({"features": FEATURES[:, 0]}, r"features must have shape \[B=4, T>0, D>0\], got \[4, 8\]"),
    ({"features": FEATURES[:3]}, r"features must have shape \[B=4, T>0, D>0\], got \[3, 2, 8\]"),
    ({"features": FEATURES[:, :0]}, r"features must have shape \[B=4, T>0, D>0\], got \[4, 0, 8\]"),
    ({"features": FEATURES[..., :0]}, r"features must have shape \[B=4, T>0, D>0\], got \[4, 2, 0\]"),
    ({"features": FEATURES[..., None]}, r"features must have shape \[B=4, T>0, D>0\], got \[4, 2, 8, 1\]"),
    ({"attention": ATTENTION[:, 0]}, r"attention must have shape \[B=4, T=2, S>0\], got \[4, 3\]"),
    ({"attention": ATTENTION[:3]}, r"attention must have shape \[B=4, T=2, S>0\], got \[3, 2, 3\]"),
    ({"attention": ATTENTION[:, :1]}, r"attention must have shape \[B=4, T=2, S>0\], got \[4, 1, 3\]"),
    ({"attention": ATTENTION[..., :0]}, r"attention must have shape \[B=4, T=2, S>0\], got \[4, 2, 0\]"),
    ({"attention": ATTENTION.to("meta")}, "attention must be on the tokens' device cpu, got meta"),
    ({"features": FEATURES.to("meta")}, "attention must be on the tokens' device meta, got cpu"),
    (
        {"features": FEATURES.to("meta"), "attention": ATTENTION.to("meta")},
        "groups must be on the tokens' device meta, got cpu",
    ),
    ({"threshold": 0.0}, "threshold must be finite and positive, got 0.0"),
    ({"threshold": -1.0}, "threshold must be finite and positive, got -1.0"),
    ({"threshold": math.nan}, "threshold must be finite and positive, got nan"),
    ({"threshold": math.inf}, "threshold must be finite and positive, got inf"),
    ({"threshold": torch.ones(2)}, r"threshold must have shape \[\], got \[2\]"),
    ({"eps_var": 0.0}, "eps_var must be finite and positive, got 0.0"),
    ({"eps_var": -1.0}, "eps_var must be finite and positive, got -1.0"),
    ({"gamma": math.inf}, "gamma must be finite and positive, got inf"),
    ({"gamma": 0.0}, "gamma must be finite and positive, got 0.0"),
    ({"min_samples": 1}, "min_samples must be at least 2, got 1"),
    ({"hinge": "elu"}, "hinge must be one of relu, softplus, identity, got 'elu'"),
    ({"backend": "cuda"}, "backend must be one of auto, triton, eager, reference, got 'cuda'"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD_VALUES, ids=[m for _, m in BAD_VALUES])
def test_bad_value_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        variance(**kwargs)


BAD_TYPES = [
    ({"features": FEATURES.int()}, "features must be a floating-point tensor, got torch.int32"),
    ({"features": FEATURES.to(torch.complex64)}, "features must be a floating-point tensor, got torch.complex64"),
    ({"features": None}, "features must be a floating-point tensor, got NoneType"),
    ({"attention": ATTENTION.bool()}, "attention must be a floating-point tensor, got torch.bool"),
    ({"attention": [[0.5]]}, "attention must be a floating-point tensor, got list"),
    ({"attention": ATTENTION.double()}, "attention is torch.float64 but the tokens are torch.float32"),
    ({"features": FEATURES.double()}, "attention is torch.float32 but the tokens are torch.float64"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD_TYPES, ids=[m for _, m in BAD_TYPES])
def test_bad_type_is_refused(kwargs, message):
    with pytest.raises(TypeError, match=message):
        variance(**kwargs)


@pytest.mark.parametrize("name", ["features", "attention"])
def test_debug_mode_refuses_what_is_not_finite(name):
    bad = {"features": FEATURES.clone(), "attention": ATTENTION.clone()}
    bad[name][0, 0, 0] = math.nan
    set_debug(True)
    try:
        with pytest.raises(ValueError, match=f"{name} must be finite, got NaN or infinity"):
            variance(**bad)
    finally:
        set_debug(False)


def test_kernels_that_do_not_exist_are_refused_by_name():
    assert "triton" not in IMPLEMENTATIONS
    with pytest.raises(BackendUnavailableError, match="slot_variance has no 'triton' backend"):
        variance(backend="triton")


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_the_backend_asked_for_is_the_one_that_runs(backend, monkeypatch):
    ran = []
    for name, implementation in list(IMPLEMENTATIONS.items()):
        monkeypatch.setitem(IMPLEMENTATIONS, name, lambda *args, n=name, of=implementation: ran.append(n) or of(*args))
    variance(backend=backend)
    variance()
    assert ran == [backend, "eager"]


# -------------------------------------------------------------------------------------------------- slot_assignments


def assignment_problem(labels, num_classes, *, T=2, D=6, S=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    groups = ClassGroups.from_labels(labels, num_classes)
    leaves = {
        "tokens": torch.randn(len(labels), T, D, generator=generator, dtype=torch.float64).to(dtype),
        "slots": torch.randn(num_classes, S, D, generator=generator, dtype=torch.float64).to(dtype),
        **random_slot_weights(D, generator, dtype)._asdict(),
    }
    leaves = {name: leaf.to(labels.device) for name, leaf in leaves.items()}

    def run(_, tokens, slots, **weights):
        return (slot_assignments(tokens, slots, groups, SlotAttentionWeights(**weights)),)

    return Problem(leaves, run)


def assigned(problem, **replaced):
    return problem.run(None, **(problem.leaves | replaced))[0]


def unabsorbed(labels, tokens, slots, weights):
    """Softmax over the slots of a token's class of ``k·q / D^1/4``, one token at a time."""

    def normalised(row, scale, shift):
        centred = row - row.mean()
        return centred / torch.sqrt(centred.square().mean() + 1e-5) * scale + shift

    B, T, D = tokens.shape
    w = weights
    result = tokens.new_zeros(B, T, slots.shape[1])
    for n in range(B):
        queries = [
            w.to_q @ normalised(slot, w.norm_slots_weight, w.norm_slots_bias) * D**-0.5 for slot in slots[labels[n]]
        ]
        for t in range(T):
            key = w.to_k @ normalised(tokens[n, t], w.norm_inputs_weight, w.norm_inputs_bias)
            weight = torch.stack([key @ query / D**0.25 for query in queries]).exp()
            result[n, t] = weight / weight.sum()
    return result


@every_labelling
@pytest.mark.parametrize("sizes", [{}, {"T": 1, "D": 5, "S": 1}, {"T": 3, "D": 1, "S": 4}])
def test_assignments_are_the_attention_of_unabsorbed_projections(labels, num_classes, sizes):
    problem = assignment_problem(labels, num_classes, **sizes)
    leaves = dict(problem.leaves)
    tokens, slots = leaves.pop("tokens"), leaves.pop("slots")
    want = unabsorbed(labels, tokens, slots, SlotAttentionWeights(**leaves))
    torch.testing.assert_close(assigned(problem), want, rtol=1e-10, atol=1e-12)


@given(
    labels=st.lists(st.integers(0, 4), max_size=12),
    sizes=st.fixed_dictionaries({"T": st.integers(1, 3), "D": st.integers(1, 9), "S": st.integers(1, 5)}),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_assignments_of_a_token_sum_to_one(labels, sizes, seed):
    found = assigned(assignment_problem(torch.tensor(labels, dtype=torch.long), 5, seed=seed, **sizes))
    assert found.shape == (len(labels), sizes["T"], sizes["S"])
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(dim=2), torch.ones_like(found[..., 0]), rtol=0, atol=1e-12)


def test_assignments_are_the_attention_that_slot_attention_averages_with():
    """One iteration with the GRU made to hand on its input's sign: the mean of a slot is that of its assignments."""
    labels, D = torch.zeros(9, dtype=torch.long), 6
    problem = assignment_problem(labels, 1, D=D)
    zero = {name: torch.zeros_like(leaf) for name, leaf in problem.leaves.items() if name.startswith(("gru", "mlp"))}
    # The reset gate does not matter, the update gate is shut, and the new state is tanh of a small update.
    zero["gru_weight_ih"][2 * D :] = 1e-4 * torch.eye(D, dtype=torch.float64)
    zero["gru_bias_ih"][D : 2 * D] = -100
    leaves = problem.leaves | zero
    p = assigned(problem, **zero).flatten(0, 1)
    tokens, slots = leaves.pop("tokens"), leaves.pop("slots")
    w = SlotAttentionWeights(**leaves)
    values = torch.nn.functional.layer_norm(tokens, (D,), w.norm_inputs_weight, w.norm_inputs_bias) @ w.to_v.T
    groups = ClassGroups.from_labels(labels, 1)
    found = slot_attention(tokens, slots, groups, w, num_iterations=1, eps=1e-30, backend="reference")
    want = (p / p.sum(dim=0)).T @ values.flatten(0, 1)
    torch.testing.assert_close(found[0] / 1e-4, want, rtol=1e-5, atol=1e-6)


def test_a_sample_looks_at_the_slots_of_its_own_class_only():
    problem = assignment_problem(LABELS, 5)
    want, slots = assigned(problem), problem.leaves["slots"].clone()
    slots[[0, 1, 2, 4]] = math.nan
    found = assigned(problem, slots=slots)
    assert torch.equal(found[LABELS == 3], want[LABELS == 3])
    assert found[LABELS == 1].isnan().all()


def test_slots_of_other_classes_get_no_gradient():
    problem = assignment_problem(LABELS, 5)
    slots = problem.leaves["slots"].requires_grad_()
    (gradient,) = torch.autograd.grad(assigned(problem, slots=slots)[LABELS == 3].square().sum(), slots)
    assert gradient[3].abs().max() > 0
    assert torch.equal(gradient[[0, 1, 2, 4]], torch.zeros_like(gradient[[0, 1, 2, 4]]))


def test_a_token_that_is_not_finite_leaves_the_assignments_of_others_alone():
    problem = assignment_problem(LABELS, 5)
    want, tokens = assigned(problem), problem.leaves["tokens"].clone()
    tokens[4, 1] = math.nan
    found = assigned(problem, tokens=tokens)
    others = torch.ones(13, 2, dtype=torch.bool)
    others[4, 1] = False
    assert torch.equal(found[others], want[others])


def test_permuting_the_samples_permutes_their_assignments():
    shuffle = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    plain, shuffled = assignment_problem(LABELS, 5), assignment_problem(LABELS[shuffle], 5)
    found = assigned(shuffled, tokens=plain.leaves["tokens"][shuffle])
    torch.testing.assert_close(found, assigned(plain)[shuffle], rtol=1e-12, atol=1e-12)


def test_permuting_the_slots_permutes_assignments_to_them():
    problem = assignment_problem(LABELS, 5)
    found = assigned(problem, slots=problem.leaves["slots"][:, [2, 0, 1]])
    torch.testing.assert_close(found, assigned(problem)[..., [2, 0, 1]], rtol=1e-12, atol=1e-12)


def test_gradcheck_of_assignments():
    problem = assignment_problem(torch.tensor([0, 2, 2, 0]), 4, D=4)
    # One of the keys' or the queries' weights alone would not show which of them is passed on.
    names = [name for name in problem.leaves if not name.startswith(("gru", "mlp", "norm_mlp", "to_v"))]
    leaves = [problem.leaves[name].requires_grad_() for name in names]
    assert len(names) == 8

    def call(*leaves):
        return assigned(problem, **dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_assignments_of_narrow_tokens_are_computed_in_fp32(dtype):
    problem = assignment_problem(LABELS, 5, dtype=dtype)
    want = assigned(problem, **{name: leaf.double() for name, leaf in problem.leaves.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = assigned(problem)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5)


def test_narrow_tokens_take_the_slots_that_slot_attention_has_returned():
    problem = assignment_problem(LABELS, 5, dtype=torch.bfloat16)
    leaves = dict(problem.leaves)
    tokens, slots = leaves.pop("tokens"), leaves.pop("slots")
    weights, groups = SlotAttentionWeights(**leaves), ClassGroups.from_labels(LABELS, 5)
    final = slot_attention(tokens, slots, groups, weights)
    assert final.dtype == torch.float32
    p = slot_assignments(tokens, final, groups, weights)
    torch.testing.assert_close(p.sum(dim=2), torch.ones(13, 2))
    assert slot_variance(tokens, p, groups, **OPTIONS).rob_loss.isfinite()


def test_assignments_stay_finite_for_extreme_tokens():
    problem = assignment_problem(LABELS, 5, dtype=torch.float32)
    assert assigned(problem, tokens=problem.leaves["tokens"] * 1e18).isfinite().all()


def test_assignments_need_no_host_sync(monkeypatch):
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    with FakeTensorMode():
        problem = assignment_problem(torch.zeros(23, dtype=torch.long), 7)
        assert problem.results(None)["output 0"].shape == (23, 2, 3)


def test_assignments_compile_whole():
    torch.compiler.reset()
    problem = assignment_problem(LABELS, 5)
    compiled = torch.compile(problem.run, fullgraph=True, backend="eager")
    (found,) = compiled(None, **problem.leaves)
    torch.testing.assert_close(found, assigned(problem), rtol=1e-12, atol=1e-12)


TOKENS, SLOTS = torch.randn(4, 2, 8), torch.randn(3, 5, 8)
WEIGHTS = random_slot_weights(8, torch.Generator().manual_seed(0), torch.float32)


def assignments(tokens=TOKENS, slots=SLOTS, weights=WEIGHTS):
    return slot_assignments(tokens, slots, GROUPS, weights)


BAD_ASSIGNMENTS = [
    ({"tokens": TOKENS[:, 0]}, ValueError, r"tokens must have shape \[B=4, T>0, D>0\], got \[4, 8\]"),
    ({"tokens": TOKENS[:3]}, ValueError, r"tokens must have shape \[B=4, T>0, D>0\], got \[3, 2, 8\]"),
    ({"tokens": TOKENS[:, :0]}, ValueError, r"tokens must have shape \[B=4, T>0, D>0\], got \[4, 0, 8\]"),
    ({"tokens": TOKENS[..., :4], "slots": SLOTS[..., :4]}, ValueError, r"weights.to_q must have shape \[D=4, D'=4\]"),
    ({"slots": SLOTS[:2]}, ValueError, r"slots must have shape \[K=3, S>0, D=8\], got \[2, 5, 8\]"),
    ({"slots": SLOTS[:, :0]}, ValueError, r"slots must have shape \[K=3, S>0, D=8\], got \[3, 0, 8\]"),
    ({"slots": SLOTS[..., :4]}, ValueError, r"slots must have shape \[K=3, S>0, D=8\], got \[3, 5, 4\]"),
    ({"slots": SLOTS.to("meta")}, ValueError, "slots must be on the tokens' device cpu, got meta"),
    ({"weights": WEIGHTS._replace(to_k=torch.randn(8, 4))}, ValueError, r"weights.to_k must have shape \[8, 8\]"),
    ({"weights": WEIGHTS._replace(to_q=torch.randn(4, 4))}, ValueError, r"weights.to_q must have shape \[D=8, D'=8\]"),
    ({"weights": WEIGHTS._replace(norm_slots_bias=torch.ones(7))}, ValueError, r"norm_slots_bias .* \[8\], got \[7\]"),
    ({"tokens": TOKENS.long()}, TypeError, "tokens must be a floating-point tensor, got torch.int64"),
    ({"tokens": None}, TypeError, "tokens must be a floating-point tensor, got NoneType"),
    ({"slots": SLOTS.long()}, TypeError, "slots must be a floating-point tensor, got torch.int64"),
    ({"slots": SLOTS.double()}, TypeError, "slots is torch.float64 but the tokens are torch.float32"),
    ({"tokens": TOKENS.double()}, TypeError, "weights.to_q is torch.float32 but the tokens are torch.float64"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD_ASSIGNMENTS, ids=[m for _, _, m in BAD_ASSIGNMENTS])
def test_bad_argument_of_assignments_is_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        assignments(**kwargs)


# ----------------------------------------------------------------------------------------------------------- labels


@given(st.lists(st.integers(0, 6), max_size=30), st.sampled_from([torch.int16, torch.uint8, torch.int64]))
@settings(max_examples=40, deadline=None)
def test_labels_of_groups_are_those_they_were_made_from(labels, dtype):
    labels = torch.tensor(labels, dtype=dtype)
    found = ClassGroups.from_labels(labels, 7).labels
    assert found.dtype == torch.int64
    assert torch.equal(found, labels.long())


def test_labels_of_groups_read_no_value_on_the_host():
    groups = ClassGroups.from_labels(torch.zeros(5, dtype=torch.long, device="meta"), 4)
    assert groups.labels.shape == (5,)
