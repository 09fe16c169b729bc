"""What the attention surrogate measures."""

import math
import warnings

import pytest
import torch
from attention_surrogates import batch, draw, gradient_of, slots_by_hand, surrogate

import cem
from cem.training.injection import penalty_of


def test_slots_need_no_cross_attention():
    enhanced, slots = set(surrogate().state_dict()), set(surrogate(measure="slots").state_dict())
    assert slots == {name for name in enhanced if name.startswith("slot_attention.")}
    assert slots < enhanced


def test_enhanced_is_the_default():
    features, labels = batch()
    assert surrogate(measure="enhanced").eval()(features, labels) == surrogate().eval()(features, labels)


@pytest.mark.parametrize("hinge", ["relu", "softplus", "identity"])
def test_slots_measure_features_as_they_are_around_the_centroids_of_slots(hinge):
    features, labels = batch()
    module = surrogate(measure="slots", hinge=hinge).eval()
    x = features.clone().requires_grad_()
    want = slots_by_hand(module, x[:, None], labels, hinge=hinge)
    loss, gradient = gradient_of(module, features, labels)
    torch.testing.assert_close(loss, want.rob_loss)
    torch.testing.assert_close(module(features, labels)[1], want.intra_mse)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.rob_loss, x)[0])


def test_slots_follow_the_noise_that_is_given():
    features, labels = batch()
    module = surrogate(measure="slots").train()
    loss = module(features, labels, slot_noise=draw())[0]
    assert loss.item() == pytest.approx(slots_by_hand(module, features[:, None], labels, noise=draw()).rob_loss.item())
    assert loss.item() != pytest.approx(module(features, labels, slot_noise=draw(seed=8))[0].item())


