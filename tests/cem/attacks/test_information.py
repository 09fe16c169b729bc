import json
import math
from dataclasses import replace

import pytest
import torch

import cem
from cem.attacks.information import information_report
from cem.training.evaluation import isolated_random


def gaussian(samples, dims, seed=0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(samples, dims, generator=generator, dtype=torch.float64)


def a_context(features, num_classes, noise_std):
    shape = tuple(features.shape[1:])
    return cem.Context(feature_shape=shape, image_shape=(1, 10, 10), num_classes=num_classes, noise_std=noise_std)


def report(features, labels=None, *, noise_std=0.5, queries=1, num_classes=None, seed=0, **changes):
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    context = a_context(features, int(labels.max()) + 1 if num_classes is None else num_classes, noise_std)
    return information_report(features, labels, context=replace(context, **changes), queries=queries, seed=seed)


def two_classes(samples=400, dims=6, apart=20.0):
    """Two well separated classes of Gaussian samples."""
    labels = torch.arange(samples) % 2
    return gaussian(samples, dims) + apart * labels[:, None], labels


def channel_capacity(variances, noise_std):
    """Information in nats of independent Gaussians through Gaussian noise."""
    return 0.5 * sum(math.log(1 + variance / noise_std**2) for variance in variances)


# The bound.


def test_one_class_of_independent_gaussians_is_measured_exactly():
    stds = torch.linspace(0.1, 2, 20, dtype=torch.float64)
    result = report(gaussian(8000, 20) * stds, noise_std=0.5)
    assert result["per_clusters"]["1"] == pytest.approx(channel_capacity(stds.square().tolist(), 0.5), abs=0.2)


def test_correlated_gaussians_stay_above_the_truth():
    mixing = gaussian(20, 20, seed=1)
    result = report(gaussian(8000, 20) @ mixing.T, noise_std=0.5)
    identity = torch.eye(20, dtype=torch.float64)
    truth = 0.5 * torch.logdet(identity + mixing @ mixing.T / 0.25).item()
    for nats in result["per_clusters"].values():
        assert nats > truth


@pytest.mark.parametrize("seed", range(3))
def test_clusters_of_few_samples_do_not_undercut_a_single_gaussian(seed):
    # Variances inside clusters that were fitted to the same samples would: k-means sees structure in noise.
    result = report(gaussian(300, 300, seed=seed), noise_std=1.0)
    assert None not in result["per_clusters"].values()
    assert result["clusters"] == 1
    assert result["nats"] == pytest.approx(channel_capacity([1.0] * 300, 1.0), rel=0.015)


def test_clusters_are_judged_on_other_samples_than_they_were_fitted_to():
    reports = [report(gaussian(600, 30, seed=seed), noise_std=0.5)["per_clusters"] for seed in range(4)]
    excess = sum(nats["15"] - nats["1"] for nats in reports) / 4
    # 15 clusters of a Gaussian cost 1.3 nats (on any number of fresh samples). On their own they seem to cost 0.7.
    assert excess > 1


def test_the_bias_of_variances_from_few_samples_is_corrected():
    truth = channel_capacity([1.0] * 200, 0.5)
    nats = [report(gaussian(12, 200, seed=seed), noise_std=0.5)["nats"] for seed in range(20)]
    # Without the correction the mean would lie 200 · ½ · 0.64 / 11 = 5.8 nats below.
    assert sum(nats) / 20 == pytest.approx(truth, abs=2)


def test_clusters_of_a_class_are_found():
    generator = torch.Generator().manual_seed(1)
    places = 100 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    x = gaussian(5000, 8) + places[torch.arange(5000) % 5]
    result = report(x, noise_std=1.0)
    assert result["clusters"] == 5
    assert result["nats"] == pytest.approx(math.log(5) + channel_capacity([1.0] * 8, 1.0), abs=0.1)


def test_classes_far_apart_add_what_the_class_tells():
    x, labels = two_classes(8000)
    expected = math.log(2) + channel_capacity([1.0] * 6, 0.5)
    per_clusters = report(x, labels, noise_std=0.5)["per_clusters"]
    assert per_clusters["1"] == pytest.approx(expected, abs=0.1)
    for clusters in ("5", "15"):  # needless ones cost little
        assert expected < per_clusters[clusters] < expected + 2


def test_the_smallest_value_is_reported_with_its_clusters():
    x, labels = two_classes(400)
    result = report(x, labels)
    known = {k: nats for k, nats in result["per_clusters"].items() if nats is not None}
    assert len(known) == 2
    assert result["nats"] == min(known.values())
    assert known[str(result["clusters"])] == result["nats"]


def test_constant_features_tell_nothing():
    assert report(torch.full((50, 4), 3.0))["nats"] == 0


# How it changes.


def test_more_noise_leaves_fewer_nats():
    x, labels = two_classes()
    nats = [report(x, labels, noise_std=std)["nats"] for std in (0.1, 0.5, 2.0)]
    assert nats[0] > nats[1] > nats[2] > 0


def test_averaging_queries_is_less_noise():
    x, labels = two_classes()
    nine, third = report(x, labels, noise_std=0.6, queries=9), report(x, labels, noise_std=0.2)
    assert nine["nats"] == pytest.approx(third["nats"], rel=1e-12)
    assert nine["noise_std"] == pytest.approx(0.2)
    assert (nine["queries"], third["queries"]) == (9, 1)


def test_features_and_noise_of_another_scale_say_the_same():
    x, labels = two_classes(800)
    small, large = report(x, labels, noise_std=0.5), report(8 * x, labels, noise_std=4.0)
    assert large["per_clusters"] == pytest.approx(small["per_clusters"], rel=1e-9)
    assert large["values"]["log_det"] == pytest.approx(small["values"]["log_det"], rel=1e-9)
    assert large["values"]["centroid"] == pytest.approx(small["values"]["centroid"], rel=1e-4)


def test_a_shift_of_all_features_says_the_same():
    x, labels = two_classes()
    assert report(x + 7, labels)["per_clusters"]["1"] == pytest.approx(report(x, labels)["per_clusters"]["1"], rel=1e-6)


def test_names_of_classes_and_order_of_samples_do_not_matter():
    x, labels = two_classes()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    first, second = report(x, labels), report(x[order], 1 - labels[order])
    assert second["per_clusters"]["1"] == pytest.approx(first["per_clusters"]["1"], rel=1e-12)
    assert second["nats"] == pytest.approx(first["nats"], abs=0.5)
    assert second["values"]["log_det"] == pytest.approx(first["values"]["log_det"], rel=1e-12)


def test_maps_count_like_flat_features():
    x, labels = two_classes(dims=12)
    maps = report(x.view(-1, 3, 2, 2), labels)
    assert maps == report(x, labels)
    assert maps["feature_dims"] == 12


# Few samples.


def test_classes_without_samples_do_not_count():
    x, labels = two_classes()
    some, many = report(x, labels, num_classes=2), report(x, 3 * labels, num_classes=6)
    assert many["per_clusters"]["1"] == pytest.approx(some["per_clusters"]["1"], rel=1e-12)
    assert many["per_clusters"]["5"] is not None
    assert many["within_variance"] == pytest.approx(some["within_variance"], rel=1e-12)


def test_a_handful_of_samples_joins_the_largest_class():
    x, labels = two_classes()
    labels[[0, 2, 4]], labels[[1, 3]] = 2, 3  # classes 0 and 1 lose three and two of their 200
    joined = labels.clone()
    joined[:5] = 1  # the larger one now
    expected = report(x, joined, num_classes=2)["per_clusters"]["1"]
    assert report(x, labels)["per_clusters"]["1"] == pytest.approx(expected, rel=1e-12)


def test_small_classes_are_joined_with_one_another():
    x, labels = two_classes()
    labels[:8], labels[8:16] = 2, 3
    joined = labels.clone().clamp(max=2)
    expected = report(x, joined)["per_clusters"]["1"]
    assert report(x, labels)["per_clusters"]["1"] == pytest.approx(expected, rel=1e-12)


def test_too_many_clusters_for_the_samples_are_left_out():
    x, labels = two_classes(samples=210)
    per_clusters = report(x, labels)["per_clusters"]
    assert per_clusters["15"] is None
    assert per_clusters["5"] is not None
    assert report(x[:190], labels[:190])["per_clusters"]["5"] is None


@pytest.mark.parametrize("samples", [2, 3, 9])
def test_a_few_samples_in_all_still_give_numbers(samples):
    result = report(gaussian(samples, 4), torch.arange(samples) % 3, num_classes=3)
    assert result["clusters"] == 1
    json.dumps(result, allow_nan=False)


def test_every_sample_may_have_a_class_of_its_own():
    result = report(gaussian(5, 4), torch.arange(5))
    assert result["within_variance"] == 0
    assert result["values"]["log_det"] is None


# Without noise.


def test_without_noise_the_information_is_unbounded():
    x, labels = two_classes()
    result = report(x, labels, noise_std=0.0)
    assert (result["nats"], result["clusters"], result["noise_std"]) == (None, None, 0.0)
    assert result["per_clusters"] == {"1": None, "5": None, "15": None}


def test_without_noise_there_are_no_values():
    x, labels = two_classes()
    values = report(x, labels, noise_std=0.0)["values"]
    assert values == dict.fromkeys((*(set(cem.SURROGATES) - {"none"}), "log_det"))


# What each surrogate says.


def test_variances_within_and_between_classes_by_hand():
    x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0], [4.0, 1.0], [7.0, 1.0]])
    result = report(x, torch.tensor([0, 0, 1, 1, 1]))  # means 1 and 5; the second column does not vary
    assert result["within_variance"] == pytest.approx(8 / 5 / 2)
    assert result["between_variance"] == pytest.approx((2 * (1 - 3.4) ** 2 + 3 * (5 - 3.4) ** 2) / 5 / 2)


