"""Threshold: where the variance penalty begins, and how that place moves in training."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cem
from cem.surrogates.threshold import POLICIES, Threshold, coupled_threshold
from cem_kernels import ClassGroups

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 1, 3, 2, 1])  # 3, 4, 2, 1 and 0 samples of classes 0 to 4
WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


def surrogate(feature_dim=16, **kwargs):
    kwargs = {"num_slots": 4, "reg_strength": 0.5, "num_classes": 5, **kwargs}
    return cem.SlotCrossAttentionCEM(feature_dim, **kwargs)


def batch(num_samples=24, width=16, num_classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, width, generator=generator)
    return features, torch.randint(0, num_classes, (num_samples,), generator=generator)


def quantile_threshold(coupled=1e-3, **kwargs):
    return Threshold("quantile", coupled, **kwargs)


def observe(threshold, features, labels=LABELS, min_samples=2):
    threshold.observe(features, ClassGroups.from_labels(labels, 5), min_samples, 5)
    return threshold


def features_like(scale=1.0, shape=(10, 7), seed=0):
    """Columns of widths that differ by a factor of 30."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator) * torch.linspace(-1.5, 2, shape[-1]).exp()


def nearest_rank(features, labels, quantile, min_samples=2):
    """The ``⌈qn⌉``-th smallest of the unbiased variances of columns inside classes, in NumPy."""
    x, labels = features.double().flatten(1).numpy(), labels.numpy()
    members = [x[labels == c] for c in np.unique(labels)]
    variances = np.concatenate([rows.var(axis=0, ddof=1) for rows in members if len(rows) >= min_samples])
    return float(np.quantile(variances, quantile, method="inverted_cdf"))


# coupled and fixed


@pytest.mark.parametrize(("tau", "sigma"), [(0.1, 0.5), (2.0, 3.0), (0.1, 0.0), (0.0, 0.5), (0.1, 1e-5)])
@pytest.mark.filterwarnings("ignore:.*above the variance threshold")
def test_coupled_is_the_share_of_the_noise_and_at_least_its_floor(tau, sigma):
    expected = max(tau * sigma**2, 1e-8)
    assert coupled_threshold(tau, sigma) == expected
    assert surrogate(var_threshold=tau, reg_strength=sigma).threshold() == expected


@pytest.mark.parametrize("policy", ["coupled", "fixed"])
def test_a_threshold_that_never_changes_is_not_in_the_state_dict(policy):
    assert not [name for name in surrogate(threshold=policy).state_dict() if "threshold" in name]


def test_a_state_dict_of_coupled_loads_strictly_under_fixed():
    surrogate(threshold="fixed").load_state_dict(surrogate().state_dict(), strict=True)


def test_a_threshold_that_moves_is_in_the_state_dict():
    assert [n for n in surrogate(threshold="ramp").state_dict() if "threshold" in n] == ["threshold.level"]
    names = [n for n in surrogate(threshold="quantile").state_dict() if "threshold" in n]
    assert names == ["threshold.level", "threshold.seen"]


@pytest.mark.parametrize("sigma", [0.0, 0.5, 10.0])
def test_fixed_ignores_the_noise(sigma):
    assert surrogate(threshold="fixed", reg_strength=sigma).threshold() == 0.05
    assert surrogate(threshold="fixed", threshold_value=0.3, reg_strength=sigma).threshold() == 0.3


def test_fixed_penalizes_as_coupled_does_at_the_same_place():
    features, labels = batch()
    coupled = surrogate(var_threshold=0.8).eval()
    fixed = surrogate(threshold="fixed", threshold_value=0.8 * 0.5**2, reg_strength=7.0).eval()
    fixed.load_state_dict(coupled.state_dict())
    assert fixed(features, labels) == coupled(features, labels)


@pytest.mark.parametrize("policy", ["coupled", "fixed", "quantile"])
def test_epochs_move_a_ramp_only(policy):
    threshold = Threshold(policy, 0.01)
    before = float(threshold())
    threshold.begin_epoch(0.5)
    assert float(threshold()) == before


@pytest.mark.parametrize("policy", ["coupled", "fixed", "ramp"])
def test_features_move_a_quantile_only(policy):
    threshold = Threshold(policy, 0.01)
    before = float(threshold())
    assert float(observe(threshold, features_like())()) == before


# ramp


def test_ramp_stands_at_its_value_before_the_first_epoch():
    assert Threshold("ramp", 1e-3, value=0.2)().item() == pytest.approx(0.2)


def test_ramp_starts_at_its_value():
    threshold = Threshold("ramp", 1e-3, value=0.2)
    threshold.begin_epoch(0.7)
    threshold.begin_epoch(0.0)
    assert threshold().item() == pytest.approx(0.2)


