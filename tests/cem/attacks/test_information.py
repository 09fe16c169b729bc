import copy
import json
import math

import pytest
import torch

import cem
from cem.attacks import information
from cem.attacks.information import information_report, relative_to
from cem.training.evaluation import isolated_random


def gaussian(samples, dims, seed=0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(samples, dims, generator=generator, dtype=torch.float64)


def report(features, labels=None, *, noise_std=0.5, queries=1, num_classes=None, seed=0, **options):
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    return information_report(
        features,
        labels,
        num_classes=int(labels.max()) + 1 if num_classes is None else num_classes,
        noise_std=noise_std,
        queries=queries,
        **{
            "image_dims": 100,
            "var_threshold": 0.1,
            "feature_shape": tuple(features.shape[1:]),
            "sigmoid": False,
            "seed": seed,
            **options,
        },
    )


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
    for name in ("nats", "class_log_variance", "relative_variance"):
        assert large["values"][name] == pytest.approx(small["values"][name], rel=1e-9)


def test_a_shift_of_all_features_says_the_same():
    x, labels = two_classes()
    assert report(x + 7, labels)["per_clusters"]["1"] == pytest.approx(report(x, labels)["per_clusters"]["1"], rel=1e-6)


def test_names_of_classes_and_order_of_samples_do_not_matter():
    x, labels = two_classes()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    first, second = report(x, labels), report(x[order], 1 - labels[order])
    assert second["per_clusters"]["1"] == pytest.approx(first["per_clusters"]["1"], rel=1e-12)
    assert second["nats"] == pytest.approx(first["nats"], abs=0.5)
    for name in ("class_log_variance", "relative_variance"):
        assert second["values"][name] == pytest.approx(first["values"][name], rel=1e-12)


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
    assert many["values"]["relative_variance"] == pytest.approx(some["values"]["relative_variance"], rel=1e-12)


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
    assert result["values"]["relative_variance"] == 0
    assert result["values"]["class_log_variance"] is None


# Without noise.


def test_without_noise_the_information_is_unbounded():
    x, labels = two_classes()
    result = report(x, labels, noise_std=0.0)
    assert (result["nats"], result["clusters"], result["noise_std"]) == (None, None, 0.0)
    assert result["per_clusters"] == {"1": None, "5": None, "15": None}


def test_without_noise_only_the_ratio_of_variances_is_left():
    x, labels = two_classes()
    values = report(x, labels, noise_std=0.0)["values"]
    ratio = values.pop("relative_variance")
    assert ratio == pytest.approx(report(x, labels)["values"]["relative_variance"])
    assert values == dict.fromkeys((*information.MEASURED, "nats", "class_log_variance"))


# What each surrogate says.


def test_class_log_variance_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 1.0], [5.0, 4.0], [5.0, 7.0], [9.0, 9.0]])
    labels = torch.tensor([0, 0, 1, 1, 1, 2])  # variances (2, 0), (0, 9); a single sample has none
    expected = (math.log(2 / 4 + 1e-3) + 2 * math.log(1e-3) + math.log(9 / 4 + 1e-3)) / 4
    assert report(x, labels, noise_std=2.0)["values"]["class_log_variance"] == pytest.approx(expected)


def test_relative_variance_by_hand():
    x = torch.tensor([[0.0], [2.0], [4.0], [4.0], [7.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])  # means 1 and 5, squared deviations 1 + 1 + 1 + 1 + 4
    expected = 8 / (x - x.mean()).square().sum().item()
    assert report(x, labels)["values"]["relative_variance"] == pytest.approx(expected)


def test_variances_within_and_between_classes_by_hand():
    x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0], [4.0, 1.0], [7.0, 1.0]])
    result = report(x, torch.tensor([0, 0, 1, 1, 1]))  # means 1 and 5; the second column does not vary
    assert result["within_variance"] == pytest.approx(8 / 5 / 2)
    assert result["between_variance"] == pytest.approx((2 * (1 - 3.4) ** 2 + 3 * (5 - 3.4) ** 2) / 5 / 2)


def test_relative_variance_of_constant_features_is_undefined():
    assert report(torch.ones(20, 2))["values"]["relative_variance"] is None


@pytest.mark.filterwarnings("ignore:eps_var")
def test_attention_is_its_penalty_with_the_weights_of_the_seed():
    x, labels = two_classes(samples=100, dims=8)
    with isolated_random(3, x.device):
        surrogate = cem.SlotCrossAttentionCEM(8, reg_strength=0.5, num_classes=2)
    expected, _ = surrogate.eval()(x.float(), labels)
    value = report(x, labels, noise_std=0.5, seed=3)["values"]["attention"]
    assert value == pytest.approx(expected.item(), rel=1e-4)
    assert value > 0