@pytest.mark.parametrize("dims", [3, 30], ids=["more samples than columns", "more columns than samples"])
def test_log_det_is_half_the_log_determinant_of_covariance_over_noise(dims):
    x, labels = (gaussian(45, dims) @ gaussian(dims, dims, seed=1)).float().double(), torch.arange(45) % 3
    labels[labels == 2] = torch.tensor([2] * 8 + [1] * 7)  # classes of 15, 22 and 8
    expected = 0.0
    for label in range(3):
        covariance = torch.cov(x[labels == label].T)
        sign, log_det = torch.linalg.slogdet(torch.eye(dims, dtype=torch.float64) + covariance / 0.7**2)
        assert sign == 1
        expected += (labels == label).sum().item() / 45 * log_det.item() / 2
    assert report(x, labels, noise_std=0.7)["values"]["log_det"] == pytest.approx(expected, rel=1e-9)


def test_log_det_leaves_classes_of_one_sample_out():
    x, labels = two_classes(40)
    alone = torch.cat([x, 100 * gaussian(1, 6)]), torch.cat([labels, torch.tensor([2])])
    assert report(*alone)["values"]["log_det"] == pytest.approx(report(x, labels)["values"]["log_det"], rel=1e-12)


def test_log_det_counts_what_columns_have_in_common_once():
    x = gaussian(2000, 1)
    once, twice = (report(each)["values"]["log_det"] for each in (x, torch.cat([x, x], 1) / math.sqrt(2)))
    assert twice == pytest.approx(once, rel=1e-5)


