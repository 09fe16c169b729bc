"""The estimate of what features tell about an image, and what every surrogate says of the same features."""

import json
import math
from dataclasses import replace

import pytest
import torch

import cem
from cem.attacks.information import information_report


def gaussian(samples, dims, seed=0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(samples, dims, generator=generator, dtype=torch.float64)


def report(features, labels=None, *, noise_std=0.5, queries=1, num_classes=None, seed=0, **changes):
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    shape = tuple(features.shape[1:])
    context = cem.Context(feature_shape=shape, image_shape=(1, 10, 10), num_classes=num_classes, noise_std=noise_std)
    return information_report(features, labels, context=replace(context, **changes), queries=queries, seed=seed)


def two_classes(samples=400, dims=6, apart=20.0):
    """Two well separated classes of Gaussian samples."""
    labels = torch.arange(samples) % 2
    return gaussian(samples, dims) + apart * labels[:, None], labels


def channel_capacity(variances, noise_std):
    """Information in nats of independent Gaussians through Gaussian noise."""
    return 0.5 * sum(math.log(1 + variance / noise_std**2) for variance in variances)


def test_clusters_of_few_samples_do_not_undercut_a_single_gaussian():
    # Variances inside clusters that were fitted to the same samples would: k-means sees structure in noise.
    result = report(gaussian(300, 300), noise_std=1.0)
    assert None not in result["per_clusters"].values()
    assert result["clusters"] == 1
    assert result["nats"] == pytest.approx(channel_capacity([1.0] * 300, 1.0), rel=0.015)


def test_the_bias_of_variances_from_few_samples_is_corrected():
    truth = channel_capacity([1.0] * 200, 0.5)
    nats = [report(gaussian(12, 200, seed=seed), noise_std=0.5)["nats"] for seed in range(10)]
    # Without the correction the mean would lie 200 · ½ · 0.64 / 11 = 5.8 nats below.
    assert sum(nats) / 10 == pytest.approx(truth, abs=2)


def test_clusters_of_a_class_are_found_and_the_smallest_estimate_counts():
    places = 100 * gaussian(5, 8, seed=1)
    result = report(gaussian(5000, 8) + places[torch.arange(5000) % 5], noise_std=1.0)
    assert result["clusters"] == 5
    assert result["nats"] == min(result["per_clusters"].values()) == result["per_clusters"]["5"]
    assert result["nats"] == pytest.approx(math.log(5) + channel_capacity([1.0] * 8, 1.0), abs=0.1)


def test_independent_gaussians_are_measured_exactly_and_classes_far_apart_add_what_the_class_tells():
    stds, labels = torch.linspace(0.1, 2, 20, dtype=torch.float64), torch.arange(8000) % 2
    expected = math.log(2) + channel_capacity(stds.square().tolist(), 0.5)
    per_clusters = report(gaussian(8000, 20) * stds + 40 * labels[:, None], labels)["per_clusters"]
    assert per_clusters["1"] == pytest.approx(expected, abs=0.2)
    for clusters in ("5", "15"):  # needless ones cost little
        assert expected < per_clusters[clusters] < expected + 3


def test_more_noise_leaves_fewer_nats_and_averaging_queries_is_less_noise():
    x, labels = two_classes()
    nats = [report(x, labels, noise_std=std)["nats"] for std in (0.1, 0.2, 2.0)]
    assert nats[0] > nats[1] > nats[2] > 0
    nine = report(x, labels, noise_std=0.6, queries=9)
    assert (nine["nats"], nine["noise_std"]) == pytest.approx((nats[1], 0.2), rel=1e-12)
    assert report(torch.full((50, 4), 3.0))["nats"] == 0


def test_scale_shift_shape_and_names_of_classes_do_not_matter():
    x, labels = two_classes(800)
    plain, large = report(x, labels), report(8 * x, labels, noise_std=4.0)
    assert large["per_clusters"] == pytest.approx(plain["per_clusters"], rel=1e-9)
    assert large["values"]["log_det"] == pytest.approx(plain["values"]["log_det"], rel=1e-9)
    assert large["values"]["centroid"] == pytest.approx(plain["values"]["centroid"], rel=1e-4)
    assert report(x + 7, labels)["per_clusters"]["1"] == pytest.approx(plain["per_clusters"]["1"], rel=1e-6)
    assert report(x.view(-1, 3, 2, 1), labels) == plain
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    mixed = report(x[order], 5 - 5 * labels[order], num_classes=6)  # four classes have no samples
    assert mixed["per_clusters"]["1"] == pytest.approx(plain["per_clusters"]["1"], rel=1e-12)
    assert mixed["nats"] == pytest.approx(plain["nats"], abs=0.5)
    assert mixed["within_variance"] == pytest.approx(plain["within_variance"], rel=1e-12)


@pytest.mark.parametrize(
    ("few", "joined"),
    [({2: slice(0, 6, 2), 3: slice(1, 5, 2)}, 1), ({2: slice(0, 8), 3: slice(8, 16)}, 2)],
    ids=["a handful joins the largest class", "small classes join one another"],
)
def test_classes_of_few_samples_are_joined(few, joined):
    x, labels = two_classes()
    together = labels.clone()
    for label, rows in few.items():
        labels[rows], together[rows] = label, joined
    expected = report(x, together)["per_clusters"]["1"]
    assert report(x, labels)["per_clusters"]["1"] == pytest.approx(expected, rel=1e-12)


def test_too_many_clusters_for_the_samples_are_left_out():
    x, labels = two_classes(samples=210)
    assert [nats is None for nats in report(x, labels)["per_clusters"].values()] == [False, False, True]
    assert report(x[:190], labels[:190])["per_clusters"]["5"] is None
    for samples in (2, 3, 9):
        assert report(gaussian(samples, 4), torch.arange(samples) % 3, num_classes=3)["clusters"] == 1


def test_variances_within_and_between_classes_by_hand():
    x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0], [4.0, 1.0], [7.0, 1.0]])
    result = report(x, torch.tensor([0, 0, 1, 1, 1]))  # means 1 and 5; the second column does not vary
    assert result["within_variance"] == pytest.approx(8 / 5 / 2)
    assert result["between_variance"] == pytest.approx((2 * (1 - 3.4) ** 2 + 3 * (5 - 3.4) ** 2) / 5 / 2)


