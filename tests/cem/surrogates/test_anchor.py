"""Running centroids of classes, and the variance that the attention surrogate measures around them."""

import math

import pytest
import torch

import cem
from cem.surrogates.anchor import Anchors
from cem_kernels import ClassGroups, class_variance

MOMENTUM = 0.95
OF_VARIANCES = 0.5


def batch(num_samples=24, width=6, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, width, generator=generator, dtype=torch.float64) + 3.0
    return features, torch.randint(0, num_classes, (num_samples,), generator=generator)


def grouped(labels, num_classes=4, bound=None):
    return ClassGroups.from_labels(labels, num_classes, max_class_size=bound)


def moved(seed):
    features, labels = batch(seed=seed)
    return features, grouped(labels)


def anchors(num_classes=4, width=6, momentum=MOMENTUM):
    return Anchors(num_classes, width, momentum).double()


def surrogate(**kwargs):
    options = {"measure": "slots", "num_slots": 1, "num_classes": 4, "reg_strength": 0.5, "anchor": MOMENTUM, **kwargs}
    return cem.SlotCrossAttentionCEM(6, **options)


def test_the_first_batch_sets_centroids_and_variances():
    x, labels = batch()
    module = anchors()
    variance, mse = module(x, grouped(labels))
    for c in range(4):
        own = x[labels == c]
        torch.testing.assert_close(module.centroids[c], own.mean(dim=0))
        torch.testing.assert_close(module.variances[c], own.var(dim=0, unbiased=False))
        torch.testing.assert_close(variance[c], own.var(dim=0, unbiased=False))
        torch.testing.assert_close(mse[c], own.var(dim=0, unbiased=False).mean())
    assert module.batches.tolist() == [1, 1, 1, 1]


def test_early_centroids_and_variances_are_means_over_batches():
    (x, labels), (y, other) = batch(seed=1), batch(seed=2)
    module = anchors()
    module(x, grouped(labels))
    variance, mse = module(y, grouped(other))
    for c in range(4):
        old, new = x[labels == c], y[other == c]
        around = (new - old.mean(dim=0)).square().mean(dim=0)
        torch.testing.assert_close(module.centroids[c], (old.mean(dim=0) + new.mean(dim=0)) / 2)
        torch.testing.assert_close(variance[c], (old.var(dim=0, unbiased=False) + around) / 2)
        torch.testing.assert_close(mse[c], new.var(dim=0, unbiased=False).mean())


def test_later_batches_move_them_by_the_momentum():
    module = anchors()
    for seed in range(25):
        module(*moved(seed))
    before = {name: each.clone() for name, each in module.state_dict().items()}
    x, labels = batch(seed=7)
    variance, _ = module(x, grouped(labels))
    for c in range(4):
        own, old = x[labels == c], before["centroids"][c]
        around = (own - old).square().mean(dim=0)
        torch.testing.assert_close(module.centroids[c], MOMENTUM * old + (1 - MOMENTUM) * own.mean(dim=0))
        moved_by = (1 - OF_VARIANCES) * around
        torch.testing.assert_close(variance[c], OF_VARIANCES * before["variances"][c] + moved_by)


def test_variances_of_quick_centroids_are_the_batch_s():
    module = anchors(momentum=0.8)
    module(*moved(0))
    before = module.centroids.clone()
    x, labels = batch(seed=7)
    variance, _ = module(x, grouped(labels))
    for c in range(4):
        torch.testing.assert_close(variance[c], (x[labels == c] - before[c]).square().mean(dim=0))


def test_gradients_are_those_of_the_batch_s_own_variance_around_the_centroids_of_before():
    (x, labels), (y, other) = batch(seed=1), batch(seed=2)
    module = anchors()
    module(x, grouped(labels))
    before = module.centroids.clone()
    y.requires_grad_()
    weight = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad((weight * module(y, grouped(other))[0]).sum(), y)
    share = weight / other.bincount(minlength=4)[:, None]
    torch.testing.assert_close(found, 2 * share[other] * (y.detach() - before[other]))


def test_shrinking_all_features_makes_a_batch_s_variance_smaller_and_the_anchored_one_larger():
    # Four classes far apart, and little spread inside each.
    spread, labels = 0.1 * batch(200)[0], torch.arange(200) % 4
    x = 10 * torch.eye(4, 6, dtype=torch.float64)[labels] + spread
    module = anchors()
    before = module(x, grouped(labels))[0]
    anchored = module(0.5 * x, grouped(labels))[0]
    batches_own = class_variance(0.5 * x, grouped(labels), threshold=1e-3).intra_mse
    assert batches_own.item() == pytest.approx(
        0.25 * class_variance(x, grouped(labels), threshold=1e-3).intra_mse.item()
    )
    assert anchored.mean().item() > 2 * before.mean().item()


