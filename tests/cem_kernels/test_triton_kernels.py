"""Class variance and cross attention in Triton against the reference in fp64: on a CUDA device compiled, elsewhere in
Triton's interpreter."""

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
from problems import PENALTIES, Problem, cross_problem, labels_with_holes, variance_problem

from cem_kernels import ClassGroups, CrossAttentionWeights, LogHinge, Nats
from cem_kernels.cross_attention import triton as cross_attention_kernels
from cem_kernels.cross_attention.reference import cross_attention as reference_cross_attention
from cem_kernels.variance import class_variance

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

SEEDS = range(4)


def read_in_own_precision(labels: torch.Tensor, num_classes: int, **sizes: int) -> tuple[Problem, Problem]:
    """Cross attention, and its reference with every operand and result in the dtype of the leaves."""
    problem = cross_problem(labels, num_classes, **sizes)
    groups = ClassGroups.from_labels(labels, num_classes)

    def run(backend, tokens, slots, **weights):
        weights = CrossAttentionWeights(**weights)
        return (reference_cross_attention(tokens, slots, groups, weights, sizes["H"], 0.0).float(),)

    return problem, Problem(problem.leaves, run)


@every_labeling
@pytest.mark.parametrize("tokens_per_sample", [1, 3])
def test_class_variance_is_as_exact_as_the_reference(labels, num_classes, tokens_per_sample):
    assert_as_exact(variance_problem(labels, num_classes, T=tokens_per_sample, D=12))


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_class_variance_is_as_exact_for_every_penalty_and_dtype(penalty, dtype):
    assert_as_exact(*(variance_problem(HOLES, 7, T=5, D=37, penalty=penalty, seed=s) for s in SEEDS), dtype=dtype)


def test_class_variance_is_exact_where_a_class_is_split_over_programs():
    labels = torch.cat([torch.zeros(700, dtype=torch.long), torch.ones(90, dtype=torch.long)]).to(DEVICE)
    assert_as_exact(variance_problem(labels, 3, D=24))


@interpreted
def test_the_order_in_which_programs_arrive_changes_no_bit_of_a_variance(monkeypatch):
    labels = torch.arange(700, device=DEVICE) % 3
    problem = variance_problem(labels, 4, D=200)
    leaves = {name: leaf.float() for name, leaf in problem.leaves.items()}
    forwards = problem.results("triton", **leaves)
    last_program_first(monkeypatch)
    backwards = problem.results("triton", **leaves)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def test_class_variance_is_exact_over_several_blocks_of_columns():
    assert_as_exact(variance_problem(HOLES, 7, T=3, D=300))


