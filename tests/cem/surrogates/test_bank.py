"""The memory bank: which rows it remembers, in what order, and what it hands back with a batch."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cem.surrogates.bank import MemoryBank

K, SIZE, WIDTH = 3, 4, 2


def rows_of(*values, dtype=torch.float32):
    """One row per value, ``[value, -value]``."""
    column = torch.tensor(values, dtype=dtype)
    return torch.stack((column, -column), dim=1)


def bank_after(*batches, size=SIZE):
    """A bank that was given these batches, each a pair of values and labels."""
    bank = MemoryBank(K, size, WIDTH)
    for values, labels in batches:
        bank.remember(rows_of(*values), torch.tensor(labels, dtype=torch.int64))
    return bank


def ring(bank, c):
    """First column of class ``c``'s ring, by place."""
    return bank.features[c, :, 0].tolist()


def random_batch(seed, num_samples=20, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_samples, WIDTH, generator=generator)
    return rows.to(device), torch.randint(K, (num_samples,), generator=generator).to(device)


def test_a_new_bank_remembers_nothing():
    bank = MemoryBank(K, SIZE, WIDTH)
    assert not bank.features.any()
    assert not bank.written.any()


def test_rows_are_written_in_batch_order_at_the_place_of_their_class():
    bank = bank_after(([1.0, 2.0, 3.0, 4.0], [2, 0, 2, 0]))
    assert ring(bank, 0) == [2, 4, 0, 0]
    assert ring(bank, 2) == [1, 3, 0, 0]


def test_all_columns_of_a_row_are_written():
    bank = bank_after(([1.0, 2.0], [1, 1]))
    assert bank.features[1, :2].tolist() == [[1, -1], [2, -2]]


def test_a_second_batch_continues_where_the_first_ended():
    assert ring(bank_after(([1.0, 2.0], [1, 1]), ([3.0], [1])), 1) == [1, 2, 3, 0]


def test_the_newest_rows_overwrite_the_oldest():
    assert ring(bank_after(([1.0, 2.0, 3.0], [0, 0, 0]), ([4.0, 5.0, 6.0], [0, 0, 0])), 0) == [5, 6, 3, 4]


def test_a_full_ring_is_overwritten_from_its_first_place():
    assert ring(bank_after(([1.0, 2.0, 3.0, 4.0], [0] * 4), ([5.0], [0])), 0) == [5, 2, 3, 4]


def test_of_a_class_with_more_rows_than_the_ring_the_last_ones_stay():
    assert ring(bank_after(([9.0], [1]), ([float(v) for v in range(1, 8)], [1] * 7)), 1) == [4, 5, 6, 7]


def test_rows_that_are_overwritten_by_their_own_batch_count_as_written():
    assert bank_after(([9.0], [1]), ([float(v) for v in range(1, 8)], [1] * 7)).written.tolist() == [0, 8, 0]


def test_a_ring_of_one_row_keeps_the_last_row():
    assert ring(bank_after(([1.0, 2.0], [1, 1]), ([3.0, 4.0, 5.0], [1, 0, 1]), size=1), 1) == [5]


def test_classes_absent_from_the_batch_keep_their_rows():
    before, after = bank_after(([1.0, 2.0], [0, 2])), bank_after(([1.0, 2.0], [0, 2]), ([3.0], [1]))
    assert torch.equal(after.features[[0, 2]], before.features[[0, 2]])
    assert after.written.tolist() == [1, 1, 1]


def test_an_empty_batch_leaves_the_bank_as_it_is():
    batch = ([1.0, 2.0], [0, 2])
    before, after = bank_after(batch), bank_after(batch, ([], []))
    assert torch.equal(after.features, before.features)
    assert torch.equal(after.written, before.written)


