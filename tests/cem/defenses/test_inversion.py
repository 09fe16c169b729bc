"""The attacker that reads images off neighbors' features by attention."""

from dataclasses import replace

import pytest
import torch

import cem
from cem.defenses.inversion import SHARPNESS, AttentionInversion, NeighborAttacker

SHAPE = (2, 6, 4)


def batch_of(labels, seed=0, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=dtype)  # noqa: E731
    z = draw(len(labels), width).requires_grad_()
    return cem.Batch(draw(len(labels), *SHAPE).sigmoid(), torch.tensor(labels), z.detach(), z)


def written_out(samples, queries):
    """The loss, a sample at a time; ``samples`` are (features, pixels, label), the first ``queries`` of them asked."""
    pairs = [
        [(x - z).square().sum() for j, (x, _, other) in enumerate(samples) if j != i and other == label >= 0]
        for i, (z, _, label) in enumerate(samples[:queries])
    ]
    bandwidth = torch.stack([each.detach() for row in pairs for each in row]).mean() / SHARPNESS
    error = chance = torch.zeros((), dtype=torch.float64)
    for i, (_, image, label) in enumerate(samples[:queries]):
        if pairs[i]:
            values = torch.stack([v for j, (_, v, other) in enumerate(samples) if j != i and other == label])
            attention = torch.softmax(-torch.stack(pairs[i]) / bandwidth, dim=0)
            error = error + (attention @ values - image).square().sum()
            chance = chance + (values.mean(dim=0) - image).square().sum()
    return -error / chance


def pooled(images):
    return images.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5)).flatten(1)


def samples_of(batch):
    return list(zip(batch.sent, pooled(batch.images), batch.labels.tolist(), strict=True))