@pytest.mark.parametrize("samples", [6, 400])
def test_variance_of_tight_classes_far_from_zero_keeps_its_digits(samples):
    """E[x²] − E[x]² would leave nothing here, and a mean rounded to fp32 not much of the gradient."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(samples) % 2).to(DEVICE)
    features = (1000 + 0.01 * torch.randn(samples, 20, generator=generator, dtype=torch.float64)).float().to(DEVICE)
    groups = ClassGroups.from_labels(labels, 2)

    def run(backend, features):
        return tuple(class_variance(features, groups, LogHinge(1e-6, floor=1e-8), backend=backend))

    assert_as_exact(Problem({"features": features.double()}, run))


def test_what_does_not_count_may_be_infinite():
    labels = torch.tensor([0, 0, 0, 1], device=DEVICE)
    features = torch.randn(4, 16, device=DEVICE)
    features[3] = float("inf")
    features.requires_grad_()
    result = class_variance(features, ClassGroups.from_labels(labels, 2), Nats(0.1), backend="triton")
    result.rob_loss.backward()
    assert result.rob_loss.isfinite()
    assert torch.equal(features.grad[3], torch.zeros(16, device=DEVICE))
    assert features.grad[:3].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of inf − inf
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad, penalty):
    features = torch.randn(4, 16, device=DEVICE)
    features[0, 3] = bad
    groups = ClassGroups.from_labels(torch.tensor([0, 0, 1, 1], device=DEVICE), 2)
    result = class_variance(features, groups, penalty, backend="triton")
    assert result.class_penalty.isfinite().tolist() == [False, True]
    assert not result.rob_loss.isfinite()


def test_threshold_may_be_a_tensor():
    features, groups = torch.randn(23, 16, device=DEVICE), ClassGroups.from_labels(HOLES, 7)
    number = class_variance(features, groups, LogHinge(0.25), backend="triton")
    tensor = class_variance(features, groups, LogHinge(torch.tensor(0.25)), backend="triton")
    assert torch.equal(number.class_penalty, tensor.class_penalty)


@settings(max_examples=20, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), max_size=40),
    T=st.integers(1, 3),
    D=st.integers(1, 40),
    min_samples=st.integers(2, 4),
)
def test_class_variance_is_as_exact_for_any_labels(labels, T, D, min_samples):
    labels = torch.tensor(labels, dtype=torch.long, device=DEVICE)
    assert_close_to_exact(variance_problem(labels, 7, T=T, D=D, min_samples=min_samples))


@every_labeling
@pytest.mark.parametrize("tokens_per_sample", [1, 3])
def test_cross_attention_is_as_exact_as_the_reference(labels, num_classes, tokens_per_sample):
    assert_as_exact(*(cross_problem(labels, num_classes, T=tokens_per_sample, D=16, S=4, H=2, seed=s) for s in SEEDS))


@pytest.mark.parametrize(
    ("D", "H", "S"),
    [(16, 1, 1), (48, 3, 5), (64, 2, 17), (128, 4, 8), (200, 5, 7), (96, 16, 3), (64, 16, 32), (512, 2, 2)],
)
def test_cross_attention_is_as_exact_for_every_supported_size(D, H, S):
    assert_as_exact(cross_problem(labels_with_holes(9, 5).to(DEVICE), 5, T=2, D=D, H=H, S=S))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "H", "S"), [(32, 2, 4), (40, 5, 3), (32, 8, 16)])
def test_cross_attention_is_as_exact_in_half_precision(dtype, D, H, S):
    problems, own = zip(*(read_in_own_precision(HOLES, 7, T=3, D=D, H=H, S=S, seed=s) for s in SEEDS), strict=True)
    assert_as_exact(*problems, dtype=dtype, own_precision=own)


def test_cross_attention_is_exact_where_a_program_has_several_tiles(monkeypatch):
    monkeypatch.setattr(cross_attention_kernels, "FORWARD_PROGRAMS", 0)
    monkeypatch.setattr(cross_attention_kernels, "BACKWARD_PROGRAMS", 0)
    assert_as_exact(cross_problem(HOLES % 2, 2, T=20, D=32, H=4, S=8))


def test_feed_forward_in_several_chunks_is_as_exact(monkeypatch):
    monkeypatch.setattr(cross_attention_kernels, "CHUNK", 10)
    assert_as_exact(cross_problem(HOLES, 7, T=3, D=32, H=4, S=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_tokens_is_saved_but_the_tokens(dtype):
    problem = cross_problem(HOLES, 7, T=50, D=32, H=4, S=8)
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in problem.leaves.items()}
    large = {}

    def keep(tensor):
        if tensor.numel() >= leaves["tokens"].numel():
            large[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (output,) = problem.run("triton", **leaves)
    assert list(large) == [leaves["tokens"].untyped_storage().data_ptr()]
    assert output.requires_grad


@settings(max_examples=10, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), max_size=40),
    T=st.integers(1, 4),
    width=st.integers(8, 12),
    heads=st.integers(2, 3),
    S=st.integers(1, 6),
)
def test_cross_attention_is_as_exact_for_any_labels(labels, T, width, heads, S):
    labels = torch.tensor(labels, dtype=torch.long, device=DEVICE)
    assert_close_to_exact(cross_problem(labels, 5, T=T, D=heads * width, H=heads, S=S))
