"""The joint entropy of features around their slots, against its definition."""

import math

import numpy as np
import pytest
import torch
from exactness import every_labelling
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, assert_same, labels_with_holes
from torch._subclasses.fake_tensor import FakeTensorMode

from cem_kernels import BackendUnavailableError, ClassGroups, joint_entropy, slot_variance

both_backends = pytest.mark.parametrize("backend", ["eager", "reference"])
LABELS = labels_with_holes(13, 5)  # classes 1 and 3; the others are empty
NOISE = 0.3


def random_features(num_samples, T, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-2, 0.5, T * D, dtype=torch.float64).view(T, D)
    mixed = torch.randn(num_samples, T, D, generator=generator, dtype=torch.float64) * spread
    return mixed + 0.5 * mixed.roll(1, 2) + 3.0  # columns that know of each other


def random_attention(num_samples, T, S, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.softmax(sharpness * torch.randn(num_samples, T, S, generator=generator, dtype=torch.float64), dim=2)


def one_slot(num_samples, T=1):
    return torch.ones(num_samples, T, 1, dtype=torch.float64)


def hard_attention(choices, num_slots):
    return torch.nn.functional.one_hot(torch.as_tensor(choices), num_slots)[:, None].double()


def one_class(num_samples):
    return ClassGroups.from_labels(torch.zeros(num_samples, dtype=torch.long), 1)


def entropy_problem(labels, K, *, T=1, D=6, S=3, seed=0, dtype=torch.float64, attention=None, bound=None, **options):
    groups = ClassGroups.from_labels(labels, K, max_class_size=bound)
    attention = (random_attention(len(labels), T, S, seed) if attention is None else attention).to(labels.device, dtype)

    def run(backend, features):
        weights = attention.double() if features.dtype == torch.float64 else attention
        return tuple(joint_entropy(features, weights, groups, backend=backend, **({"noise_std": NOISE} | options)))

    return Problem({"features": random_features(len(labels), T, D, seed).to(labels.device, dtype)}, run)


def by_loops(x, p, labels, classes, noise_std=NOISE, min_samples=2):
    """The definition in NumPy, one outer product at a time: ``(rob_loss, intra_mse)``."""
    x, p, labels = x.numpy(), p.numpy(), labels.numpy()
    (_, T, D), S = x.shape, p.shape[2]
    scatter, squares, num_samples = np.zeros((T * D, T * D)), 0.0, 0
    for c in classes:
        (members,) = np.nonzero(labels == c)
        if len(members) < min_samples:
            continue
        num_samples += len(members)
        used = [
            sum(
                p[n, t, s] ** 2 / p[members, t, s].sum()
                for n in members
                for s in range(S)
                if p[members, t, s].sum() > 0
            )
            for t in range(T)
        ]
        for n in members:
            residual, missing = np.zeros((T, D)), np.zeros((T, D))
            for t in range(T):
                said = np.zeros(D)
                for s in range(S):
                    if p[members, t, s].sum() > 0:
                        said += p[n, t, s] * np.average(x[members, t], axis=0, weights=p[members, t, s])
                residual[t] = x[n, t] - said
                missing[t] = math.sqrt(used[t] / (len(members) - 1)) * (x[n, t] - x[members, t].mean(axis=0))
            scatter += np.outer(residual, residual) + np.outer(missing, missing)
            squares += (residual**2).sum()
    num_samples = max(num_samples, 1)
    _, log_det = np.linalg.slogdet(np.eye(T * D) + scatter / num_samples / noise_std**2)
    return log_det / 2 / (T * D), squares / num_samples / (T * D)


# ------------------------------------------------------------------------------------------------------ the definition


@both_backends
@pytest.mark.parametrize("min_samples", [2, 4])
@pytest.mark.parametrize("D", [3, 20], ids=["narrow", "wide"])  # fewer and more columns than rows of the matrix
def test_both_results_are_those_of_the_definition(backend, min_samples, D):
    labels = torch.tensor([3, 1, 3, 0, 3, 1, 3, 1, 3, 5])  # five, three, one and one sample, and none
    x, p = random_features(10, 2, D), random_attention(10, 2, 3)
    groups = ClassGroups.from_labels(labels, 7)
    result = joint_entropy(x, p, groups, noise_std=NOISE, min_samples=min_samples, backend=backend)
    assert [float(each) for each in result] == pytest.approx(
        by_loops(x, p, labels, range(7), min_samples=min_samples), rel=1e-10
    )


@both_backends
def test_one_column_has_half_the_log_of_one_and_its_variance_over_the_noise(backend):
    x = torch.tensor([0.0, 2.0], dtype=torch.float64)[:, None, None]  # variance 2
    result = joint_entropy(x, one_slot(2), one_class(2), noise_std=0.5, backend=backend)
    assert float(result.rob_loss) == pytest.approx(math.log(1 + 2 / 0.25) / 2)
    assert float(result.intra_mse) == pytest.approx(1.0)


@both_backends
def test_the_covariance_of_one_slot_is_the_mean_of_the_classes_covariances(backend):
    x, groups = random_features(13, 1, 4), ClassGroups.from_labels(LABELS, 5)
    classes = [x[c == LABELS, 0].numpy() for c in (1, 3)]
    covariance = sum(len(rows) / 13 * np.cov(rows, rowvar=False) for rows in classes)
    expected = np.linalg.slogdet(np.eye(4) + covariance / NOISE**2)[1] / 2 / 4
    result = joint_entropy(x, one_slot(13), groups, noise_std=NOISE, backend=backend)
    assert float(result.rob_loss) == pytest.approx(float(expected), rel=1e-10)


@both_backends
def test_a_column_said_twice_counts_as_one_with_half_the_noise(backend):
    x = random_features(9, 1, 1)
    twice = joint_entropy(x.expand(-1, -1, 2), one_slot(9), one_class(9), noise_std=NOISE, backend=backend)
    once = joint_entropy(x, one_slot(9), one_class(9), noise_std=NOISE / math.sqrt(2), backend=backend)
    assert 2 * float(twice.rob_loss) == pytest.approx(float(once.rob_loss), rel=1e-10)


@both_backends
def test_turning_the_features_changes_nothing(backend):
    x, p = random_features(13, 1, 5), random_attention(13, 1, 3)
    turn, _ = torch.linalg.qr(random_features(5, 1, 5, seed=3)[:, 0])
    groups = ClassGroups.from_labels(LABELS, 5)
    plain, turned = (joint_entropy(each, p, groups, noise_std=NOISE, backend=backend) for each in (x, x @ turn))
    assert [float(each) for each in turned] == pytest.approx([float(each) for each in plain], rel=1e-9)


@both_backends
def test_it_is_at_most_the_sum_of_the_columns_own_entropies(backend):
    x, groups = random_features(13, 1, 5), one_class(13)
    joint = joint_entropy(x, one_slot(13), groups, noise_std=NOISE, backend=backend).rob_loss
    apart = slot_variance(
        x, one_slot(13), groups, threshold=1e-30, eps_var=1e-30, gamma=NOISE**2, hinge="identity", backend=backend
    ).rob_loss
    assert 0.1 < float(joint) < 0.99 * float(apart) / 2


@both_backends
def test_slots_of_one_sample_each_say_what_the_class_says(backend):
    x, groups = random_features(5, 1, 3), one_class(5)
    alone = joint_entropy(x, hard_attention(range(5), 5), groups, noise_std=NOISE, backend=backend)
    together = joint_entropy(x, one_slot(5), groups, noise_std=NOISE, backend=backend)
    # Nothing is left of a sample beyond its slot, and five fits of five samples are the whole unbiased covariance.
    assert float(alone.intra_mse) == pytest.approx(0.0, abs=1e-20)
    assert float(alone.rob_loss) == pytest.approx(float(together.rob_loss), rel=1e-10)


@both_backends
@pytest.mark.parametrize("num_samples", [0, 3])
def test_no_class_with_enough_samples_gives_an_attached_zero(backend, num_samples):
    x = random_features(num_samples, 2, 3).requires_grad_()
    groups = ClassGroups.from_labels(torch.arange(num_samples), 5)
    result = joint_entropy(x, random_attention(num_samples, 2, 3), groups, noise_std=NOISE, backend=backend)
    (gradient,) = torch.autograd.grad(result.rob_loss + result.intra_mse, x)
    assert (result.rob_loss.item(), result.intra_mse.item()) == (0.0, 0.0)
    assert torch.equal(gradient, torch.zeros_like(x))


@both_backends
def test_classes_beyond_the_number_given_do_not_count(backend):
    x, p = random_features(13, 1, 4), random_attention(13, 1, 3)
    x[LABELS == 3] = math.inf
    result = joint_entropy(x, p, ClassGroups.from_labels(LABELS, 5), noise_std=NOISE, num_classes=3, backend=backend)
    assert [float(each) for each in result] == pytest.approx(by_loops(x, p, LABELS, [1]), rel=1e-10)


# ----------------------------------------------------------------------------------------------------- eager, reference


@every_labelling
@pytest.mark.parametrize("T", [1, 3])
def test_eager_equals_reference(labels, num_classes, T):
    problem = entropy_problem(labels, num_classes, T=T)
    assert_same(problem.results("eager"), problem.results("reference"))


@settings(max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), max_size=20),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 4)),
    min_samples=st.integers(2, 4),
    sharpness=st.floats(0, 8),
    seed=st.integers(0, 99),
)
def test_eager_equals_reference_for_any_labels_and_sizes(labels, sizes, min_samples, sharpness, seed):
    T, D, S = sizes
    attention = random_attention(len(labels), T, S, seed, sharpness)
    labels = torch.tensor(labels, dtype=torch.long)
    problem = entropy_problem(labels, 5, T=T, D=D, seed=seed, attention=attention, min_samples=min_samples)
    assert_same(problem.results("eager"), problem.results("reference"))


