"""What a call of slot variance may rely on: thresholds in tensors, no host sync, any layout; and what it refuses."""

import math

import pytest
import torch
from problems import Problem, assert_same, labels_with_holes
from slot_variance_problems import (
    GROUPS,
    LABELS,
    OPTIONS,
    both_backends,
    every_hinge,
    random_attention,
    random_features,
    variance_problem,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from cem_kernels import BackendUnavailableError, ClassGroups, set_debug, slot_variance
from cem_kernels.slot_variance import IMPLEMENTATIONS

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
