"""Every operator in Triton against its reference in fp64, outputs and every gradient: on a CUDA device compiled,
elsewhere in Triton's interpreter. Slot attention is there twice: with one program for a class's tokens, and with tokens
split over programs."""

import itertools

import pytest
import torch
from exactness import (
    DEVICE,
    HOLES,
    LABEL_CASES,
    assert_as_exact,
    assert_close_to_exact,
    assert_same_bits,
    interpreted,
    last_program_first,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    Problem,
    centroid_problem,
    cross_problem,
    every_penalty,
    slot_problem,
    slots_problem,
    variance_problem,
)

from cem_kernels import ClassGroups, CrossAttentionWeights, LogHinge, RunningMoments, SlotAttentionWeights
from cem_kernels.cross_attention import triton as cross_kernels
from cem_kernels.cross_attention.reference import cross_attention as reference_cross_attention
from cem_kernels.slot_attention import triton as slot_kernels
from cem_kernels.slot_attention.reference import slot_attention as reference_slot_attention
from cem_kernels.slot_attention.triton import tokens_are_split
from cem_kernels.variance import centroid_variance, class_variance

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

TWO = HOLES % 2
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OPERATORS = {
    "class_variance": (variance_problem, {"D": 12}),
    "centroid_variance": (centroid_problem, {"D": 12}),
    "slot_variance": (slots_problem, {"D": 12}),
    "cross_attention": (cross_problem, {"D": 16, "S": 3}),
    "slot_attention": (slot_problem, {"D": 16}),  # a third iteration would magnify rounding so much that luck decides
    "slot_attention, split": (slot_problem, {"D": 16}),
}


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def tokens_split_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of slot attention are split over programs where the test's parameters say so."""
    split = hasattr(request.node, "callspec") and "split" in request.node.callspec.id
    monkeypatch.setattr(slot_kernels, "tokens_are_split", lambda x, groups: split)


def in_first_tier(operator: str, labeling: str, T: int) -> bool:
    few = "slot_attention" not in operator or labeling in ("one class", "no sample", "more classes than samples")
    return T == 3 and ("holes" in labeling or (few and "split" not in operator))


LABELINGS = [
    case if in_first_tier(*case) else slow(*case) for case in itertools.product(OPERATORS, LABEL_CASES, (1, 3))
]


@pytest.mark.parametrize(("operator", "labeling", "T"), LABELINGS)
def test_as_exact_as_the_reference(operator, labeling, T):
    (make, sizes), (labels, num_classes) = OPERATORS[operator], LABEL_CASES[labeling]
    seeds = range(2 if "cross" in operator else 1)
    assert_as_exact(*(make(labels, num_classes, T=T, **sizes, seed=seed) for seed in seeds))


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_as_exact_for_any_labels_and_sizes(operator):
    make, _ = OPERATORS[operator]
    attention = "attention" in operator
    sizes = {"T": st.integers(1, 4), "D": st.integers(8, 12) if attention else st.integers(1, 40)}
    extra = {"min_samples": st.integers(2, 4)} if make is variance_problem else {}
    extra |= {"S": st.integers(1, 6)} if attention else {}
    extra |= {"J": st.integers(1, 2)} if make is slot_problem else {}
    labels = st.lists(st.integers(0, 4), max_size=40)

    @settings(max_examples=8 if attention else 20, deadline=None)
    @given(labels=labels, sizes=st.fixed_dictionaries(sizes | extra))
    def check(labels, sizes):
        width = sizes["D"] * 2 if attention else sizes["D"]
        labels = torch.tensor(labels, dtype=torch.long, device=DEVICE)
        assert_close_to_exact(make(labels, 5, **(sizes | {"D": width})))

    check()


# variances


