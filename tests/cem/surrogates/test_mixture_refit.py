"""Fitting the mixture, the information figure, and state."""

import itertools
import math
import warnings

import pytest
import torch

from cem import GaussianMixtureCEM
from cem.errors import UsageError
from cem.surrogates.kmeans import _kmeans_plus_plus

both_fits = pytest.mark.parametrize("kind", ["kmeans", "full"])


def blobs(num_classes=3, blobs_per_class=4, per_blob=10, dim=5, spread=0.1, seed=0):
    """Well separated blobs of equal size: features [N, D], labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    centers = 10 * torch.randn(num_classes, blobs_per_class, 1, dim, generator=generator)
    noise = torch.randn(num_classes, blobs_per_class, per_blob, dim, generator=generator)
    features = (centers + spread * noise).view(-1, dim)
    labels = torch.arange(num_classes).repeat_interleave(blobs_per_class * per_blob)
    shuffled = torch.randperm(len(labels), generator=generator)
    return features[shuffled], labels[shuffled]


def fit(features, labels, num_classes=3, seed=0, **options):
    torch.manual_seed(seed)
    surrogate = GaussianMixtureCEM(features.shape[1], num_classes, **options)
    surrogate.after_epoch(features, labels)
    return surrogate


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def covariances(surrogate, c):
    """[k, D, D]: of the components of class ``c``."""
    if surrogate.fit == "kmeans":
        return surrogate.variances[c, :, None, None] * torch.eye(surrogate.feature_dim)
    directions = surrogate.directions[c]
    return directions.T @ surrogate.covariances[c] @ directions


# k-means.


def test_every_cluster_is_described_by_its_own_samples():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 5, generator=generator) + 3, torch.arange(200) % 3
    surrogate = fit(features, labels, num_clusters=6)
    cluster = torch.cdist(features[:, None], surrogate.centroids[labels]).squeeze(1).argmin(1)
    for c, j in itertools.product(range(3), range(6)):
        mine = features[(labels == c) & (cluster == j)]
        assert surrogate.weights[c, j].item() == pytest.approx(len(mine) / (labels == c).sum().item())
        torch.testing.assert_close(surrogate.centroids[c, j], mine.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(surrogate.variances[c, j], mine.var(0, unbiased=False).mean(), rtol=1e-4, atol=1e-6)


def test_tight_clusters_far_from_the_origin_are_told_apart():
    # Inner products of uncentered rows would be off by 6e-8 · 5 · 1e8 in fp32; the clusters are 5 apart.
    generator = torch.Generator().manual_seed(0)
    side = torch.arange(40) % 2
    features = 1e4 + side[:, None] + 0.01 * torch.randn(40, 5, generator=generator)
    surrogate = fit(features, torch.zeros(40).long(), num_classes=1, num_clusters=2)
    assert surrogate.weights.tolist() == [[0.5, 0.5]]
    assert surrogate.variances.max() < 2e-4


def test_more_steps_lower_the_variance_within_clusters():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(300, 4, generator=generator), torch.arange(300) % 3
    one, many = (fit(features, labels, num_clusters=5, max_iterations=steps) for steps in (1, 50))
    assert ((many.weights * many.variances).sum(1) < (one.weights * one.variances).sum(1)).all()


def test_the_next_refit_starts_from_the_last_centroids_and_draws_nothing():
    features, labels = blobs()
    surrogate = fit(features, labels, num_clusters=4)
    last, state = surrogate.centroids.clone(), torch.get_rng_state()
    surrogate.after_epoch(features + 0.5, labels)
    assert torch.equal(torch.get_rng_state(), state)
    # Blobs that all moved by 0.5 keep their centroid's number.
    torch.testing.assert_close(surrogate.centroids, last + 0.5, rtol=1e-4, atol=1e-4)


def test_seeds_are_drawn_in_proportion_to_distance():
    torch.manual_seed(0)
    x, draws = torch.tensor([[0.0], [1.0], [3.0]]), 6000
    pairs = torch.stack([_kmeans_plus_plus(x, 2).flatten() for _ in range(draws)])
    # Second given first: from 0 at distances 1 and 3, from 1 at 1 and 2, from 3 at 3 and 2.
    expected = {(0, 1): 1 / 4, (0, 3): 3 / 4, (1, 0): 1 / 3, (1, 3): 2 / 3, (3, 0): 3 / 5, (3, 1): 2 / 5}
    for pair, probability in expected.items():
        share = (pairs == torch.tensor(pair)).all(1).float().mean().item()
        assert share == pytest.approx(probability / 3, abs=0.025)  # over 4 standard deviations


def test_a_cluster_without_samples_keeps_its_number_and_one_of_one_sample_has_no_variance():
    features = torch.tensor([[0.0], [2.0], [10.0], [14.0], [14.0], [99.0]])
    surrogate = GaussianMixtureCEM(1, 1, num_clusters=4)
    surrogate.centroids.copy_(torch.tensor([[[0.0], [-500.0], [12.0], [100.0]]]))
    surrogate.class_counts.fill_(6)  # so that the refit is warm
    surrogate.after_epoch(features, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(surrogate.centroids[0, :, 0], torch.tensor([1.0, -500.0, 38 / 3, 99.0]))
    torch.testing.assert_close(surrogate.weights[0], torch.tensor([2 / 6, 0.0, 3 / 6, 1 / 6]))
    torch.testing.assert_close(surrogate.variances[0], torch.tensor([1.0, 0.0, 32 / 9, 0.0]))


# Both fits: awkward classes.


@both_fits
def test_a_refit_counts_the_samples_of_every_class_but_ignored_ones(kind):
    features, labels = blobs(spread=1.0)
    ignored = torch.arange(len(labels)) % 7 == 0
    found = fit(features.masked_fill(ignored[:, None], math.nan), labels.masked_fill(ignored, -100), 4, fit=kind)
    plain = fit(features[~ignored], labels[~ignored], 4, fit=kind)
    assert same(found, plain)
    assert torch.equal(found.class_counts, labels[~ignored].bincount(minlength=4))
    torch.testing.assert_close(found.weights.sum(1), torch.tensor([1.0, 1.0, 1.0, 0.0]))


@both_fits
@pytest.mark.parametrize("gone", [[1], [0, 1, 2]], ids=["one", "all"])
def test_classes_without_samples_become_unfitted(kind, gone):
    features, labels = blobs()
    surrogate = fit(features, labels, num_clusters=2, fit=kind)
    left = ~torch.isin(labels, torch.tensor(gone))
    surrogate.after_epoch(features[left], labels[left])
    assert not surrogate.class_counts[gone].any()
    assert not surrogate.weights[gone].any()
    assert surrogate(features[~left], labels[~left])[0].item() == 0


@both_fits
def test_a_class_smaller_than_its_clusters_is_fitted_exactly(kind):
    features, labels = blobs(per_blob=1)
    surrogate = fit(features, labels, num_clusters=8, fit=kind)
    torch.testing.assert_close(surrogate.weights.sum(1), torch.ones(3))
    assert surrogate.variances.max() < 2e-4  # reg_covar of the full fit
    assert surrogate(features, labels)[1].item() == pytest.approx(0, abs=1e-6)


@both_fits
@pytest.mark.parametrize("copies", [1, 6])
def test_a_class_of_one_distinct_sample_is_a_point(kind, copies):
    surrogate = fit(torch.full((copies, 4), 2.5), torch.zeros(copies).long(), 1, num_clusters=3, fit=kind)
    assert surrogate.weights.tolist() == [[1.0, 0.0, 0.0]]
    assert not surrogate.variances.any()
    assert surrogate.centroids[0, 0].tolist() == [2.5] * 4


@both_fits
def test_refit_leaves_the_features_alone_and_out_of_any_graph(kind):
    features, labels = blobs()
    before = features.clone()
    surrogate = fit(features.requires_grad_(), labels, num_clusters=3, fit=kind)
    assert torch.equal(features, before)
    assert not any(buffer.requires_grad for buffer in surrogate.buffers())


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(3, 5), [0, 0, 0], r"feature_dim=6 features, got \[3, 5\]"),
        (torch.zeros(3, 6), [0, 1, 4], "labels.*4.*0 to 4"),
        (torch.full((3, 6), math.nan), [0, 0, 0], "finite, got values from nan"),
        (torch.full((3, 6), -math.inf), [0, 0, 0], "finite, got values from -inf"),
    ],
)
def test_a_refit_refuses_what_a_step_does_and_what_is_not_finite(features, labels, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixtureCEM(6, 4).after_epoch(features, torch.tensor(labels))


# The full-covariance fit, and information.


def test_full_fit_recovers_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([[3.0, 1.0, 0.5], [0.5, 2.0, 1.0]])
    which = torch.arange(4000) % 4 // 3  # three quarters, one quarter
    features = 20.0 * which[:, None] + torch.randn(4000, 3, generator=generator) * scale[which]
    surrogate = fit(features, torch.zeros(4000).long(), num_classes=1, num_clusters=2, fit="full")
    order = surrogate.centroids[0, :, 0].argsort()
    torch.testing.assert_close(surrogate.weights[0, order], torch.tensor([0.75, 0.25]), rtol=0.01, atol=0)
    expected = scale.square().diag_embed()
    torch.testing.assert_close(covariances(surrogate, 0)[order], expected, rtol=0.15, atol=0.3)


@pytest.mark.parametrize(("samples", "columns", "kept"), [(6, 20, 6), (101, 103, 100)])
def test_full_fit_keeps_the_rank_it_has_and_a_hundred_directions_at_most(samples, columns, kept):
    features = torch.randn(samples, columns, generator=torch.Generator().manual_seed(0))
    surrogate = fit(features, torch.zeros(samples).long(), num_classes=1, num_clusters=1, fit="full")
    assert surrogate.directions.shape == (1, min(columns, 100), columns)
    assert surrogate.directions[0].any(1).sum() == kept
    assert math.isfinite(surrogate.information(0.1))


def test_full_fit_is_silent_about_its_cap_on_steps():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(*blobs(spread=9.0), num_clusters=3, fit="full", max_iterations=1)


@both_fits
@pytest.mark.parametrize("noise_std", [0.025, 1.0])
def test_information_equals_the_formula_on_whole_covariances(kind, noise_std):
    features, labels = blobs(spread=2.0)
    torch.manual_seed(0)
    surrogate = GaussianMixtureCEM(5, 4, num_clusters=3, reg_strength=noise_std, fit=kind)
    reported = surrogate.after_epoch(features, labels)  # class 3 is unfitted
    noise = noise_std**2 * torch.eye(5, dtype=torch.float64)
    per_class = []
    for c in range(3):
        trace = covariances(surrogate, c).diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(surrogate.variances[c], trace / 5)
        total = 0.0
        for pi, sigma in zip(surrogate.weights[c].double(), covariances(surrogate, c).double(), strict=True):
            total += pi * (-pi.log() + (torch.logdet(sigma + noise) - torch.logdet(noise)) / 2)
        per_class.append(total.item())
    assert surrogate.information(noise_std) == pytest.approx(sum(per_class) / 3, rel=1e-4)
    assert reported == {"information_nats": surrogate.information(noise_std)}


def test_information_takes_the_diagonal_where_cholesky_fails_and_there_alone():
    surrogate = GaussianMixtureCEM(2, 1, num_clusters=2, fit="full")
    surrogate.weights.fill_(0.5)
    surrogate.class_counts.fill_(10)
    surrogate.covariances.copy_(torch.tensor([[[[1.0, 5.0], [5.0, 3.0]], [[1.0, 1.0], [1.0, 3.0]]]]))
    halves = (math.log(2.0 * 4.0) + math.log(2.0 * 4.0 - 1.0)) / 2
    assert surrogate.information(1.0) == pytest.approx(math.log(2.0) + 0.5 * halves)


@pytest.mark.parametrize("noise_std", [0.0, -1.0, math.nan, math.inf])
def test_information_needs_noise(noise_std):
    with pytest.raises(ValueError, match=f"noise_std.*got {noise_std}"):
        GaussianMixtureCEM(5, 3).information(noise_std)


def test_information_needs_a_fit_and_is_nothing_for_a_point():
    surrogate = GaussianMixtureCEM(3, 1, num_clusters=3)
    with pytest.raises(RuntimeError, match=r"needs a fitted mixture: call after_epoch\(\) first"):
        surrogate.information(0.1)
    assert surrogate.after_epoch(torch.empty(0, 3), torch.empty(0).long()) == {}
    assert surrogate.after_epoch(torch.ones(4, 3), torch.zeros(4).long()) == {"information_nats": 0.0}
    surrogate.reg_strength = 0.0
    assert surrogate.after_epoch(torch.ones(4, 3), torch.zeros(4).long()) == {}


def test_what_scikit_learn_refuses_is_said_with_the_fit_to_take(monkeypatch):
    """As it does with features so large that a covariance loses the digits of its eigenvalues."""

    def refuse(*_):
        raise ValueError("Fitting the mixture model failed because of a covariance. Increase reg_covar.")

    monkeypatch.setattr("sklearn.mixture.GaussianMixture.fit", refuse)
    message = r"fit 'full' fails on a class of 40 samples \(Fitting .* a covariance\); take 'kmeans'$"
    with pytest.raises(UsageError, match=message):
        GaussianMixtureCEM(3, 1, fit="full").refit(torch.randn(40, 3), torch.zeros(40).long())
