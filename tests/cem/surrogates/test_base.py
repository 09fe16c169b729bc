"""What every surrogate shares."""

import copy
import dataclasses
import math

import pytest
import torch

import cem
from cem.surrogates import COMPARED, CONTROL, RECOMMENDED, NoSurrogate

CONTEXT = cem.Context(feature_shape=(4, 2, 2), image_shape=(3, 8, 8), num_classes=5, noise_std=0.5)
LONG = torch.zeros(4, dtype=torch.long)


def batch(num_samples=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, 16, generator=generator)
    return features, torch.randint(0, 5, (num_samples,), generator=generator)


def built(name):
    """A surrogate that has seen an epoch."""
    torch.manual_seed(0)
    module = cem.SURROGATES.build(name, CONTEXT)
    module(*batch(seed=1))
    module.after_epoch(*batch(200, seed=2))
    return module


@pytest.fixture(params=cem.SURROGATES)
def surrogate(request):
    return built(request.param)


@pytest.fixture(params=[name for name in cem.SURROGATES if name != CONTROL])
def penalty(request):
    """A surrogate that is more than a zero."""
    return built(request.param)


def same_state(module, before):
    return all(torch.equal(each, before[name]) for name, each in module.state_dict().items())


class Mean(cem.Surrogate):
    """The mean of all features."""

    def measure(self, batch):
        return cem.Measured(batch.features.mean(), {"intra_mse": batch.features.var()})


# what it says of itself


def test_a_surrogate_has_a_name_a_summary_and_a_schedule(surrogate):
    assert cem.SURROGATES[surrogate.name] is type(surrogate)
    assert surrogate.summary
    assert "\n" not in surrogate.summary
    assert surrogate.schedule in ("constant", "rising")


def test_options_are_frozen_and_have_a_weight(surrogate):
    options = type(surrogate).Options()
    assert options.checked() == options
    assert options.weight == 0 if surrogate.name == CONTROL else options.weight > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.weight = 1.0


def test_the_recommended_surrogate_is_compared_with_the_control():
    assert cem.CentroidCEM.name == RECOMMENDED
    assert {CONTROL, RECOMMENDED} < set(COMPARED) <= set(cem.SURROGATES)


def test_a_surrogate_of_yours_is_built_without_options():
    assert isinstance(Mean.build(Mean.Options(), CONTEXT), Mean)
    assert (Mean.Options().weight, Mean.schedule) == (1.0, "constant")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "NoSurrogate()"),
        ("mixture", "GaussianMixtureCEM(16, num_classes=5, num_clusters=15, reg_strength=0.5, fit='kmeans')"),
        ("attention", "16, num_classes=5, spatial=False, threshold=0.025, hinge='relu', backend='auto'"),
        ("centroid", "CentroidCEM(16, num_classes=5, noise_std=0.5, momentum=0.99, backend='auto')"),
    ],
)
def test_a_surrogate_prints_what_it_was_made_of(name, said):
    assert said in repr(cem.SURROGATES.build(name, CONTEXT))


# the call


def test_a_call_gives_what_is_measured(surrogate):
    features, labels = batch()
    loss, monitors, own_loss = surrogate.eval().measure(cem.Batch(None, labels, features, features))
    assert surrogate(features, labels) == (loss, monitors["intra_mse"])
    assert own_loss is None


def test_results_are_numbers_on_the_graph_of_the_features(penalty):
    features, labels = batch()
    rob_loss, intra_mse = penalty.eval()(features.requires_grad_(), labels)
    rob_loss.backward()
    assert rob_loss.shape == intra_mse.shape == ()
    assert rob_loss.item() > 0 < intra_mse.item()
    assert features.grad.any()