@every_penalty
@pytest.mark.parametrize("make", [variance_problem, centroid_problem], ids=["class_variance", "centroid_variance"])
@pytest.mark.parametrize("dtype", [BF16, slow(FP32), slow(FP16)])
def test_variances_are_as_exact_for_every_penalty_and_dtype(make, penalty, dtype):
    assert_as_exact(*(make(HOLES, 7, T=3, D=37, penalty=penalty, seed=seed) for seed in range(2)), dtype=dtype)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        *((variance_problem, {}), (centroid_problem, {})),
        *(slow(centroid_problem, {"batches": batches}) for batches in (1, 500)),
    ],
)
def test_variances_are_exact_where_a_class_is_split_and_columns_are_many(make, options):
    labels = torch.tensor([0] * 300 + [2] * 90, device=DEVICE)
    assert_as_exact(make(labels, 3, T=1, D=150, **options))
    assert_as_exact(make(TWO, 2, T=3, D=100, **options))


def tight_classes(samples: int, batches: int | None) -> Problem:
    """Two classes with a spread of a hundredth around a thousand; ``batches`` before, of running moments."""
    generator = torch.Generator().manual_seed(0)
    drawn = 1000 + 0.01 * torch.randn(samples + 2, 20, generator=generator, dtype=torch.float64)
    features, centroids = drawn.float().to(DEVICE).split((samples, 2))
    groups, penalty = ClassGroups.from_labels((torch.arange(samples) % 2).to(DEVICE), 2), LogHinge(1e-6, floor=1e-8)

    def run(backend, features):
        if batches is None:
            return tuple(class_variance(features, groups, penalty, backend=backend))
        counted = torch.full((2,), batches, device=DEVICE)
        variances = torch.full((2, 20), 1e-4, dtype=features.dtype, device=DEVICE)
        running = RunningMoments(centroids.to(features.dtype, copy=True), variances, counted, torch.zeros_like(counted))
        result = centroid_variance(features, groups, running, penalty, momentum=0.95, backend=backend)
        return result.rob_loss, result.class_penalty

    return Problem({"features": features.double()}, run)


@pytest.mark.parametrize("samples", [6, 200])
@pytest.mark.parametrize("batches", [None, 0, 500])
def test_variances_of_tight_classes_far_from_zero_keep_their_digits(samples, batches):
    """E[x²] − E[x]² would leave nothing here, and a mean rounded to fp32 not much of the gradient."""
    assert_as_exact(tight_classes(samples, batches))


ALTERNATING = torch.arange(260, device=DEVICE) % 2


@interpreted
@pytest.mark.parametrize(
    ("make", "labels", "sizes"),
    [
        (variance_problem, ALTERNATING, {"D": 150}),
        (centroid_problem, ALTERNATING, {"D": 150}),
        (slots_problem, ALTERNATING, {"D": 150}),
        (slot_problem, TWO, {"T": 4, "D": 16, "J": 1}),
    ],
    ids=["class", "centroid", "slots", "split"],
)
def test_the_order_in_which_programs_arrive_changes_no_bit(make, labels, sizes, monkeypatch):
    monkeypatch.setattr(slot_kernels, "TOKENS_OF_A_PART", 16)
    problem = make(labels, 2, **sizes).to(FP32)
    forwards = problem.results("triton")
    last_program_first(monkeypatch)
    assert_same_bits(problem.results("triton"), forwards)


# attention


def own_precision(problem: Problem, num_heads: int | None) -> Problem:
    """The same leaves of ``HOLES`` for a reference with every operand and result in their dtype."""
    groups = ClassGroups.from_labels(HOLES, 7)

    def run(backend, tokens, slots, **weights):
        if num_heads is None:
            result = reference_slot_attention(tokens, slots, groups, SlotAttentionWeights(**weights), 2, 1e-8)
        else:
            weights = CrossAttentionWeights(**weights)
            result = reference_cross_attention(tokens, slots, groups, weights, num_heads, 0.0)
        return (result.float(),)

    return Problem(problem.leaves, run)