def test_an_empty_batch_is_extended_to_the_bank_alone():
    bank = bank_after(([1.0, 2.0], [0, 2]))
    rows, labels = bank.extend(torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(rows, bank.features.flatten(0, 1))
    assert labels.tolist() == [0, 3, 3, 3, 4, 4, 4, 4, 2, 5, 5, 5]


def test_the_batch_comes_first_and_the_bank_class_by_class_after_it():
    bank = bank_after(([1.0, 2.0, 3.0, 4.0, 5.0], [0] * 5), ([6.0], [1]))
    rows, labels = bank.extend(rows_of(7.0, 8.0), torch.tensor([2, 1]))
    assert rows[:, 0].tolist() == [7, 8, 5, 2, 3, 4, 6, 0, 0, 0, 0, 0, 0, 0]
    assert labels.tolist() == [2, 1, 0, 0, 0, 0, 1, 4, 4, 4, 5, 5, 5, 5]


def test_places_not_yet_filled_have_a_class_behind_the_others_for_each():
    _, labels = bank_after(([1.0, 2.0], [1, 1])).extend(rows_of(3.0), torch.tensor([1]))
    assert labels[1:].view(K, SIZE).tolist() == [[K] * 4, [1, 1, K + 1, K + 1], [K + 2] * 4]


def test_extending_does_not_remember():
    bank = bank_after(([1.0], [1]))
    bank.extend(rows_of(2.0), torch.tensor([1]))
    assert ring(bank, 1) == [1, 0, 0, 0]
    assert bank.written.tolist() == [0, 1, 0]


@pytest.mark.parametrize("num_samples", [0, 3])
def test_what_was_handed_out_does_not_change_with_the_bank(num_samples):
    bank = bank_after(([1.0], [0]))
    rows, labels = bank.extend(*random_batch(0, num_samples))
    before = rows.clone(), labels.clone()
    bank.remember(*random_batch(1))
    assert torch.equal(rows, before[0])
    assert torch.equal(labels, before[1])


def test_gradients_reach_the_rows_of_the_batch():
    batch = rows_of(2.0, 3.0).requires_grad_()
    rows, _ = bank_after(([1.0], [0])).extend(batch, torch.tensor([0, 1]))
    weights = torch.arange(1.0, 1 + rows.numel()).view_as(rows)
    (rows * weights).sum().backward()
    assert torch.equal(batch.grad, weights[:2])


def test_gradients_reach_the_batch_after_its_rows_were_remembered():
    batch, labels = rows_of(2.0, 3.0).requires_grad_(), torch.tensor([0, 1])
    bank = bank_after(([1.0], [0]))
    rows, _ = bank.extend(batch, labels)
    bank.remember(batch, labels)
    rows.square().sum().backward()
    assert torch.equal(batch.grad, 2 * batch.detach())


def test_remembered_rows_carry_no_gradient():
    bank, batch, labels = MemoryBank(K, SIZE, WIDTH), rows_of(2.0, 3.0).requires_grad_(), torch.tensor([0, 1])
    bank.remember(batch, labels)
    rows, _ = bank.extend(rows_of(4.0), torch.tensor([0]))
    assert not bank.features.requires_grad
    assert not rows.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_remembered_rows_take_the_dtype_of_the_batch_and_the_bank_stays_fp32(dtype):
    bank, labels = MemoryBank(K, SIZE, WIDTH), torch.tensor([1])
    bank.remember(rows_of(2.0, dtype=dtype), labels)
    rows, _ = bank.extend(rows_of(3.0, dtype=dtype), labels)
    assert bank.features.dtype == torch.float32
    assert rows.dtype == dtype
    assert torch.equal(rows[1 + SIZE], rows_of(2.0, dtype=dtype)[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_dtype_are_taken(dtype):
    bank, labels = MemoryBank(K, SIZE, WIDTH), torch.tensor([1, 2], dtype=dtype)
    bank.remember(rows_of(1.0, 2.0), labels)
    assert bank.written.tolist() == [0, 1, 1]
    assert bank.extend(rows_of(3.0, 4.0), labels)[1].dtype == torch.int64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_passed_over_and_do_not_count(bad):
    batch = rows_of(1.0, 2.0, 3.0, 4.0, 5.0)
    batch[1, 1] = batch[4, 0] = bad  # amid its class, and the only one of its class
    bank = MemoryBank(K, SIZE, WIDTH)
    bank.remember(batch, torch.tensor([1, 1, 1, 0, 2]))
    assert bank.features[..., 0].tolist() == [[4, 0, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0]]
    assert bank.written.tolist() == [1, 2, 0]


def test_rows_beyond_the_range_of_fp32_are_passed_over():
    bank = MemoryBank(K, SIZE, WIDTH)
    bank.remember(rows_of(1e300, 2.0, dtype=torch.float64), torch.tensor([0, 0]))
    assert ring(bank, 0) == [2, 0, 0, 0]


def test_state_dict_has_the_rows_and_their_count_and_nothing_else():
    shapes = {name: tuple(tensor.shape) for name, tensor in MemoryBank(K, SIZE, WIDTH).state_dict().items()}
    assert shapes == {"features": (K, SIZE, WIDTH), "written": (K,)}


def test_a_bank_loaded_from_a_state_dict_continues_exactly():
    bank, loaded = bank_after(([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0, 0, 2, 0, 0, 0])), MemoryBank(K, SIZE, WIDTH)
    loaded.load_state_dict(bank.state_dict())
    for seed in range(3):
        batch = random_batch(seed, 5)
        for have, want in zip(loaded.extend(*batch), bank.extend(*batch), strict=True):
            assert torch.equal(have, want)
        loaded.remember(*batch)
        bank.remember(*batch)
    assert torch.equal(loaded.features, bank.features)
    assert torch.equal(loaded.written, bank.written)


def test_buffers_are_written_in_place():
    bank = MemoryBank(K, SIZE, WIDTH)
    features, written = bank.features, bank.written
    bank.remember(rows_of(1.0), torch.tensor([1]))
    assert features[1, 0].tolist() == [1, -1]
    assert written.tolist() == [0, 1, 0]
    assert bank.features is features
    assert bank.written is written


sample = st.tuples(st.integers(0, K - 1), st.sampled_from([True, True, True, False]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(sample, max_size=12), max_size=5), st.integers(1, 5))
def test_rings_are_those_of_a_queue_per_class_for_any_batches(batches, size):
    bank = MemoryBank(K, size, WIDTH)
    queues, written, value = [deque(maxlen=size) for _ in range(K)], [0] * K, 0
    for batch in batches:
        values = []
        for c, finite in batch:
            value += 1
            values.append(float(value) if finite else float("nan"))
            if finite:
                queues[c].append(float(value))
                written[c] += 1
        bank.remember(rows_of(*values), torch.tensor([c for c, _ in batch], dtype=torch.int64))
        rows, labels = bank.extend(torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64))
        assert bank.written.tolist() == written
        for c in range(K):
            oldest_first = sorted(range(len(queues[c])), key=lambda s, c=c: (s - written[c]) % size)
            assert bank.features[c, oldest_first].tolist() == rows_of(*queues[c]).tolist()
            assert sorted(rows[labels == c, 0].tolist()) == list(queues[c])


def test_the_same_batches_give_the_same_bits():
    results = []
    for _ in range(2):
        bank = MemoryBank(K, SIZE, WIDTH)
        for seed in range(5):
            bank.remember(*random_batch(seed))
        results.append((*bank.extend(*random_batch(5)), bank.written))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_no_value_is_read_on_the_host():
    # Values do not exist on the meta device, so any .item(), .tolist(), unique or boolean mask would raise.
    bank = MemoryBank(K, SIZE, WIDTH).to("meta")
    rows, labels = torch.zeros(5, WIDTH, device="meta"), torch.zeros(5, dtype=torch.int64, device="meta")
    bank.remember(rows, labels)
    extended, extended_labels = bank.extend(rows, labels)
    assert extended.shape == (5 + K * SIZE, WIDTH)
    assert extended_labels.shape == (5 + K * SIZE,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_remembers_what_eager_does_on_the_cpu():
    on_cpu, bank = MemoryBank(K, SIZE, WIDTH), MemoryBank(K, SIZE, WIDTH).cuda()
    rows, labels = random_batch(0, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # loads what capture must not load
        bank.extend(rows, labels)
        bank.remember(rows, labels)
    torch.cuda.synchronize()
    bank.load_state_dict(on_cpu.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        extended = bank.extend(rows, labels)
        bank.remember(rows, labels)
    for seed in range(3):
        batch = random_batch(seed)
        batch[0][seed] = float("nan")
        rows.copy_(batch[0])
        labels.copy_(batch[1])
        graph.replay()
        for have, want in zip(extended, on_cpu.extend(*batch), strict=True):
            torch.testing.assert_close(have.cpu(), want, rtol=0, atol=0, equal_nan=True)
        on_cpu.remember(*batch)
    assert torch.equal(bank.features.cpu(), on_cpu.features)
    assert torch.equal(bank.written.cpu(), on_cpu.written)


@pytest.mark.parametrize("name", ["num_classes", "size", "width"])
def test_a_size_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        MemoryBank(**{"num_classes": K, "size": SIZE, "width": WIDTH, name: 0})


@pytest.mark.parametrize("method", ["extend", "remember"])
@pytest.mark.parametrize(
    ("rows", "labels", "error", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), ValueError, r"rows must have shape \[B=2, width=2\], got \[2, 3\]"),
        (torch.zeros(3, 2), torch.tensor([0, 1]), ValueError, r"rows must have shape \[B=2, width=2\], got \[3, 2\]"),
        (torch.zeros(2), torch.tensor([0, 1]), ValueError, r"rows must have shape \[B=2, width=2\], got \[2\]"),
        (torch.zeros(2, 2), torch.tensor([[0, 1]]), ValueError, r"labels must have shape \[B\], got \[1, 2\]"),
        (torch.zeros(2, 2), torch.tensor([0, 3]), ValueError, r"labels must lie in \[0, 3\)"),
        (torch.zeros(2, 2), torch.tensor([-1, 0]), ValueError, r"labels must lie in \[0, 3\)"),
        (torch.zeros(2, 2), torch.tensor([0.0, 1.0]), TypeError, "labels must be an integer tensor"),
    ],
    ids=["width", "samples", "rank of rows", "rank of labels", "label above", "label below", "dtype of labels"],
)
def test_wrong_rows_and_labels_are_refused(method, rows, labels, error, message):
    bank = MemoryBank(K, SIZE, WIDTH)
    with pytest.raises(error, match=message):
        getattr(bank, method)(rows, labels)
    assert not bank.written.any()