def test_maps_are_their_flattened_rows(surrogate):
    features, labels = batch()
    maps = features.view(40, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    assert surrogate.eval()(maps, labels) == surrogate(features, labels)


def test_unique_labels_of_the_batch_change_nothing(surrogate):
    features, labels = batch()
    assert surrogate.eval()(features, labels, labels.unique()) == surrogate(features, labels)


def test_unique_labels_restrict_to_those_classes(surrogate):
    features, labels = batch()
    chosen = (labels == 1) | (labels == 3)
    found = surrogate.eval()(features, labels, torch.tensor([3, 1]))
    assert found == surrogate(features[chosen], labels[chosen])


def test_an_empty_batch_gives_attached_zeros(surrogate):
    features = torch.zeros(0, 16, requires_grad=True)
    results = surrogate(features, LONG[:0])
    assert [each.item() for each in results] == [0, 0]
    results[0].backward()
    assert features.grad.shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_single_precision(surrogate, dtype):
    features, labels = batch()
    features = features.to(dtype).requires_grad_()
    rob_loss, intra_mse = surrogate.eval()(features, labels)
    rob_loss.backward()
    assert rob_loss.dtype == intra_mse.dtype == torch.float32
    assert features.grad.isfinite().all()
    torch.testing.assert_close(rob_loss, surrogate(features.float(), labels)[0], rtol=1e-2, atol=1e-3)


def test_autocast_changes_nothing(surrogate):
    features, labels = batch()
    expected = surrogate.eval()(features, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert surrogate(features, labels) == expected


def test_a_state_dict_resumes_exactly(surrogate):
    other = cem.SURROGATES.build(surrogate.name, CONTEXT)
    other.load_state_dict(copy.deepcopy(surrogate.state_dict()), strict=True)
    results = []
    for each in (surrogate, other):
        torch.manual_seed(3)
        results.append([each(*batch(seed=seed)) for seed in range(3)])
    assert results[0] == results[1]
    assert same_state(other, surrogate.state_dict())


# what is refused


@pytest.mark.parametrize("unique", [None, torch.zeros(1, dtype=torch.long)], ids=["all", "some"])
@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (torch.ones(4, 16, dtype=torch.long), LONG, TypeError, "features must be a floating-point tensor, got .*int64"),
        (torch.ones(4, 16), torch.zeros(4), TypeError, "labels must be an integer tensor, got torch.float32"),
        (torch.ones(4, 16), LONG.bool(), TypeError, "labels must be an integer tensor, got torch.bool"),
        (torch.ones(4, 16), [0, 0, 1, 1], TypeError, "labels must be an integer tensor, got list"),
        (torch.ones(4, 15), LONG, ValueError, r"must have feature_dim=16 features, got \[4, 15\]"),
        (torch.ones(16), LONG, ValueError, r"features must have shape \[B, D\] or \[B, C, H, W\], got \[16\]"),
        (torch.ones(4, 2, 8), LONG, ValueError, r"\[B, C, H, W\], got \[4, 2, 8\]"),
        (torch.ones(4, 0), LONG, ValueError, r"\[B, C, H, W\], got \[4, 0\]"),
        (torch.ones(4, 16), LONG[:3], ValueError, r"labels must have shape \[B=4\], got \[3\]"),
        (torch.ones(4, 16), LONG[:, None], ValueError, r"labels must have shape \[B\], got \[4, 1\]"),
        (torch.ones(4, 16), LONG.to("meta"), ValueError, "labels must be on the features' device cpu, got meta"),
    ],
)
def test_a_bad_batch_is_refused(penalty, features, labels, error, message, unique):
    with pytest.raises(error, match=message):
        penalty(features, labels, unique)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_is_refused(penalty, label):
    labels = torch.tensor([0, label, 2, 0])
    message = rf"labels must lie in \[0, 5\), .*, got values from {min(0, label)} to {max(2, label)}"
    with pytest.raises(ValueError, match=message):
        penalty(torch.ones(4, 16), labels)


def test_unique_labels_that_are_no_integers_are_refused(penalty):
    with pytest.raises(TypeError, match=r"unique_labels must be an integer tensor, got torch\.float32"):
        penalty(torch.ones(4, 16), LONG, torch.zeros(1))


# images


class Brightness(cem.Surrogate):
    """How bright images are, for each of the features."""

    needs_images = True

    def measure(self, batch):
        loss = (batch.features.mean(1) * batch.images.flatten(1).mean(1)).sum()
        return cem.Measured(loss, {"intra_mse": loss})


def test_a_surrogate_that_needs_images_refuses_a_call_without():
    with pytest.raises(ValueError, match=r"Brightness needs images=\[B, C, H, W\]"):
        Brightness()(torch.ones(4, 16), LONG)


def test_images_go_with_their_features():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
    module, labels = Brightness(), torch.arange(4)
    assert module(torch.ones(4, 16), labels, images=images)[0].item() == 6
    assert module(torch.ones(4, 16), labels, torch.tensor([1, 3]), images=images)[0].item() == 4


# assessing


def test_assess_moves_nothing(penalty):
    before = copy.deepcopy(penalty.state_dict())
    assert math.isfinite(penalty.assess(*batch(seed=3)))
    assert same_state(penalty, before)
    assert penalty.training


def test_assess_is_the_mean_over_samples_of_batches_in_evaluation():
    seen = []

    class Noted(Mean):
        def measure(self, batch):
            seen.append((len(batch.labels), self.training))
            return super().measure(batch)

    features, labels = torch.arange(200.0)[:, None], torch.zeros(200, dtype=torch.long)
    assert Noted().assess(features, labels) == pytest.approx(99.5)
    assert seen == [(128, False), (72, False)]


def test_assess_draws_batches_at_random():
    class First(Mean):
        def measure(self, batch):
            first = batch.features[0].sum()
            return cem.Measured(first, {"intra_mse": first})

    features, labels = torch.arange(256.0)[:, None], torch.zeros(256, dtype=torch.long)
    torch.manual_seed(0)
    assert First().assess(features, labels) != First().assess(features, labels)


def test_assess_refits_what_is_refitted_after_epochs():
    module, (features, labels) = cem.GaussianMixtureCEM(16, 5, num_clusters=2, reg_strength=0.5), batch()
    assert module(features, labels)[0].item() == 0
    assert module.assess(features, labels) > 0
    assert not module.class_counts.any()


def test_assess_leaves_no_graph_behind(penalty):
    features, labels = batch()
    assert isinstance(penalty.assess(features.requires_grad_(), labels), float)
    assert features.grad is None


# the control


def test_no_surrogate_is_a_zero_whose_gradient_is_zero_even_for_nan():
    features = torch.full((3, 4), float("nan"), requires_grad=True)
    rob_loss, intra_mse = NoSurrogate()(features, LONG[:3])
    rob_loss.backward()
    assert (rob_loss.item(), intra_mse.item()) == (0, 0)
    assert torch.equal(features.grad, torch.zeros(3, 4))


def test_no_surrogate_has_no_value():
    assert NoSurrogate().assess(*batch()) is None
