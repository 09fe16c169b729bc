"""Labels to groups: order, offsets, counts, padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cem_kernels
from cem_kernels import ClassGroups, Nats
from cem_kernels.variance import class_variance

LABELS = torch.tensor([2, 0, 2, 4, 0, 2])


def test_order_is_stable_by_class():
    groups = ClassGroups.from_labels(LABELS, 6)
    assert groups.order.tolist() == [1, 4, 0, 2, 5, 3]


def test_offsets_and_counts_cover_empty_classes():
    groups = ClassGroups.from_labels(LABELS, 6)
    assert groups.offsets.tolist() == [0, 2, 2, 5, 5, 6, 6]
    assert groups.counts.tolist() == [2, 0, 3, 0, 1, 0]


def test_empty_batch_has_only_empty_classes():
    groups = ClassGroups.from_labels(torch.zeros(0, dtype=torch.long), 3)
    assert groups.counts.tolist() == [0, 0, 0]
    assert groups.pad(torch.zeros(0, 2)).shape == (3, 1, 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_is_taken(dtype):
    assert torch.equal(ClassGroups.from_labels(LABELS.to(dtype), 6).order, ClassGroups.from_labels(LABELS, 6).order)


@given(st.lists(st.integers(0, 6), max_size=30), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_pad_puts_every_sample_in_its_class_and_unpad_takes_it_back(labels, slack):
    labels = torch.tensor(labels, dtype=torch.long)
    bound = max([int((labels == c).sum()) for c in range(7)]) + slack or 1
    groups = ClassGroups.from_labels(labels, 7, max_class_size=bound)
    rows = torch.randn(len(labels), 3)
    padded = groups.pad(rows)
    assert padded.shape == (7, bound, 3)
    for c in range(7):
        members = rows[labels == c]
        assert torch.equal(padded[c, : len(members)], members)
        assert not padded[c, len(members) :].any()
    assert torch.equal(groups.unpad(padded), rows)


def test_means_are_those_of_the_class_and_zero_where_there_is_no_sample():
    groups, rows = ClassGroups.from_labels(LABELS, 6), torch.randn(6, 3, dtype=torch.float64)
    means = groups.means(rows)
    for c in range(6):
        members = rows[c == LABELS]
        torch.testing.assert_close(means[c], members.mean(dim=0) if len(members) else torch.zeros(3).double())


def test_means_keep_what_is_not_finite_in_its_class():
    rows = torch.randn(6, 3)
    rows[3] = float("nan")
    assert ClassGroups.from_labels(LABELS, 6).means(rows).isfinite().all(dim=1).tolist() == [True] * 4 + [False, True]


def test_means_are_differentiable():
    groups, rows = ClassGroups.from_labels(LABELS, 6), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(groups.means, rows)


def test_grouping_reads_no_value_on_the_host():
    # Values do not exist on the meta device, so any .item(), .tolist(), unique or boolean mask would raise.
    labels = torch.zeros(5, dtype=torch.long, device="meta")
    groups = ClassGroups.from_labels(labels, 4, max_class_size=5)
    assert groups.offsets.shape == (5,)
    assert groups.pad(torch.zeros(5, 2, device="meta")).shape == (4, 5, 2)


@pytest.mark.parametrize("bad", [torch.tensor([0, 3]), torch.tensor([-1, 0])])
def test_label_out_of_range_is_refused_with_the_range(bad):
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), .*, got values from"):
        ClassGroups.from_labels(bad, 3)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(3, dtype=torch.bool), [0, 1]])
def test_labels_that_are_no_integers_are_refused(bad):
    with pytest.raises(TypeError, match="labels must be an integer tensor, got"):
        ClassGroups.from_labels(bad, 3)


def test_labels_of_wrong_rank_are_refused():
    with pytest.raises(ValueError, match=r"labels must have shape \[B\], got \[2, 1\]"):
        ClassGroups.from_labels(torch.zeros(2, 1, dtype=torch.long), 3)


@pytest.mark.parametrize("kwargs", [{"num_classes": 0}, {"num_classes": 6, "max_class_size": 0}])
def test_sizes_must_be_positive(kwargs):
    with pytest.raises(ValueError, match="must be positive, got 0"):
        ClassGroups.from_labels(LABELS, **kwargs)


def test_class_above_the_static_bound_is_refused():
    with pytest.raises(ValueError, match="max_class_size is 2, but a class has 3 samples"):
        ClassGroups.from_labels(LABELS, 6, max_class_size=2)


def test_class_above_the_bound_fails_loudly_even_where_values_are_not_checked(monkeypatch):
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    groups = ClassGroups.from_labels(LABELS, 6, max_class_size=2)
    with pytest.raises((IndexError, RuntimeError)):
        groups.pad(torch.randn(6, 2))


def test_debug_mode_refuses_tokens_that_are_not_finite():
    groups = ClassGroups.from_labels(LABELS, 6)
    features = torch.randn(6, 3)
    features[0, 0] = float("nan")
    assert class_variance(features, groups, Nats(0.1)).rob_loss.isnan()
    cem_kernels.set_debug(True)
    try:
        with pytest.raises(ValueError, match="features must be finite, got NaN or infinity"):
            class_variance(features, groups, Nats(0.1))
    finally:
        cem_kernels.set_debug(False)