def test_ramp_ends_at_the_coupled_threshold():
    module = surrogate(threshold="ramp")
    module.begin_epoch(1.0)
    assert module.threshold().item() == pytest.approx(coupled_threshold(0.1, 0.5))


def test_ramp_falls_by_equal_factors():
    threshold, levels = Threshold("ramp", 1e-3, value=0.1), []
    for epoch in range(5):
        threshold.begin_epoch(epoch / 4)
        levels.append(threshold().item())
    factors = [later / earlier for earlier, later in itertools.pairwise(levels)]
    assert factors == pytest.approx([(1e-3 / 0.1) ** (1 / 4)] * 4)


def test_ramp_follows_the_progress_and_not_the_number_of_calls():
    often, once = Threshold("ramp", 1e-3), Threshold("ramp", 1e-3)
    for progress in (0.0, 0.25, 0.5, 0.5):
        often.begin_epoch(progress)
    once.begin_epoch(0.5)
    assert torch.equal(often(), once())


def test_ramp_penalizes_more_the_further_it_has_come_and_as_coupled_at_its_end():
    features, labels = batch()
    coupled, module = surrogate(hinge="identity").eval(), surrogate(hinge="identity", threshold="ramp").eval()
    module.load_state_dict(coupled.state_dict(), strict=False)
    losses = []
    for progress in (0.0, 0.5, 1.0):
        module.begin_epoch(progress)
        losses.append(module(features, labels)[0].item())
    assert losses == sorted(losses)
    assert losses[2] - losses[0] == pytest.approx(math.log((0.05 + 1e-6) / (0.025 + 1e-6)), abs=1e-5)
    assert losses[2] == pytest.approx(coupled(features, labels)[0].item(), abs=1e-6)


def test_ramp_continues_from_a_state_dict():
    module, other = surrogate(threshold="ramp"), surrogate(threshold="ramp")
    module.begin_epoch(0.3)
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other.threshold(), module.threshold())
    assert other.threshold().item() != pytest.approx(0.05)


def test_ramp_moves_in_place_for_whoever_holds_on_to_its_level():
    threshold = Threshold("ramp", 1e-3)
    held = threshold()
    threshold.begin_epoch(1.0)
    assert held.item() == pytest.approx(1e-3)


# quantile


@pytest.mark.parametrize("quantile", [0.1, 0.33, 0.5, 0.75, 0.97])
def test_quantile_of_one_batch_is_that_of_its_variances_inside_classes(quantile):
    features = features_like(shape=(10, 501))  # 1503 variances: ranks next to each other hardly differ
    threshold = observe(quantile_threshold(1e-6, quantile=quantile), features)
    assert threshold().item() == pytest.approx(nearest_rank(features, LABELS, quantile), rel=2e-2)


def test_quantile_is_one_of_the_variances_itself():
    features = features_like()
    threshold = observe(quantile_threshold(), features)  # median of 21
    assert threshold().item() == pytest.approx(nearest_rank(features, LABELS, 0.5), rel=1e-5)


def test_quantile_is_exact_where_the_mean_is_far_larger_than_the_spread():
    features = features_like() + 1000
    assert observe(quantile_threshold(), features)().item() == pytest.approx(
        nearest_rank(features, LABELS, 0.5), rel=1e-3
    )


def test_quantile_leaves_out_classes_with_too_few_samples():
    features = features_like()
    expected = nearest_rank(features, LABELS, 0.5, min_samples=4)  # median of 7
    assert expected != pytest.approx(nearest_rank(features, LABELS, 0.5, min_samples=2), rel=0.1)
    assert observe(quantile_threshold(), features, min_samples=4)().item() == pytest.approx(expected, rel=1e-5)


def test_quantile_measures_every_position_and_channel_apart():
    features = features_like(shape=(10, 3, 5))
    threshold = observe(quantile_threshold(), features)  # median of 45
    assert threshold().item() == pytest.approx(nearest_rank(features, LABELS, 0.5), rel=1e-5)


def test_quantile_moves_as_a_running_mean_afterwards():
    threshold, expected = quantile_threshold(), None
    for seed, scale in enumerate((1.0, 3.0, 0.2)):
        features = features_like(scale, seed=seed)
        observe(threshold, features)
        found = nearest_rank(features, LABELS, 0.5)
        expected = found if expected is None else 0.9 * expected + 0.1 * found
    assert threshold().item() == pytest.approx(expected, rel=1e-5)


def test_quantile_stands_at_the_coupled_threshold_before_the_first_batch():
    assert surrogate(threshold="quantile").threshold().item() == pytest.approx(0.025)


