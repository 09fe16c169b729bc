"""What the attention surrogate remembers of earlier batches, and what it makes of that."""

import math

import pytest
import torch
from attention_surrogates import MEASURES, batch, draw, gradient_of, slots_by_hand, surrogate

from cem.training.injection import penalty_of

PENALTIES = [(measure, penalty) for measure in ("enhanced", "slots") for penalty in ("hinge", "entropy")]


def remembering(size=6, **kwargs):
    return surrogate(memory_bank=size, **kwargs).train()


def same_without_memory(module, **kwargs):
    other = surrogate(**kwargs).to(module.slot_attention.slot_mu).train()
    other.load_state_dict({name: value for name, value in module.state_dict().items() if "bank" not in name})
    return other


def test_memory_is_off_by_default_and_then_not_in_the_state_dict():
    assert not [name for name in surrogate().state_dict() if "bank" in name]
    assert {name for name in remembering().state_dict() if "bank" in name} == {"bank.features", "bank.written"}


@pytest.mark.parametrize("kwargs", [{"memory_bank": 4, "num_classes": None}, {"memory_bank": -1}])
def test_memory_of_unknown_classes_or_a_negative_size_is_refused(kwargs):
    with pytest.raises(ValueError, match="memory_bank must be at least 0, and needs num_classes, got"):
        surrogate(**kwargs)


def test_memory_holds_what_is_measured_before_it_is_normalized():
    features, labels = batch(10)
    module = remembering()
    module(features, labels)
    assert module.bank.written.tolist() == labels.bincount(minlength=5).tolist()
    for c in range(5):
        held = module.bank.features[c, : (labels == c).sum()]
        assert torch.equal(held, features[labels == c])


def test_memory_holds_features_before_they_are_reduced():
    features, labels = batch(10)
    module = remembering(reduce_dim=8)
    module(features, labels)
    c = int(labels[0])
    torch.testing.assert_close(module.bank.features[c, 0], features[0])


@MEASURES
def test_memory_is_neither_filled_nor_used_in_evaluation(measure):
    features, labels = batch()
    module = remembering(measure=measure)
    module(*batch(seed=1))
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = module(features, labels)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert found == same_without_memory(module, measure=measure).eval()(features, labels)


@pytest.mark.parametrize(("measure", "penalty"), PENALTIES)
def test_memory_changes_nothing_in_the_first_batch(measure, penalty):
    features, labels = batch()
    module = remembering(measure=measure, penalty=penalty).double()
    other = same_without_memory(module, measure=measure, penalty=penalty)
    found, want = (gradient_of(each, features.double(), labels, slot_noise=draw().double()) for each in (module, other))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


@MEASURES
def test_memory_lets_a_class_with_one_sample_count(measure):
    features, labels = batch(5)[0], torch.arange(5)
    module = remembering(measure=measure)
    assert module(features, labels)[0].item() == 0
    loss, gradient = gradient_of(module, batch(5, seed=1)[0], labels)
    assert loss.item() > 0
    assert bool(gradient.any(dim=1).all())


def test_memory_measures_the_batch_together_with_what_came_before():
    (old, old_labels), (new, new_labels) = batch(15, seed=1), batch(15, seed=2)
    module = remembering(15, measure="slots")
    module(old, old_labels)
    found = module(new, new_labels, slot_noise=draw())
    together = slots_by_hand(module, torch.cat((new, old))[:, None], torch.cat((new_labels, old_labels)), noise=draw())
    share = new_labels.bincount(minlength=5) / 15  # those of the batch alone
    want = (share * together.class_penalty).sum(), (share * together.class_mse).sum()
    torch.testing.assert_close(found, want)


@MEASURES
def test_memory_of_classes_that_are_not_in_the_batch_changes_nothing(measure):
    features, labels = batch()
    module = remembering(measure=measure).double()
    other = same_without_memory(module, measure=measure)
    old, old_labels = batch(30, seed=3)
    module.bank.remember(100 * old.double(), old_labels)
    module.bank.written[:3] = 0  # only classes 3 and 4 are remembered, and only the others come
    features, labels = features[labels < 3].double(), labels[labels < 3]
    found, want = (gradient_of(each, features, labels, slot_noise=draw().double()) for each in (module, other))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(("measure", "penalty"), PENALTIES)
def test_memory_weakens_no_gradient(measure, copies, penalty):
    """Where it holds copies of the batch: the gradient is that of a batch in which all of these are alive."""
    features, labels = batch(10)[0].double(), torch.arange(10) % 5
    noise = draw().double()
    module = remembering(2 * copies, measure=measure, penalty=penalty).double()
    for _ in range(copies + 2):  # the oldest are overwritten
        module.bank.remember(features, labels)
    x = features.clone().requires_grad_()
    alive = same_without_memory(module, measure=measure, penalty=penalty)
    want = alive(x.repeat(copies + 1, 1), labels.repeat(copies + 1), slot_noise=noise)[0]
    loss, gradient = gradient_of(module, features, labels, slot_noise=noise)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, x)[0])
    assert bool(gradient.any())


def test_gradients_of_a_sample_do_not_depend_on_the_size_of_the_memory():
    """Of one sample among any number of remembered ones: ``2 (x − μ) / v`` a column, over the batch."""
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for size in (20, 2000):
        module = remembering(size, measure="slots", num_slots=1, hinge="identity", num_classes=1)
        module.bank.remember(torch.randn(size, 16, generator=generator), torch.zeros(size, dtype=torch.int64))
        gradient = gradient_of(module, torch.full((1, 16), 3.0), torch.zeros(1, dtype=torch.int64))[1]
        sizes.append(gradient.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.5)
    assert sizes[1] == pytest.approx(2 * 3 / 16 * math.sqrt(16), rel=0.2)


