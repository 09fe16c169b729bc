"""What every surrogate shares: a member that is registered is tested here."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from small_surrogates import CLASSES, CONTEXT, batch, build, seen

import cem
from cem.surrogates import COMPARED, CONTROL, RECOMMENDED

MEMBERS = list(cem.SURROGATES)
CASES = {name: (name, {}) for name in MEMBERS} | {
    "attention, positions": ("attention", {"spatial": True, "reduction": "conv3"}),
    "attention, a ramp": ("attention", {"ramp_from": 0.01, "reduction": "linear8"}),
    "mixture, full": ("mixture", {"fit": "full", "clusters": 3}),
}
PENALTIES = [case for case, (name, _) in CASES.items() if name != CONTROL]
LONG = torch.zeros(4, dtype=torch.long)


def maps(num_samples=40, seed=0):
    features, labels = batch(num_samples, seed=seed)
    return features.view(-1, 4, 2, 2), labels


@functools.cache
def kept(case, **run):
    name, options = CASES[case]
    surrogate = build(name, options, **run)
    surrogate.before_epoch(1, 3)
    surrogate(*maps(seed=1))
    surrogate.after_epoch(*maps(200, seed=2))
    return surrogate


def built(case, **run):
    """A surrogate in the middle of a run."""
    return copy.deepcopy(kept(case, **run))


@pytest.fixture(params=CASES)
def surrogate(request):
    return built(request.param)


@pytest.fixture(params=PENALTIES)
def penalty(request):
    """A surrogate that is more than a zero."""
    return built(request.param)


every_case = pytest.mark.parametrize("case", CASES)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def state_of(surrogate):
    return copy.deepcopy(dict(surrogate.state_dict()))


def assert_same(found, want):
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


class Mean(cem.Surrogate):
    """The mean of all features."""

    def measure(self, batch):
        return cem.Measured(batch.features.mean(), {"intra_mse": batch.features.var()})


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_says_what_it_is_and_has_frozen_options(name):
    member, surrogate = cem.SURROGATES[name], build(name)
    assert member.name == name
    assert len(member.summary.splitlines()) == 1
    assert member.schedule in ("constant", "rising")
    assert repr(surrogate).startswith(f"{member.__name__}(")
    assert hasattr(surrogate, "num_classes") == ("16, num_classes=5" in repr(surrogate))
    options = member.Options()
    assert options.checked() == options
    assert options.weight == 0 if name == CONTROL else options.weight > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.weight = 1.0


def test_the_recommended_surrogate_is_compared_with_the_control():
    assert {CONTROL, RECOMMENDED} < set(COMPARED) <= set(cem.SURROGATES)


# the call


def test_a_call_gives_numbers_that_are_measured(surrogate):
    features, labels = maps()
    loss, monitors, own_loss = surrogate.eval().measure(cem.Batch(None, labels, features, features))
    assert surrogate(features, labels) == (loss, monitors["intra_mse"])
    assert loss.shape == monitors["intra_mse"].shape == ()
    assert (own_loss is None) is not any(p.requires_grad for p in surrogate.parameters())


def test_the_gradient_is_the_slope_along_itself(penalty):
    penalty, (features, labels) = penalty.double().eval(), maps()
    features = features.double()
    rob_loss, intra_mse, gradient, _ = seen(penalty, features, labels)
    assert rob_loss > 0 < intra_mse
    assert gradient.any()
    step = 1e-6 * gradient / gradient.norm()
    up, down = (seen(penalty, features + each, labels).rob_loss.item() for each in (step, -step))
    assert (up - down) / 2e-6 == pytest.approx(gradient.norm().item(), rel=1e-4)


@both_modes
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.flatten(1),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
        lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    ],
    ids=["rows", "channels last", "every second column", "samples last"],
)
def test_layout_of_features_changes_nothing(surrogate, training, layout):
    features, labels = maps()
    want, found = (seen(surrogate.train(training), x, labels) for x in (features, layout(features)))
    assert_same(found._replace(gradient=found.gradient.view_as(features)), want)


@both_modes
@pytest.mark.parametrize("unique", [[3, 1], [4, 0, 1, 2, 3]], ids=["two classes", "all classes"])
def test_unique_labels_restrict_to_those_classes(surrogate, training, unique):
    (features, labels), unique = maps(), torch.tensor(unique)
    chosen = torch.isin(labels, unique)
    found = seen(surrogate.train(training), features, labels, unique)
    want = seen(surrogate, features[chosen], labels[chosen])
    assert_same(found._replace(gradient=found.gradient[chosen]), want)
    assert not found.gradient[~chosen].any()


@both_modes
@pytest.mark.parametrize("num_samples", [0, 3], ids=["an empty batch", "ignored samples alone"])
def test_nothing_that_counts_gives_attached_zeros_and_moves_nothing(surrogate, training, num_samples):
    features, labels = torch.full((num_samples, 4, 2, 2), math.nan), torch.full((num_samples,), -100)
    found = seen(surrogate.train(training), features, labels)
    assert (found.rob_loss.item(), found.intra_mse.item()) == (0, 0)
    assert torch.equal(found.gradient, torch.zeros_like(features))
    assert_same(found.state, state_of(surrogate))


@both_modes
def test_autocast_changes_nothing(surrogate, training):
    features, labels = maps()
    want = seen(surrogate.train(training), features.requires_grad_(), labels)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = surrogate(features, labels)
    assert_same((*found, *torch.autograd.grad(found[0], features)), want[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", PENALTIES)
def test_half_precision_features_keep_the_spread_inside_their_class(case, dtype):
    surrogate = built(case, noise_std=0.05).eval()
    features, labels = maps(200)
    centers = maps(CLASSES, seed=1)[0]
    narrow = (centers[labels] + 0.05 * features).to(dtype)  # what is left inside a class when training succeeds
    found, want = (seen(surrogate, x, labels) for x in (narrow, narrow.float()))
    assert found.rob_loss.dtype == found.intra_mse.dtype == torch.float32
    assert_same(found[:2], want[:2])
    assert want.gradient.any()
    assert (found.gradient - want.gradient).norm() / want.gradient.norm() < 0.005  # bf16 rounds by 0.4 %


# labels that do not count


HOLES = torch.arange(40) % CLASSES
AWAY = torch.tensor([0, 5, 39])
HOLES[AWAY] = -100


@every_case
@both_modes
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_ignored_samples_change_nothing_and_get_zeros_back(case, training, backend):
    surrogate, counted = built(case, backend=backend).train(training), HOLES >= 0
    features = maps()[0]
    poisoned = features.index_fill(0, AWAY[:2], math.inf).index_fill(0, AWAY[2:], math.nan)
    found, want = seen(surrogate, poisoned, HOLES), seen(surrogate, features[counted], HOLES[counted])
    assert found.gradient[AWAY].eq(0).all()
    assert_same(found._replace(gradient=found.gradient[counted]), want)


@both_modes
def test_labels_out_of_range_are_ignored_where_values_are_not_read(surrogate, training, monkeypatch):
    want = seen(surrogate.train(training), maps()[0], HOLES)
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    assert_same(seen(surrogate, maps()[0], HOLES.masked_fill(HOLES < 0, CLASSES + 3)), want)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_any_integer_dtype_are_the_same(surrogate, dtype):
    features, labels = maps()
    assert_same(seen(surrogate, features, labels.to(dtype)), seen(surrogate, features, labels))


# modes, state, functional calls


def test_evaluation_repeats_exactly_and_moves_nothing(surrogate):
    before = state_of(surrogate)
    assert surrogate.eval()(*maps()) == surrogate(*maps())
    assert_same(state_of(surrogate), before)


@every_case
def test_a_state_dict_resumes_exactly(case):
    surrogate, resumed = built(case), build(*CASES[case])
    resumed.load_state_dict(state_of(surrogate), strict=True)
    results = []
    for each in (surrogate, resumed):
        torch.manual_seed(3)
        results.append(each(*maps(seed=3)))
        each.after_epoch(*maps(100, seed=4))
        results.append(each(*maps(seed=5)))
    assert results[:2] == results[2:]
    assert all(torch.equal(resumed.state_dict()[name], each) for name, each in surrogate.state_dict().items())


@both_modes
def test_func_grad_of_a_functional_call_is_the_gradient_of_autograd(surrogate, training):
    features, labels = maps()
    state = state_of(surrogate.train(training))
    want = seen(surrogate, features, labels).gradient

    def loss(z):
        copies = {name: value.clone() for name, value in state.items()}  # a function changes nothing from outside
        return torch.func.functional_call(surrogate, copies, (z, labels))[0]

    torch.manual_seed(0)
    torch.testing.assert_close(torch.func.grad(loss)(features), want, rtol=1e-3, atol=1e-6)


@both_modes
@pytest.mark.parametrize("name", MEMBERS)
def test_a_call_compiles_into_one_graph(name, training):
    torch.compiler.reset()
    surrogate = built(name, backend="eager").train(training)
    want = seen(surrogate, *maps())
    torch.manual_seed(0)
    assert_same(torch.compile(surrogate, fullgraph=True, backend="eager")(*maps()), want[:2])
    assert_same(dict(surrogate.state_dict()), want.state)


# what is refused


@pytest.mark.parametrize("unique", [None, torch.zeros(1, dtype=torch.long)], ids=["all", "some"])
@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (torch.ones(4, 16, dtype=torch.long), LONG, TypeError, "features must be a floating-point tensor, got .*int64"),
        (torch.ones(4, 16), torch.zeros(4), TypeError, "labels must be an integer tensor, got torch.float32"),
        (torch.ones(4, 15), LONG, ValueError, r"must have feature_dim=16 features, got \[4, 15\]"),
        (torch.ones(16), LONG, ValueError, r"features must have shape \[B, D\] or \[B, C, H, W\], got \[16\]"),
        (torch.ones(4, 2, 8), LONG, ValueError, r"\[B, C, H, W\], got \[4, 2, 8\]"),
        (torch.ones(4, 0), LONG, ValueError, r"\[B, C, H, W\], got \[4, 0\]"),
        (torch.ones(4, 16), LONG[:3], ValueError, r"labels must have shape \[B=4\], got \[3\]"),
        (torch.ones(4, 16), LONG.to("meta"), ValueError, "labels must be on the features' device cpu, got meta"),
    ],
)
@pytest.mark.parametrize("name", [name for name in MEMBERS if name != CONTROL])
def test_a_bad_batch_is_refused(name, features, labels, error, message, unique):
    with pytest.raises(error, match=message):
        build(name)(features, labels, unique)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_is_refused(penalty, label):
    labels = torch.tensor([0, label, 2, 0])
    message = rf"labels must lie in \[0, 5\), .*, got values from {min(0, label)} to {max(2, label)}"
    with pytest.raises(ValueError, match=message):
        penalty(torch.ones(4, 4, 2, 2), labels)


def test_unique_labels_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match=r"unique_labels must be an integer tensor, got torch\.float32"):
        Mean.build(Mean.Options(), CONTEXT)(torch.ones(4, 16), LONG, torch.zeros(1))


class Brightness(cem.Surrogate):
    """How bright images are, for each of the features."""

    needs_images = True

    def measure(self, batch):
        loss = (batch.features.mean(1) * batch.images.flatten(1).mean(1)).sum()
        return cem.Measured(loss, {"intra_mse": loss})


def test_a_surrogate_that_needs_images_is_given_those_of_its_features():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
    module, labels = Brightness(), torch.arange(4)
    assert module(torch.ones(4, 16), labels, images=images)[0].item() == 6
    assert module(torch.ones(4, 16), labels, torch.tensor([1, 3]), images=images)[0].item() == 4


def test_a_surrogate_that_needs_images_refuses_a_call_without_and_is_not_assessed():
    with pytest.raises(ValueError, match=r"Brightness needs images=\[B, C, H, W\]"):
        Brightness()(torch.ones(4, 16), LONG)
    assert Brightness().assess(torch.ones(4, 16), LONG) is None


# assessing


def test_assess_is_a_number_that_moves_nothing_and_leaves_no_graph_behind(penalty):
    before, (features, labels) = state_of(penalty), maps(seed=3)
    assert math.isfinite(penalty.assess(features.requires_grad_(), labels))
    assert_same(state_of(penalty), before)
    assert penalty.training
    assert features.grad is None


def test_assess_is_the_mean_over_samples_of_random_batches_in_evaluation():
    measured = []

    class Noted(Mean):
        def measure(self, batch):
            measured.append((len(batch.labels), self.training, batch.features[0].item()))
            return super().measure(batch)

    for _ in range(2):
        assert Noted().assess(torch.arange(200.0)[:, None], torch.zeros(200).long()) == pytest.approx(99.5)
    assert [each[:2] for each in measured] == 2 * [(128, False), (72, False)]
    assert measured[:2] != measured[2:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_surrogate_stays_in_single_precision_where_it_is_cast_to_half(surrogate, dtype):
    before = state_of(surrogate)
    cast = surrogate.to(dtype)
    assert_same(state_of(cast), before)
    features, labels = maps()
    rob_loss, _ = cast((300 * features).to(dtype), labels)  # its square is beyond fp16
    assert rob_loss.isfinite()
    assert all(value.isfinite().all() and value.dtype.itemsize >= 4 for value in state_of(cast).values())


def test_assess_refits_what_is_refitted_after_epochs():
    module, (features, labels) = cem.GaussianMixtureCEM(16, 5, num_clusters=2, reg_strength=0.5), batch(40)
    assert module(features, labels)[0].item() == 0
    assert module.assess(features, labels) > 0
    assert not module.class_counts.any()


def test_the_control_has_no_value():
    assert build(CONTROL).assess(*batch()) is None
