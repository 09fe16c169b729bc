"""Running slots of classes, as the surrogate has them: modes that a centroid would merge, state, positions."""

import math

import pytest
import torch
from small_surrogates import CLASSES, WIDTH, batch, build, seen

import cem
from cem_kernels import BackendUnavailableError, Nats

STD = 0.5


def slots(noise_std=STD, **options):
    return cem.SlotCEM(WIDTH, CLASSES, noise_std, **options)


@pytest.mark.parametrize("first", [1, 2, 40])
def test_modes_are_found_however_few_samples_a_class_begins_with(first):
    module = slots()
    for step in range(40):
        features, labels = of_two_modes(seed=step)
        loss = module(*((features[:first], labels[:first]) if step == 0 else (features, labels)))[0]
    assert loss < 0.5 * cem.CentroidCEM(WIDTH, CLASSES, STD)(features, labels)[0]
    assert module.shares[0].sum().item() == pytest.approx(1)


def test_more_slots_than_kernels_take_are_refused_at_once():
    with pytest.raises(BackendUnavailableError, match="kernels take at most 16 slots, got 17"):
        slots(num_slots=17, backend="triton")
    assert slots(num_slots=17)(*of_two_modes())[0] > 0


def of_two_modes(seed=0, num_samples=40):
    """Classes whose samples are near one of two points, far from each other."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_samples) % 2
    mode = torch.arange(num_samples) // 2 % 2
    return 4.0 * (2 * mode - 1)[:, None] + 0.3 * torch.randn(num_samples, WIDTH, generator=generator), labels


def pulled(module, steps=100, rate=80.0):
    """Features that follow the gradient of the loss alone, and how far the modes of a class are apart at last."""
    torch.manual_seed(0)
    features, labels = of_two_modes()
    for _ in range(steps):
        leaf = features.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(module(leaf, labels)[0], leaf)
        features = features - rate * gradient
    first, second = (features[labels == 0][mode::2].mean(dim=0) for mode in (0, 1))
    return float((first - second).norm() / math.sqrt(WIDTH)), features


def test_two_modes_of_a_class_stay_apart_where_a_centroid_merges_them():
    (apart, kept), (merged, _) = pulled(slots(num_slots=2)), pulled(cem.CentroidCEM(WIDTH, CLASSES, STD))
    assert apart > 7.5
    assert merged < 1
    within = kept[::4].var(dim=0).mean()
    assert within < 0.5 * of_two_modes()[0][::4].var(dim=0).mean()


def test_samples_near_their_slots_cost_what_their_modes_vary_by_and_not_what_they_are_apart():
    x, labels = of_two_modes(num_samples=400)
    loss, mse = slots(num_slots=2)(x, labels)
    assert mse.item() == pytest.approx(0.09, rel=0.1)
    assert loss.item() == pytest.approx(Nats(STD).cost(torch.tensor(0.09)).item(), rel=0.1)
    assert cem.CentroidCEM(WIDTH, CLASSES, STD)(x, labels)[0] > 10 * loss


def test_evaluation_measures_the_batch_alone():
    x, labels = batch(60)
    loss = slots().eval()(x, labels)[0]
    of_class = torch.stack([Nats(STD).cost(x[labels == c].var(dim=0)).mean() for c in range(CLASSES)])
    assert loss.item() == pytest.approx((labels.bincount() / 60 * of_class).sum().item(), rel=1e-5)


def test_positions_are_samples_of_their_image_s_class():
    maps = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 1, 2, -100])
    spatial = cem.SlotCEM(4, CLASSES, STD, num_slots=2, spatial=True)
    plain = cem.SlotCEM(4, CLASSES, STD, num_slots=2)
    found = seen(spatial, maps, labels)
    want = seen(plain, maps.permute(0, 2, 3, 1).reshape(24, 4), labels.repeat_interleave(4))
    torch.testing.assert_close(found.rob_loss, want.rob_loss)
    torch.testing.assert_close(found.gradient.permute(0, 2, 3, 1).reshape(24, 4), want.gradient)
    torch.testing.assert_close(found.state, want.state)
    assert not found.gradient[5].any()


def test_build_takes_the_run_and_the_options():
    module = build("slots", {"num_slots": 5, "spatial": True}, num_classes=7, noise_std=0.1, backend="reference")
    found = (module.feature_dim, module.num_classes, module.penalty, module.num_slots, module.spatial, module.backend)
    assert found == (4, 7, Nats(0.1), 5, True, "reference")
    with pytest.raises(ValueError, match=r"spatial tokens need features \(C, H, W\), got \(16,\)"):
        build("slots", {"spatial": True}, feature_shape=(16,))