def test_entropy_of_slots_is_half_the_mean_logarithm_of_what_crosses_the_noise():
    x = gaussian(128, 6, std=3.0)
    value = report(x, noise_std=1.5)["values"]["slots_entropy"]
    assert value == pytest.approx(0.5 * (x.float().var(0) / 1.5**2).log1p().mean().item(), rel=0.15)  # slots divide it


def test_entropy_of_classes_is_half_the_mean_logarithm_of_what_crosses_the_noise():
    x = gaussian(128, 6, std=3.0)
    value = report(x, noise_std=1.5)["values"]["class_entropy"]
    assert value == pytest.approx(0.5 * (x.float().var(0) / 1.5**2).log1p().mean().item(), rel=1e-4)


def test_class_hinge_is_how_far_the_log_variance_inside_classes_lies_above_the_threshold():
    x = gaussian(128, 6, std=3.0)
    value = report(x, noise_std=1.5)["values"]["class_hinge"]
    height = (x.float().var(0) + 0.01).log().mean().item() - math.log(0.1 * 1.5**2 + 0.01)
    assert value == pytest.approx(height, rel=1e-3)


def test_batches_count_by_their_samples(monkeypatch):
    x, labels = two_classes(samples=101)
    monkeypatch.setattr(information, "BATCH", 100)
    weights = []

    class Counting(torch.nn.Module):
        def refit(self, features, labels):
            return {}

        def forward(self, features, labels):
            weights.append(len(features))
            return torch.tensor(float(len(features))), None

    monkeypatch.setattr(information, "build_surrogate", lambda *_, **__: Counting())
    assert report(x, labels)["values"]["gmm"] == pytest.approx((100 * 100 + 1 * 1) / 101)
    assert weights == [100, 1] * len(information.MEASURED)


def test_the_mixture_is_refitted_to_these_features():
    generator = torch.Generator().manual_seed(0)
    tight = 50 * torch.randn(4, 6, generator=generator)[torch.arange(200) % 4] + 0.01 * gaussian(200, 6)
    spread = gaussian(200, 6, std=50.0)
    values = [report(x, noise_std=1.0)["values"]["gmm"] for x in (tight, spread)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[1] > 1


def test_the_sigmoids_mixture_has_fewer_clusters_and_so_a_larger_penalty():
    x = gaussian(600, 3, std=5.0)
    fine, coarse = (report(x, noise_std=1.0, sigmoid=sigmoid)["values"]["gmm"] for sigmoid in (False, True))
    assert coarse > fine + 0.1


def test_the_threshold_reaches_the_surrogates():
    x, labels = two_classes()
    strict, lax = (report(x, labels, var_threshold=threshold)["values"] for threshold in (0.1, 0.2))
    for name in ("attention", "slots", "gmm"):
        assert strict[name] > lax[name]


# The report.


def test_the_report_is_plain_json():
    x, labels = two_classes()
    result = report(x, labels)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["relative"] is None
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


# Against another run.


def test_the_factor_by_hand():
    run, reference = {"nats": 30.0, "image_dims": 64}, {"nats": 126.0, "image_dims": 64}
    result = relative_to(run, reference, "none")
    assert result["relative"] == {"reference": "none", "factor": pytest.approx(math.exp(2 * 96 / 64))}


def test_a_run_is_as_good_as_itself():
    x, labels = two_classes()
    result = report(x, labels)
    assert relative_to(result, result, "itself")["relative"]["factor"] == 1


def test_the_original_report_is_not_changed():
    run = {"nats": 30.0, "image_dims": 64, "relative": None}
    before = copy.deepcopy(run)
    result = relative_to(run, run, "itself")
    assert run == before
    assert result["nats"] == 30.0


@pytest.mark.parametrize("nats", [(None, 1.0), (1.0, None), (0.0, 1e6)], ids=["run", "reference", "overflow"])
def test_an_unbounded_factor_is_none(nats):
    run, reference = ({"nats": each, "image_dims": 64} for each in nats)
    assert relative_to(run, reference, "other")["relative"] == {"reference": "other", "factor": None}


def test_images_of_other_sizes_do_not_compare():
    with pytest.raises(ValueError, match="64 and of 192"):
        relative_to({"nats": 1.0, "image_dims": 64}, {"nats": 1.0, "image_dims": 192}, "other")