def test_quantile_never_falls_below_the_coupled_threshold():
    threshold = quantile_threshold(coupled=0.5)
    observe(threshold, features_like(scale=1e-3))
    assert threshold().item() == pytest.approx(0.5)
    observe(threshold, features_like(scale=1e-3))
    assert threshold().item() == pytest.approx(0.5)


def test_quantile_returns_to_the_coupled_threshold_and_stops_there():
    threshold = observe(quantile_threshold(coupled=0.1), features_like(scale=3.0))
    assert threshold().item() > 1
    for _ in range(300):
        observe(threshold, torch.zeros(10, 7))
    assert threshold().item() == pytest.approx(0.1)


def test_quantile_of_a_class_that_does_not_vary_is_the_coupled_threshold():
    threshold = observe(quantile_threshold(coupled=0.1), torch.full((10, 7), 3.0))
    assert threshold().item() == pytest.approx(0.1)
    assert bool(threshold.seen)


@pytest.mark.parametrize("observed", [0, 1])
@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (features_like(5.0, shape=(5, 7)), torch.arange(5)),
        (features_like(5.0, shape=(0, 7)), torch.zeros(0, dtype=torch.int64)),
        (torch.full((10, 7), math.nan), LABELS),
        (torch.full((10, 7), math.inf), LABELS),
    ],
    ids=["no class with enough samples", "empty", "nan", "infinite"],
)
def test_quantile_is_unmoved_by_a_batch_that_says_nothing(features, labels, observed):
    threshold = quantile_threshold()
    for _ in range(observed):
        observe(threshold, features_like())
    before = {name: value.clone() for name, value in threshold.state_dict().items()}
    observe(threshold, features, labels)
    assert threshold.state_dict() == before


def test_quantile_takes_the_first_batch_that_says_something_whole():
    threshold = observe(quantile_threshold(), torch.full((10, 7), math.nan))
    features = features_like()
    assert torch.equal(observe(threshold, features)(), observe(quantile_threshold(), features)())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_quantile_is_unmoved_by_a_batch_that_is_finite_in_part(value):
    threshold = observe(quantile_threshold(), features_like())
    before = threshold().item()
    features = features_like(seed=1)
    features[0, 0] = value  # sample 0 is one of the three of class 0
    observe(threshold, features)
    assert threshold().item() == before


def test_an_infinite_sample_alone_in_its_class_leaves_the_quantile_alone():
    features = features_like()
    want = observe(quantile_threshold(), features)().item()
    features[7] = math.inf  # class 3's only one
    assert observe(quantile_threshold(), features)().item() == want


def test_an_infinite_entry_alone_in_its_class_leaves_the_quantile_alone():
    features = features_like()
    want = observe(quantile_threshold(), features)().item()
    features[7, :3] = math.inf
    assert observe(quantile_threshold(), features)().item() == want


def test_quantile_is_unmoved_in_evaluation():
    features, labels = batch()
    module = surrogate(threshold="quantile").train()
    module(features, labels)
    before = module.threshold().item()
    module.eval()(3 * features[:12], labels[:12])
    assert module.threshold().item() == before


def test_quantile_of_a_batch_is_the_threshold_of_that_very_batch():
    features, labels = batch()
    noise = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(1))
    module = surrogate(threshold="quantile").train()
    loss = module(features, labels, slot_noise=noise)[0]
    fixed = surrogate(threshold="fixed", threshold_value=module.threshold().item()).train()
    fixed.load_state_dict({n: v for n, v in module.state_dict().items() if "threshold" not in n})
    assert loss.item() == pytest.approx(fixed(features, labels, slot_noise=noise)[0].item(), abs=1e-6)
    assert loss.item() > 0


def test_no_gradient_passes_through_the_quantile():
    features, labels = batch()
    module = surrogate(threshold="quantile", hinge="identity").train()
    coupled = surrogate(hinge="identity").train()
    coupled.load_state_dict(module.state_dict(), strict=False)
    gradients = []
    for each in (module, coupled):  # under the identity, a constant threshold does not change a gradient
        x = features.clone().requires_grad_()
        torch.manual_seed(0)
        each(x, labels)[0].backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert not module.threshold().requires_grad


def test_quantile_continues_from_a_state_dict():
    module, other = (surrogate(threshold="quantile").train() for _ in range(2))
    module(*batch(seed=1))
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other.threshold(), module.threshold())
    before = module.threshold().item()
    for each in (module, other):
        torch.manual_seed(0)
        each(*batch(seed=2))
    assert torch.equal(other.threshold(), module.threshold())
    assert 0.9 * before < other.threshold().item() != before  # it knew the first batch