SLOTS = [(name, {"D": 32, "S": 4}) for name in ("slot_attention", "slot_attention, split")]
READS = [("cross_attention", {"D": D, "H": H, "S": S}) for D, H, S in [(40, 5, 3), (32, 2, 4), (32, 8, 16)]]


@pytest.mark.parametrize(
    ("dtype", "operator", "sizes"),
    [
        *((BF16, *READS[0]), (FP16, *READS[1]), (FP16, "slot_attention, split", {"D": 32, "S": 2})),
        *(slow(BF16, *case) for case in (*READS[1:], *SLOTS)),
        *(slow(FP16, *case) for case in (*READS[::2], *SLOTS)),
    ],
)
def test_attention_is_as_exact_in_half_precision(dtype, operator, sizes):
    """Slot attention in bf16, where units of its network flip, is in a file of its own."""
    make, _ = OPERATORS[operator]
    problems = [make(HOLES, 7, T=3, **sizes, seed=seed) for seed in range(3)]
    assert_as_exact(*problems, dtype=dtype, own_precision=tuple(own_precision(p, sizes.get("H")) for p in problems))


READS = [(48, 3, 5), (16, 1, 1), (64, 2, 17), (128, 4, 8), (200, 5, 7), (96, 16, 3), (64, 16, 32), (512, 2, 2)]
SLOTS = [(48, 5, 1), (16, 1, 3), (64, 17, 1), (128, 8, 2), (32, 32, 1), (200, 7, 1), (512, 2, 1)]
SIZES = [
    *(("cross_attention", {"D": D, "H": H, "S": S}) for D, H, S in READS),
    *((name, {"D": D, "S": S, "J": J}) for name in ("slot_attention", "slot_attention, split") for D, S, J in SLOTS),
]


@pytest.mark.parametrize(
    ("operator", "sizes"), [case if case[1]["D"] == 48 else slow(*case) for case in SIZES], ids=str
)
def test_attention_is_as_exact_for_every_supported_size(operator, sizes):
    make, _ = OPERATORS[operator]
    assert_as_exact(make(torch.tensor([1, 0, 1], device=DEVICE), 2, T=2, **sizes))


def test_cross_attention_is_exact_where_a_program_has_several_tiles(monkeypatch):
    monkeypatch.setattr(cross_kernels, "FORWARD_PROGRAMS", 0)
    monkeypatch.setattr(cross_kernels, "BACKWARD_PROGRAMS", 0)
    monkeypatch.setattr(cross_kernels, "CHUNK", 10)  # of the feed-forward network
    assert_as_exact(cross_problem(TWO, 2, T=12, D=32, H=4, S=8))


@pytest.mark.parametrize("regime", ["whole", "split"])
def test_slot_attention_is_exact_where_a_program_has_several_tiles(regime):
    assert_as_exact(slot_problem(TWO, 2, T=6, D=16, S=3, J=1))


def test_slot_attention_is_as_exact_with_a_hidden_layer_of_any_width():
    problem = slot_problem(TWO, 2, D=16)
    narrow = dict(problem.leaves)
    narrow |= {name: narrow[name][:21] for name in ("mlp_in_weight", "mlp_in_bias")}
    narrow["mlp_out_weight"] = narrow["mlp_out_weight"][:, :21]
    assert_as_exact(Problem(narrow, problem.run))


@pytest.mark.parametrize(
    ("samples", "tokens", "groups", "split"),
    [(128, 1, 5, False), (512, 1, 50, False), (1024, 64, 5, True), (1024, 64, 500, False), (1, 6000, 1, True)],
)
def test_tokens_are_split_where_one_program_a_class_would_leave_the_device_idle(samples, tokens, groups, split):
    assert tokens_are_split(torch.empty(samples, tokens, 128, device="meta"), groups) is split


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nothing_as_large_as_the_tokens_is_saved_but_the_tokens(dtype):
    problem = cross_problem(TWO, 2, T=10, D=32, S=4)
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
