"""Variance inside slots of uniform, hard or no attention, and of numbers that are infinite or have few digits."""

import math

import pytest
import torch
from exactness import every_labeling
from problems import Problem, assert_same, labels_with_holes
from slot_variance_problems import (
    LABELS,
    OPTIONS,
    assert_values_by_loops,
    both_backends,
    every_hinge,
    random_attention,
    random_features,
    variance_problem,
)
from torch.utils._python_dispatch import TorchDispatchMode

from cem_kernels import ClassGroups, class_variance, slot_variance


def hard_attention(choices, num_slots, dtype=torch.float64):
    """Each sample, at its one token, belongs to one slot only."""
    return torch.nn.functional.one_hot(torch.as_tensor(choices), num_slots)[:, None].to(dtype)


# --------------------------------------------------------------------------------------------- what attention may look


@both_backends
@every_labeling
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