def test_autocast_does_not_change_the_quantile():
    features, labels = batch()
    modules = [surrogate(threshold="quantile").train() for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    torch.manual_seed(0)
    modules[0](features + 30, labels)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        modules[1](features + 30, labels)
    assert torch.equal(modules[0].threshold(), modules[1].threshold())


def test_quantile_knows_nothing_of_places_in_the_memory_that_were_never_written():
    features, labels = batch()
    noise = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(1))
    module = surrogate(threshold="quantile").train()
    remembering = surrogate(threshold="quantile", memory_bank=4).train()
    remembering.load_state_dict(module.state_dict(), strict=False)
    want = module(features, labels, slot_noise=noise)
    torch.testing.assert_close(remembering(features, labels, slot_noise=noise), want)
    torch.testing.assert_close(remembering.threshold(), module.threshold())


class NeverWaits(TorchDispatchMode):
    """Refuses what waits for the device, on the CPU too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_quantile_does_not_wait_for_the_device():
    threshold, features = quantile_threshold(), features_like()
    groups = ClassGroups.from_labels(LABELS, 5, max_class_size=4)  # reads values, on the CPU
    with NeverWaits():
        threshold.observe(features, groups, 2, 5)


@pytest.mark.slow
def test_quantile_compiles_as_one_graph_under_a_static_bound():
    features, labels = batch()
    noise = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(1))
    module, other = (surrogate(threshold="quantile", max_class_size=24, backend="eager") for _ in range(2))
    other.load_state_dict(module.state_dict())
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    found, want = compiled(features, labels, slot_noise=noise), other(features, labels, slot_noise=noise)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(module.threshold(), other.threshold())


# what is refused, and what is warned about


def test_unknown_policy_is_refused_with_the_choices():
    for make in (lambda: Threshold("median", 0.1), lambda: surrogate(threshold="median")):
        with pytest.raises(ValueError, match="threshold must be one of coupled, fixed, ramp, quantile, got 'median'"):
            make()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
def test_value_out_of_range_is_refused(policy, value):
    with pytest.raises(ValueError, match=f"threshold_value must be finite and positive, got {value}"):
        surrogate(threshold=policy, threshold_value=value)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.5, 50, math.nan])
def test_quantile_out_of_range_is_refused(policy, quantile):
    with pytest.raises(ValueError, match=f"threshold_quantile must lie between 0 and 1, got {quantile}"):
        surrogate(threshold=policy, threshold_quantile=quantile)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"threshold": "fixed", "reg_strength": 0.0},
        {"threshold": "ramp", "reg_strength": 0.1},
        {"threshold": "quantile", "reg_strength": 0.1},
        {"penalty": "entropy", "reg_strength": 1e-3},  # has no threshold
    ],
)
def test_a_threshold_that_stays_above_both_floors_does_not_warn(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surrogate(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"threshold": "fixed", "threshold_value": 1e-5}, "eps_var=0.0001 is above the variance threshold 1e-05"),
        ({"threshold": "ramp", "reg_strength": 0.025}, "eps_var=0.0001 is above the variance threshold 6.25e-05"),
        ({"threshold": "quantile", "reg_strength": 0.025}, "eps_var=0.0001 is above the variance threshold 6.25e-05"),
    ],
)
def test_a_threshold_is_judged_by_the_lowest_place_it_can_come_to(kwargs, message):
    with pytest.warns(UserWarning, match=message):
        surrogate(**kwargs)


@pytest.mark.parametrize(("floor", "value", "eps_var"), [("eps_var", "0.0001", 1e-4), ("gamma", "1e-06", 1e-9)])
def test_a_warning_about_a_fixed_threshold_names_what_would_change_it(floor, value, eps_var):
    with pytest.warns(UserWarning, match=f"{floor}={value} is above") as caught:
        surrogate(threshold="fixed", threshold_value=1e-7, eps_var=eps_var)
    assert "threshold_value" in str(caught[0].message)


def test_a_gamma_that_was_chosen_is_taken_to_be_meant():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surrogate(reg_strength=0.1, gamma=0.01)


def test_quantile_of_slots_is_refused():
    with pytest.raises(ValueError, match="threshold='quantile' follows the variances of classes"):
        surrogate(threshold="quantile", measure="slots")


def test_a_ramp_that_would_rise_is_refused():
    with pytest.raises(ValueError, match=r"a ramp falls to 0\.1, so threshold_value must not be below it, got 0\.05"):
        surrogate(threshold="ramp", reg_strength=1.0)


def test_own_loss_refuses_labels_of_other_samples():
    with pytest.raises(ValueError, match=r"labels must have shape \[B=24\], got \[5\]"):
        surrogate(objective="likelihood").own_loss(batch()[0], torch.zeros(5, dtype=torch.long))