def test_a_class_without_samples_moves_nothing():
    module = anchors()
    x, _ = batch(3)
    variance, mse = module(x, grouped(torch.tensor([0, 0, 2])))
    assert module.batches.tolist() == [1, 0, 1, 0]
    for each in (module.centroids, variance, mse):
        assert not each[[1, 3]].any()


def test_a_single_sample_is_drawn_to_the_centroid_of_its_class():
    module = anchors()
    module(*moved(0))
    before = module.centroids[2].clone()
    x = batch(1)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(module(x, grouped(torch.tensor([2])))[0].sum(), x)
    torch.testing.assert_close(gradient[0], 2 * (x[0].detach() - before))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_class_that_is_not_finite_moves_nothing_and_is_not_hidden(bad):
    x, labels = batch()
    module = anchors()
    module(x, grouped(labels))
    before = {name: each.clone() for name, each in module.state_dict().items()}
    broken = x + 1
    broken[labels == 1, 0] = bad
    variance, _ = module(broken, grouped(labels))
    assert not variance[1].isfinite().all()
    assert variance[[0, 2, 3]].isfinite().all()
    torch.testing.assert_close(module.centroids[1], before["centroids"][1])
    torch.testing.assert_close(module.variances[1], before["variances"][1])
    assert not torch.equal(module.centroids[0], before["centroids"][0])


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.5, math.nan])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match="anchor must lie between 0 and 1"):
        Anchors(4, 6, momentum)


# in the surrogate


@pytest.mark.parametrize("options", [{}, {"penalty": "entropy"}, {"hinge": "softplus"}, {"gamma": 0.01}])
def test_the_first_batch_is_nearly_the_class_variance(options):
    x, labels = batch(4000)
    anchored, plain = surrogate(**options).double(), surrogate(anchor=0.0, **options).double()
    # But for n / (n - 1).
    assert [each.item() for each in anchored(x, labels)] == pytest.approx(
        [each.item() for each in plain(x, labels)], rel=1e-2
    )


def test_evaluation_measures_the_batch_alone_and_moves_nothing():
    x, labels = batch()
    module = surrogate().double()
    module(x, labels)
    before = {name: each.clone() for name, each in module.state_dict().items()}
    y, other = batch(seed=5)
    want = surrogate(anchor=0.0).double().eval()(y, other)
    torch.testing.assert_close(module.eval()(y, other), want)
    for name, each in module.state_dict().items():
        assert torch.equal(each, before[name]), name


def test_anchors_are_part_of_the_checkpoint():
    x, labels = batch()
    module, other = surrogate().double(), surrogate().double()
    module(x, labels)
    other.load_state_dict(module.state_dict())
    y, more = batch(seed=5)
    torch.testing.assert_close(other(y, more), module(y, more), rtol=0, atol=0)


def test_a_batch_of_one_sample_a_class_is_penalised_for_its_distance_to_the_anchors():
    x, labels = torch.eye(4, 6, dtype=torch.float64), torch.arange(4)
    module = surrogate().double()
    module(x, labels)
    away = (1.5 * x).requires_grad_()
    rob_loss, _ = module(away, labels)
    (gradient,) = torch.autograd.grad(rob_loss, away)
    assert rob_loss.item() > 0
    # Back towards where it was: along the class's own axis alone.
    assert torch.equal(gradient > 0, x > 0)


def test_an_empty_batch_gives_an_attached_zero():
    x = batch(0)[0].requires_grad_()
    rob_loss, intra_mse = surrogate().double()(x, torch.zeros(0, dtype=torch.long))
    (gradient,) = torch.autograd.grad(rob_loss, x)
    assert (rob_loss.item(), intra_mse.item(), gradient.shape) == (0.0, 0.0, (0, 6))


@pytest.mark.parametrize("options", [{"measure": "enhanced"}, {"num_slots": 2}, {"memory_bank": 4}])
def test_what_anchors_do_not_go_with_is_refused(options):
    message = "anchor needs measure='slots' and num_slots=1, and no memory_bank"
    with pytest.raises(ValueError, match=message):
        surrogate(**options)


def test_anchors_need_the_number_of_classes():
    with pytest.raises(ValueError, match="anchor needs num_classes"):
        surrogate(num_classes=None)


@pytest.mark.parametrize("options", [{"objective": "likelihood"}, {"reduce_dim": 3}])
def test_options_of_slots_are_refused_where_none_are_computed(options):
    with pytest.raises(ValueError, match="measure='slots' with num_slots=1 computes no slots"):
        surrogate(anchor=0.0, **options)