@pytest.mark.parametrize("D", [6, 64])
def test_eager_in_single_precision_equals_reference_in_double(D):
    labels = labels_with_holes(40, 5)
    found = entropy_problem(labels, 5, D=D, dtype=torch.float32).results("eager")
    exact = entropy_problem(labels, 5, D=D).results("reference")
    assert_same({name: each.double() for name, each in found.items()}, exact, tolerance=1e-4)


def test_eager_equals_reference_under_a_static_bound():
    problem = entropy_problem(LABELS, 5, bound=13)
    assert_same(problem.results("eager"), problem.results("reference"))


@both_backends
@pytest.mark.parametrize("D", [3, 20], ids=["narrow", "wide"])
def test_gradcheck_of_features_that_do_not_move_their_slots(backend, D):
    # With one slot the residuals' gradients sum to zero, so that the definition's gradient moves the mean as well.
    groups = ClassGroups.from_labels(LABELS, 5)
    x = random_features(13, 1, D).requires_grad_()

    def call(features):
        return tuple(joint_entropy(features, one_slot(13), groups, noise_std=NOISE, backend=backend))

    assert torch.autograd.gradcheck(call, (x,))


@both_backends
def test_gradients_are_those_with_the_slots_held_still(backend):
    x, p = random_features(7, 1, 3).requires_grad_(), random_attention(7, 1, 2)
    groups = one_class(7)
    (gradient,) = torch.autograd.grad(joint_entropy(x, p, groups, noise_std=NOISE, backend=backend).rob_loss, x)
    with torch.no_grad():
        share = p[:, 0] / p[:, 0].sum(dim=0)
        said, mean, used = p[:, 0] @ (share.T @ x[:, 0]), x[:, 0].mean(dim=0), (share * p[:, 0]).sum()
    rows = torch.cat((x[:, 0] - said, (used / 6).sqrt() * (x[:, 0] - mean)))
    still = torch.logdet(torch.eye(3, dtype=torch.float64) + rows.T @ rows / 7 / NOISE**2) / 2 / 3
    torch.testing.assert_close(gradient, torch.autograd.grad(still, x)[0], rtol=1e-9, atol=1e-12)