def test_the_loss_is_that_of_the_formula_with_its_gradient():
    batch, attacker = batch_of([0, 1, 0, 2, 1, 0, -100]), NeighborAttacker(5, SHAPE)
    loss = attacker.measure(batch).loss
    expected = written_out(samples_of(batch), 7)
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(*(torch.autograd.grad(each, batch.sent) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_batches_before_are_neighbors_without_a_gradient():
    first, second = batch_of([0, 1, 0]), batch_of([0, 1, 1], seed=1)
    attacker = NeighborAttacker(5, SHAPE, memory=8).double()
    attacker.measure(first)
    expected = written_out(samples_of(second) + samples_of(first), 3)
    torch.testing.assert_close(attacker.measure(second).loss, expected)
    assert torch.autograd.grad(expected, first.sent)[0].any()
    assert not attacker.features.requires_grad


@pytest.mark.parametrize("sizes", [(3, 3, 3), (4, 9), (2, 1, 2, 1)])
def test_the_memory_holds_the_latest_samples(sizes):
    attacker = NeighborAttacker(5, SHAPE, memory=4).double()
    batches = [batch_of(list(range(size)), seed) for seed, size in enumerate(sizes)]
    for each in batches:
        attacker.measure(each)
    remembered = {tuple(row) for row in attacker.features.tolist()}
    assert remembered == {tuple(row) for row in torch.cat([each.features for each in batches])[-4:].tolist()}


def test_it_remembers_nothing_in_evaluation():
    attacker = NeighborAttacker(5, SHAPE, memory=4).eval()
    before = {name: each.clone() for name, each in attacker.state_dict().items()}
    attacker.measure(batch_of([0, 0]))
    assert all(torch.equal(each, before[name]) for name, each in attacker.state_dict().items())


@pytest.mark.parametrize("bad", [torch.nan, 1e20])  # the second, in squares only
def test_a_sample_that_is_not_finite_is_nobodys_neighbor_later(bad):
    attacker = NeighborAttacker(5, SHAPE, memory=4)
    spoiled = batch_of([0, 0, 1], dtype=torch.float32)
    spoiled.sent.data[0] = bad
    attacker.measure(spoiled)
    assert attacker.labels.tolist() == [-100, 0, 1, -100]
    assert attacker.measure(batch_of([0, 0, 1], seed=1)).loss.isfinite()


@pytest.mark.parametrize("labels", [[], [-100, -100], [0, 1, 2]])
def test_without_a_neighbor_there_is_no_loss_and_a_gradient_of_zeros(labels):
    batch = batch_of(labels)
    loss = NeighborAttacker(5, SHAPE).measure(batch).loss
    assert loss == 0
    assert not torch.autograd.grad(loss, batch.sent)[0].any()


def test_features_that_tell_nothing_leave_the_class_mean():
    batch = batch_of([0] * 4 + [1] * 4)
    batch.sent.data.zero_()
    assert NeighborAttacker(5, SHAPE).measure(batch).loss.item() == pytest.approx(-1)


def test_features_that_tell_twins_apart_from_others_tell_everything():
    images = torch.rand(4, *SHAPE, dtype=torch.float64).repeat(2, 1, 1, 1)
    z = 9 * images.flatten(1)
    attacker = NeighborAttacker(z.shape[1], SHAPE)
    loss = attacker.measure(cem.Batch(images, torch.zeros(8, dtype=torch.int64), z, z)).loss
    assert -0.02 < loss <= 0


def test_distances_are_those_of_features_far_from_the_origin():
    batch, attacker = batch_of([0, 0, 0, 1, 1], dtype=torch.float32), NeighborAttacker(5, SHAPE, memory=0)
    loss = attacker.measure(batch).loss
    far = batch.sent + 1000
    moved = attacker.measure(cem.Batch(batch.images, batch.labels, far, far)).loss
    assert moved.item() == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
def test_distances_inside_tight_classes_are_those_of_fp64_however_far_classes_are_apart(scale):
    labels = torch.arange(24) % 3
    images = torch.rand(24, *SHAPE, dtype=torch.float64)
    z = (scale * torch.randn(3, 64)[labels] + 0.1 * torch.randn(24, 64)).requires_grad_()
    found = []
    for dtype in (torch.float32, torch.float64):
        sent = z.to(dtype)
        loss = NeighborAttacker(64, SHAPE, memory=0).measure(cem.Batch(images, labels, sent, sent)).loss
        found.append((loss.float(), *torch.autograd.grad(loss, z)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=0)
    assert (found[0][1] - found[1][1]).norm() < 0.05 * found[1][1].norm()


@pytest.mark.parametrize("memory", [0, 64])
@pytest.mark.parametrize("points", [1, 3])
def test_classes_that_became_points_leave_the_class_mean_and_a_gradient_that_breaks_no_weight(points, memory):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(48) % 3
        z = torch.randn(points, 96, generator=generator)[labels % points].requires_grad_()
        images = torch.rand(48, *SHAPE, generator=generator)
        attacker = NeighborAttacker(96, SHAPE, memory)
        for _ in range(2):
            loss = attacker.measure(cem.Batch(images, labels, z.detach(), z)).loss
        assert loss.item() == pytest.approx(-1, abs=1e-3)
        assert torch.autograd.grad(loss, z)[0].abs().max() < 1


def test_an_ignored_sample_is_not_looked_at():
    batch, attacker = batch_of([0, 0, -100, 0]), NeighborAttacker(5, SHAPE)
    expected = attacker.measure(batch).loss
    batch.sent.data[2], batch.images[2] = torch.nan, torch.inf
    loss = NeighborAttacker(5, SHAPE).measure(batch).loss
    assert loss == expected
    assert torch.autograd.grad(loss, batch.sent)[0].isfinite().all()


def test_batches_that_do_not_fit_are_refused():
    batch, attacker = batch_of([0, 0, 1]), NeighborAttacker(5, SHAPE)
    with pytest.raises(ValueError, match=r"images must have shape \[3, 2, 6, 4\], got None"):
        attacker.measure(replace(batch, images=None))
    with pytest.raises(ValueError, match=r"got \[3, 2, 6, 3\]"):
        attacker.measure(replace(batch, images=batch.images[..., :3]))
    with pytest.raises(ValueError, match=r"5 numbers a sample, got \[3, 4\]"):
        attacker.measure(replace(batch, sent=batch.sent[:, :4]))


def test_it_composes_with_noise_and_leaves_features_as_they_are():
    context = cem.Context(feature_shape=(8, 4, 4), image_shape=(3, 64, 64), num_classes=10, noise_std=0.1)
    defense = cem.DEFENSES.build("inversion", context, AttentionInversion.Options(memory=16))
    z = torch.rand(2, 8, 4, 4)
    assert defense(z) is z
    assert defense.sigma() == 0
    assert defense.term().pixels.shape == (16, 3 * 16 * 16)


@pytest.mark.parametrize("wrong", [{"feature_dim": 0}, {"memory": -1}, {"memory": 2.5}, {"image_shape": (6, 4)}])
def test_sizes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NeighborAttacker(**{"feature_dim": 5, "image_shape": SHAPE} | wrong)