@pytest.mark.parametrize("dims", [3, 30], ids=["more samples than columns", "more columns than samples"])
def test_log_det_is_half_the_log_determinant_of_covariance_over_noise(dims):
    x, labels = (gaussian(46, dims) @ gaussian(dims, dims, seed=1)).float().double(), torch.arange(46) % 3
    labels[labels == 2], labels[45] = torch.tensor([2] * 8 + [1] * 7), 3  # classes of 15, 22, 8, and a single sample
    expected = 0.0
    for label in range(3):
        covariance = torch.cov(x[labels == label].T)
        log_det = torch.logdet(torch.eye(dims, dtype=torch.float64) + covariance / 0.7**2).item()
        expected += (labels == label).sum().item() / 45 * log_det / 2
    assert report(x, labels, noise_std=0.7)["values"]["log_det"] == pytest.approx(expected, rel=1e-9)
    assert report(x[:5], torch.arange(5))["values"]["log_det"] is None


def test_a_surrogate_that_was_registered_speaks_under_its_name(monkeypatch):
    class Stranger(cem.Surrogate):
        name = "stranger"

        def assess(self, features, labels):
            assert features.shape == (400, 3, 2, 1)
            return None

    monkeypatch.setattr(cem.SURROGATES, "_members", {"none": cem.SURROGATES["none"], "stranger": Stranger})
    x, labels = two_classes()
    values = report(x.view(-1, 3, 2, 1), labels)["values"]
    assert values.items() >= {("stranger", None)}
    assert len(values) == 2


def test_without_noise_the_information_is_unbounded_and_nothing_has_a_value():
    result = report(*two_classes(), noise_std=0.0)
    assert (result["nats"], result["clusters"], result["noise_std"]) == (None, None, 0.0)
    assert result["per_clusters"] == {"1": None, "5": None, "15": None}
    assert result["values"] == dict.fromkeys((*(set(cem.SURROGATES) - {"none"}), "log_det"))


def test_the_report_is_plain_json_of_its_seed_and_leaves_random_numbers_and_features_alone():
    x, labels = two_classes()
    x = x.float().requires_grad_()
    before, state = x.detach().clone(), torch.get_rng_state()
    first, second, other = report(x, labels), report(x, labels), report(x, labels, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert json.loads(json.dumps(first, allow_nan=False)) == first == second
    assert first["per_clusters"]["1"] == other["per_clusters"]["1"]
    assert first["per_clusters"]["5"] != other["per_clusters"]["5"]
    assert "not a certificate" in first["note"]
    assert (first["feature_dims"], first["image_dims"]) == (6, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_std": math.inf}, "noise_std must be finite"),
        ({"queries": 0}, "queries at least 1"),
        ({"feature_shape": (3,)}, "samples of shape"),
        ({"features": torch.tensor([[0.0], [-math.inf]])}, "features must be finite"),
        ({"features": torch.ones(1, 3)}, "at least 2 samples"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        report(**{"features": gaussian(20, 6), **options})