def test_no_gradient_reaches_the_attention():
    x, p = random_features(13, 1, 4).requires_grad_(), random_attention(13, 1, 3).requires_grad_()
    result = joint_entropy(x, p, ClassGroups.from_labels(LABELS, 5), noise_std=NOISE)
    found = torch.autograd.grad(result.rob_loss + result.intra_mse, (x, p), allow_unused=True)
    assert found[0] is not None
    assert found[1] is None


# ------------------------------------------------------------------------------------------------- what may go wrong


@both_backends
def test_a_slot_to_which_nothing_belongs_changes_nothing(backend):
    problem = entropy_problem(LABELS, 5, attention=random_attention(13, 1, 2))
    empty = torch.cat((random_attention(13, 1, 2), torch.zeros(13, 1, 1, dtype=torch.float64)), dim=2)
    assert_same(entropy_problem(LABELS, 5, attention=empty).results(backend), problem.results(backend), 1e-12)


@both_backends
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_sample_alone_in_its_class_may_be_anything(backend, bad):
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    x = random_features(7, 1, 3)
    x[3] = bad
    result = joint_entropy(
        x, random_attention(7, 1, 3), ClassGroups.from_labels(labels, 3), noise_std=NOISE, backend=backend
    )
    assert [float(each) for each in result] == pytest.approx(
        by_loops(x, random_attention(7, 1, 3), labels, [0, 2]), rel=1e-10
    )


@both_backends
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_sample_that_is_not_finite_is_not_hidden(backend, bad):
    x = random_features(13, 1, 3)
    x[0, 0, 1] = bad
    result = joint_entropy(x, one_slot(13), ClassGroups.from_labels(LABELS, 5), noise_std=NOISE, backend=backend)
    assert not result.rob_loss.isfinite()