@MEASURES
def test_memory_passes_over_an_infinite_sample_alone_in_its_class(measure):
    features, labels = batch()
    labels = labels.clamp(max=3)
    labels[0] = 4
    module = remembering(measure=measure)
    other = same_without_memory(module, measure=measure)
    poisoned = features.clone()
    poisoned[0] = math.inf
    torch.testing.assert_close(module(poisoned, labels, slot_noise=draw()), other(features, labels, slot_noise=draw()))
    assert module.bank.written[4] == 0
    assert bool(module.bank.features.isfinite().all())
    assert all(loss.isfinite() for loss in module(features, labels))


def test_an_infinite_sample_alone_in_its_class_gets_no_gradient_and_spoils_no_other():
    features, labels = batch()
    labels = labels.clamp(max=3)
    labels[0] = 4
    module = remembering(measure="slots")
    want = gradient_of(module, features, labels, slot_noise=draw())[1]
    features[0] = math.inf
    found = gradient_of(remembering(measure="slots"), features, labels, slot_noise=draw())[1]
    torch.testing.assert_close(found, want)


@MEASURES
def test_memory_continues_exactly_from_a_state_dict(measure):
    module, other = remembering(measure=measure), remembering(measure=measure)
    for seed in (1, 2):
        module(*batch(seed=seed))
    other.load_state_dict(module.state_dict(), strict=True)
    for seed in (3, 4):
        found, want = (each(*batch(seed=seed), slot_noise=draw()) for each in (other, module))
        assert found == want
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in other.state_dict().items())


@MEASURES
def test_memory_of_spatial_tokens_holds_maps(measure):
    (old, old_labels), (new, new_labels) = batch(12, seed=1), batch(12, seed=2)
    kwargs = {"measure": measure, "tokens": "spatial", "feature_shape": (4, 2, 2)}
    module = remembering(12, **kwargs)
    module(old.view(12, 4, 2, 2), old_labels)
    assert module.bank.features.shape == (5, 12, 16)
    module.slot_attention.eval()  # one draw for all classes
    found = module(new.view(12, 4, 2, 2), new_labels)
    other = remembering(12, **kwargs)
    other.slot_attention.eval()
    other(old, old_labels)
    assert found == other(new, new_labels)
    assert all(loss > 0 for loss in found)


def test_memory_of_spatial_tokens_of_one_position_is_that_of_flat_ones():
    for measure in ("enhanced", "slots"):
        flat = remembering(measure=measure)
        spatial = remembering(measure=measure, tokens="spatial", feature_shape=(16, 1, 1))
        for seed in (1, 2):
            found, want = (each(*batch(seed=seed), slot_noise=draw()) for each in (spatial, flat))
            assert found == want


@MEASURES
def test_memory_sees_the_chosen_classes_only(measure):
    features, labels = batch()
    module, other = remembering(measure=measure), remembering(measure=measure)
    chosen = (labels == 1) | (labels == 3)
    for _ in range(2):
        found = module(features, labels, torch.tensor([1, 3]), slot_noise=draw())
        assert found == other(features[chosen], labels[chosen], slot_noise=draw())
    assert (module.bank.written > 0).tolist() == [False, True, False, True, False]


@MEASURES
def test_memory_fits_beside_a_static_bound_of_the_batch(measure):
    features, labels = batch(12)[0], torch.zeros(12, dtype=torch.int64)
    bounded, free = remembering(measure=measure, max_class_size=12), remembering(measure=measure)
    for _ in range(2):
        found, want = (each(features, labels, slot_noise=draw()) for each in (bounded, free))
        torch.testing.assert_close(found, want)


@MEASURES
def test_memory_of_eager_is_that_of_reference(measure):
    results = []
    for backend in ("eager", "reference"):
        module = remembering(measure=measure, backend=backend).double()
        for seed in (1, 2):
            features, labels = batch(seed=seed)
            found = gradient_of(module, features.double(), labels, slot_noise=draw().double())
        results.append(found)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@MEASURES
def test_memory_of_an_empty_batch_gives_an_attached_zero(measure):
    module = remembering(measure=measure)
    module(*batch())
    features = torch.zeros(0, 16, requires_grad=True)
    rob_loss, _ = module(features, torch.zeros(0, dtype=torch.int64))
    assert rob_loss.item() == 0
    rob_loss.backward()


@MEASURES
def test_memory_serves_a_training_step(measure):
    module = remembering(measure=measure, objective="likelihood")
    for seed in range(3):
        penalty = penalty_of(module, *batch(seed=seed))
        assert penalty.finite
    assert module.bank.written.sum() == 3 * 24


def test_own_loss_neither_uses_nor_fills_the_memory():
    features, labels = batch()
    module = remembering(objective="likelihood")
    module.slot_attention.eval()
    before = module.own_loss(features, labels)
    assert not module.bank.written.any()
    module(*batch(seed=1))
    assert module.own_loss(features, labels) == before


def test_slot_noise_of_wrong_shape_is_refused_in_the_callers_terms():
    with pytest.raises(ValueError, match=r"slot_noise must have shape \[K, S, D\] = \[5, 4, 16\], got \[3, 4, 16\]"):
        remembering()(*batch(), slot_noise=torch.randn(3, 4, 16))
