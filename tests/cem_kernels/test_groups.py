"""Labels to groups: order, offsets, counts, padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cem_kernels import ClassGroups

LABELS = torch.tensor([2, 0, 2, 4, 0, 2])
DTYPES = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def test_order_is_stable_by_class_with_ignored_samples_last_and_classes_may_be_empty():
    groups = ClassGroups.from_labels(torch.tensor([2, -100, 0, 2, 4, -100, 0, 2]), 6)
    assert groups.order.tolist() == [2, 6, 0, 3, 7, 4, 1, 5]
    assert groups.offsets.tolist() == [0, 2, 2, 5, 5, 6, 6]
    assert groups.counts.tolist() == [2, 0, 3, 0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_of_any_integer_dtype_are_cast_at_the_door(dtype):
    groups, want = (ClassGroups.from_labels(labels, 6) for labels in (LABELS.to(dtype), LABELS))
    assert torch.equal(groups.order, want.order)
    assert groups.labels.dtype == torch.int64


def test_labels_that_are_overwritten_later_are_still_known():
    labels = torch.tensor([2, 0, 1])
    groups = ClassGroups.from_labels(labels, 3)
    labels.zero_()
    assert groups.labels.tolist() == [2, 0, 1]


def test_empty_batch_has_only_empty_classes():
    groups = ClassGroups.from_labels(torch.zeros(0, dtype=torch.long), 3)
    assert groups.counts.tolist() == [0, 0, 0]
    assert groups.pad(torch.zeros(0, 2)).shape == (3, 1, 2)


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


def test_class_above_the_bound_fails_loudly_even_where_values_are_not_checked(monkeypatch):
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    groups = ClassGroups.from_labels(LABELS, 6, max_class_size=2)
    with pytest.raises((IndexError, RuntimeError)):
        groups.pad(torch.randn(6, 2))