def test_slots_obey_threshold_floor_and_least_number_of_samples():
    features, labels = batch()
    numbers = {"eps_var": 0.3, "gamma": 0.2, "min_samples": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the floor swamps the threshold
        module = surrogate(measure="slots", **numbers, threshold="fixed", threshold_value=0.2).eval()
    want = slots_by_hand(module, features[:, None], labels, threshold=0.2, **numbers).rob_loss
    assert module(features, labels)[0].item() == pytest.approx(want.item())
    assert 0 < (labels.bincount() < 5).sum() < 5


def test_slots_tell_two_clusters_of_a_class_apart_from_one():
    generator = torch.Generator().manual_seed(0)
    spread = 0.1 * torch.randn(40, 16, generator=generator)
    labels = torch.zeros(40, dtype=torch.int64)
    two = torch.randn(2, 16, generator=generator)[torch.arange(40) % 2]
    module = surrogate(measure="slots", hinge="identity").eval()
    apart = module(two + spread, labels)[0].item()
    variance = (two + spread).var(0)
    around_the_mean = torch.log((variance + 1e-6) / (0.025 + 1e-6)).mean().item()
    assert apart < around_the_mean - 0.5


def test_slots_know_how_large_features_are_against_the_noise():
    features, labels = batch()
    module = surrogate(measure="slots", hinge="identity").eval()
    near, far = (module(scale * features, labels)[0].item() for scale in (1, 10))
    assert far - near == pytest.approx(2 * math.log(10), abs=1e-3)


def test_enhanced_does_not_know_how_large_features_are():
    features, labels = batch()
    module = surrogate(hinge="identity").eval()
    near, far = (module(scale * features, labels)[0].item() for scale in (1, 10))
    assert far == pytest.approx(near, abs=1e-3)


def test_slots_are_lowered_by_gradient_descent_on_the_features():
    features, labels = batch()
    module = surrogate(measure="slots").eval()
    before = module(features, labels)[0].item()
    x = features.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        module(x, labels)[0].backward()
        optimizer.step()
    assert module(x, labels)[0].item() < 0.5 * before


def test_slots_pass_no_gradient_to_their_parameters():
    features, labels = batch()
    module = surrogate(measure="slots").train()
    penalty = penalty_of(module, features, labels)
    assert not any(gradient.any() for gradient in penalty.grads)
    assert penalty.z_grad.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("penalty", ["hinge", "entropy"])
def test_slots_of_eager_equal_those_of_reference(training, penalty):
    features, labels = batch()
    results = []
    for backend in ("eager", "reference"):
        module = surrogate(measure="slots", penalty=penalty, backend=backend).double().train(training)
        x = features.double().requires_grad_()
        rob_loss, intra_mse = module(x, labels, slot_noise=draw().double())
        results.append([rob_loss, intra_mse, torch.autograd.grad(rob_loss + intra_mse, x)[0]])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_slots_repeat_exactly_in_evaluation_and_survive_a_reload():
    features, labels = batch()
    module, other = (
        surrogate(measure="slots").eval(),
        cem.SlotCrossAttentionCEM(16, num_slots=4, reg_strength=0.5, num_classes=5, measure="slots").eval(),
    )
    other.load_state_dict(module.state_dict(), strict=True)
    assert module(features, labels) == module(features, labels)
    assert module(features, labels) == other(features, labels)


def test_slots_are_drawn_afresh_in_training():
    features, labels = batch()
    module = surrogate(measure="slots").train()
    assert not torch.equal(module(features, labels)[0], module(features, labels)[0])


def test_slots_of_spatial_tokens_belong_to_positions():
    features, labels = batch(width=4 * 6)
    maps = features.view(24, 4, 2, 3)
    module = surrogate(24, measure="slots", tokens="spatial", feature_shape=(4, 2, 3), num_heads=2).eval()
    tokens = maps.flatten(2).mT  # [B, 6 positions, 4 channels]
    want = slots_by_hand(module, tokens, labels)
    torch.testing.assert_close(module(maps, labels), (want.rob_loss, want.intra_mse))
    torch.testing.assert_close(module(features, labels), (want.rob_loss, want.intra_mse))


def test_slots_of_spatial_tokens_of_one_position_are_flat_ones():
    features, labels = batch()
    flat = surrogate(measure="slots").eval()
    spatial = surrogate(measure="slots", tokens="spatial", feature_shape=(16, 1, 1)).eval()
    spatial.load_state_dict(flat.state_dict(), strict=True)
    assert spatial(features, labels) == flat(features, labels)


def test_slots_of_spatial_tokens_after_conv1x1_are_as_wide_as_its_channels():
    features, labels = batch(width=8 * 4)
    sizes = {"reduce": "conv1x1", "reduce_dim": 6, "feature_shape": (8, 2, 2)}
    module = surrogate(32, measure="slots", tokens="spatial", **sizes).eval()
    assert module.slot_attention.slot_dim == 6
    tokens = torch.einsum("oc,bchw->bhwo", module.reduction.weight[:, :, 0, 0], features.view(24, 8, 2, 2)).flatten(
        1, 2
    )
    raw = features.view(24, 8, 4).mT
    assert module(features, labels)[0].item() == pytest.approx(
        slots_by_hand(module, tokens, labels, raw).rob_loss.item()
    )


def test_slots_without_a_class_of_enough_samples_give_an_attached_zero():
    features = torch.randn(4, 16, requires_grad=True)
    rob_loss, intra_mse = surrogate(measure="slots")(features, torch.arange(4))
    assert (rob_loss.item(), intra_mse.item()) == (0, 0)
    rob_loss.backward()
    assert not features.grad.any()


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("num_classes", [5, None])
def test_slots_of_an_empty_batch_give_zero(num_classes, backend):
    features = torch.randn(0, 16, requires_grad=True)
    module = surrogate(measure="slots", num_classes=num_classes, backend=backend)
    rob_loss, _ = module(features, torch.zeros(0, dtype=torch.int64))
    assert rob_loss.item() == 0
    rob_loss.backward()


def test_slots_leave_an_infinite_sample_alone_in_its_class_out():
    features, labels = batch()
    labels = labels.clamp(max=3)
    labels[0] = 4
    module = surrogate(measure="slots").eval()
    want = gradient_of(module, features, labels)
    features[0] = math.inf
    torch.testing.assert_close(gradient_of(module, features, labels), want)


def test_slots_read_classes_off_the_labels_without_num_classes():
    features, labels = batch()
    known, unknown = surrogate(measure="slots").eval(), surrogate(measure="slots", num_classes=None).eval()
    names = torch.tensor([100, -3, 7, 2_000_000_000, 5])
    torch.testing.assert_close(unknown(features, names[labels]), known(features, labels))


def test_slots_do_not_change_under_autocast():
    features, labels = batch()
    module = surrogate(measure="slots").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(features, labels)
    assert found == module(features, labels)


def test_slots_of_bf16_features_keep_their_spread():
    features, labels = batch(200)
    center = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    narrow = (center[labels] + 0.05 * features).bfloat16()
    module = surrogate(measure="slots", hinge="identity").eval()
    found, want = (
        gradient_of(module, narrow.to(dtype), labels)[1].float() for dtype in (torch.bfloat16, torch.float32)
    )
    assert float((found - want).norm() / want.norm()) < 0.005  # bf16 rounds by 0.4 %


@pytest.mark.slow
def test_slots_compile_as_one_graph_under_a_static_bound():
    features, labels = batch()
    module, other = (
        surrogate(measure="slots", max_class_size=24, memory_bank=3, backend="eager").train() for _ in range(2)
    )
    for each in (module, other):
        each.bank.remember(*batch(seed=1))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        gradient_of(compiled, features, labels, slot_noise=draw()),
        gradient_of(other, features, labels, slot_noise=draw()),
    )
    assert torch.equal(module.bank.features, other.bank.features)


def test_slots_of_a_reduction_know_how_large_features_themselves_are_against_the_noise():
    features, _ = batch(400, width=64)
    labels = torch.zeros(400, dtype=torch.int64)
    whole, reduced = (
        surrogate(64, measure="slots", penalty="entropy", **kwargs).eval()(features, labels)[0].item()
        for kwargs in ({"num_slots": 1}, {"num_slots": 2, "reduce_dim": 32})
    )
    assert reduced == pytest.approx(whole, rel=0.1)