@pytest.mark.filterwarnings("ignore:eps_var")
def test_attention_is_its_penalty_with_the_weights_of_the_seed():
    x, labels = two_classes(samples=100, dims=8)
    with isolated_random(3, x.device):
        surrogate = cem.SlotCrossAttentionCEM(8, reg_strength=0.5, num_classes=2)
    expected, _ = surrogate.eval()(x.float(), labels)
    value = report(x, labels, noise_std=0.5, seed=3)["values"]["attention"]
    assert value == pytest.approx(expected.item(), rel=1e-4)
    assert value > 0


def test_centroid_is_half_the_mean_logarithm_of_what_crosses_the_noise():
    x = gaussian(128, 6, std=3.0)
    value = report(x, noise_std=1.5)["values"]["centroid"]
    assert value == pytest.approx(0.5 * (x.float().var(0) / 1.5**2).log1p().mean().item(), rel=1e-4)


def test_the_mixture_is_refitted_to_these_features():
    generator = torch.Generator().manual_seed(0)
    tight = 50 * torch.randn(4, 6, generator=generator)[torch.arange(200) % 4] + 0.01 * gaussian(200, 6)
    spread = gaussian(200, 6, std=50.0)
    values = [report(x, noise_std=1.0)["values"]["mixture"] for x in (tight, spread)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[1] > 1


def test_the_mixture_of_bounded_features_has_fewer_clusters_and_so_a_larger_penalty():
    x = gaussian(600, 3, std=5.0)
    fine, coarse = (report(x, noise_std=1.0, bounded=bounded)["values"]["mixture"] for bounded in (False, True))
    assert coarse > fine + 0.1


@pytest.mark.parametrize("value", [7.0, None])
def test_a_surrogate_that_was_registered_speaks_under_its_name(monkeypatch, value):
    class Stranger(cem.Surrogate):
        name = "stranger"

        def assess(self, features, labels):
            assert features.shape == (400, 3, 2, 1)
            return value

    monkeypatch.setattr(cem.SURROGATES, "_members", {"none": cem.SURROGATES["none"], "stranger": Stranger})
    x, labels = two_classes()
    values = report(x.view(-1, 3, 2, 1), labels)["values"]
    assert values.keys() == {"stranger", "log_det"}
    assert values["stranger"] == value


# The report.


def test_the_report_is_plain_json():
    x, labels = two_classes()
    result = report(x, labels)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "not a certificate" in result["note"]
    assert result["image_dims"] == 100


def test_the_same_seed_says_the_same_and_leaves_random_numbers_alone():
    x, labels = two_classes()
    state = torch.get_rng_state()
    first, second, other = report(x, labels), report(x, labels), report(x, labels, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second
    assert first["per_clusters"]["1"] == other["per_clusters"]["1"]
    assert first["per_clusters"]["5"] != other["per_clusters"]["5"]


def test_features_are_not_changed_and_need_no_graph():
    x, labels = two_classes()
    x = x.float().requires_grad_()
    before = x.detach().clone()
    report(x, labels)
    assert torch.equal(x, before)
    assert x.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_std": -1.0}, "noise_std must be finite"),
        ({"noise_std": math.inf}, "noise_std must be finite"),
        ({"queries": 0}, "queries at least 1"),
        ({"feature_shape": (3,)}, "samples of shape"),
    ],
    ids=str,
)
def test_unusable_options_are_refused(options, message):
    x, labels = two_classes()
    with pytest.raises(ValueError, match=message):
        report(x, labels, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused(value):
    x, labels = two_classes()
    x[3, 1] = value
    with pytest.raises(ValueError, match="features must be finite"):
        report(x, labels)


def test_a_single_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        report(torch.ones(1, 3))
