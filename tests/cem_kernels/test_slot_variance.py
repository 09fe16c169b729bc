"""Variance inside slots against its definition, one backend against the other, and where its gradients go."""

import math

import pytest
import torch
from exactness import every_labeling
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_same, labels_with_holes
from slot_variance_problems import (
    LABELS,
    OPTIONS,
    assert_values_by_loops,
    both_backends,
    by_loops,
    every_hinge,
    random_attention,
    random_features,
    variance_problem,
)

from cem_kernels import ClassGroups, slot_variance
from cem_kernels.class_variance import HINGES

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


@every_labeling
@pytest.mark.parametrize("tokens_per_sample", [1, 3])
@every_hinge
def test_eager_equals_reference(labels, num_classes, tokens_per_sample, hinge):
    problem = variance_problem(labels, num_classes, T=tokens_per_sample, hinge=hinge)
    assert_same(problem.results("eager"), problem.results("reference"))


@every_labeling
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