def test_single_precision_survives_a_mean_ten_thousand_times_the_spread():
    x, p = random_features(40, 1, 6), random_attention(40, 1, 3)
    groups = ClassGroups.from_labels(labels_with_holes(40, 5), 5)
    exact = joint_entropy(x, p, groups, noise_std=NOISE, backend="reference")
    x32 = (x + 3e4).float()
    moved = joint_entropy(x32, p.float(), groups, noise_std=NOISE)
    of_rounded = joint_entropy(x32.double(), p, groups, noise_std=NOISE, backend="reference")
    assert float(moved.rob_loss) == pytest.approx(float(of_rounded.rob_loss), rel=1e-4)
    assert float(moved.rob_loss) == pytest.approx(float(exact.rob_loss), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_features_are_computed_in_fp32(dtype):
    x, p = random_features(13, 1, 4).to(dtype).requires_grad_(), random_attention(13, 1, 3).to(dtype)
    groups = ClassGroups.from_labels(LABELS, 5)
    result = joint_entropy(x, p, groups, noise_std=NOISE)
    wide = joint_entropy(x.float(), p.float(), groups, noise_std=NOISE)
    (gradient,) = torch.autograd.grad(result.rob_loss, x)
    assert (result.rob_loss.dtype, gradient.dtype) == (torch.float32, dtype)
    assert torch.equal(result.rob_loss, wide.rob_loss)


def test_autocast_changes_nothing():
    problem = entropy_problem(LABELS, 5, dtype=torch.float32)
    under = problem.results("eager", forward_under=torch.autocast("cpu", torch.bfloat16))
    for name, plain in problem.results("eager").items():
        assert torch.equal(under[name], plain), name


def test_a_static_bound_needs_no_host_sync(monkeypatch):
    # Fake tensors have shapes and no values: whatever reads a value, or makes a shape depend on one, raises.
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    with FakeTensorMode():
        results = entropy_problem(torch.zeros(23, dtype=torch.long), 7, bound=20, num_classes=4).results("eager")
    assert results["gradient of features"].shape == (23, 1, 6)


def test_eager_compiles_whole():
    torch.compiler.reset()
    features, attention = random_features(13, 2, 4), random_attention(13, 2, 3)

    def losses(features, attention, labels):
        groups = ClassGroups.from_labels(labels, 5, max_class_size=10)
        return tuple(joint_entropy(features, attention, groups, noise_std=NOISE, backend="eager"))

    compiled = torch.compile(losses, fullgraph=True, backend="eager")
    for labels in (LABELS, LABELS.flip(0)):
        found = Problem({"features": features}, lambda _, features: compiled(features, attention, labels))  # noqa: B023
        plain = Problem({"features": features}, lambda _, features: losses(features, attention, labels))  # noqa: B023
        assert_same(found.results("eager"), plain.results("eager"), tolerance=1e-12)


FEATURES, ATTENTION = torch.ones(4, 2, 8), torch.full((4, 2, 3), 1 / 3)
REFUSED = [
    ({"features": FEATURES[:, 0]}, ValueError, r"features must have shape \[B=4, T>0, D>0\], got \[4, 8\]"),
    ({"attention": ATTENTION[:3]}, ValueError, r"attention must have shape \[B=4, T=2, S>0\], got \[3, 2, 3\]"),
    ({"attention": ATTENTION.to("meta")}, ValueError, "attention must be on the tokens' device cpu, got meta"),
    ({"noise_std": 0.0}, ValueError, "noise_std must be finite and positive, got 0.0"),
    ({"noise_std": math.inf}, ValueError, "noise_std must be finite and positive, got inf"),
    ({"min_samples": 1}, ValueError, "min_samples must be at least 2, got 1"),
    ({"num_classes": 0}, ValueError, "num_classes must be from 1 to K=3, got 0"),
    ({"num_classes": 4}, ValueError, "num_classes must be from 1 to K=3, got 4"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, eager, reference, got 'cuda'"),
    ({"features": FEATURES.int()}, TypeError, "features must be a floating-point tensor, got torch.int32"),
    ({"attention": ATTENTION.double()}, TypeError, "attention is torch.float64 but the tokens are torch.float32"),
    ({"backend": "triton"}, BackendUnavailableError, "joint_entropy has no 'triton' backend"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_bad_argument_is_refused(kwargs, error, message):
    groups = ClassGroups.from_labels(torch.tensor([0, 0, 1, 1]), 3)
    arguments = {"features": FEATURES, "attention": ATTENTION, "groups": groups, "noise_std": NOISE} | kwargs
    with pytest.raises(error, match=message):
        joint_entropy(**arguments)
