"""Fitting the mixture, the information figure, and state."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cem import GaussianMixtureCEM
from cem.surrogates.kmeans import _kmeans_plus_plus

FITS = ["kmeans", "full"]


def blobs(num_classes=3, blobs_per_class=4, per_blob=10, dim=5, spread=0.1, seed=0):
    """Well separated blobs of equal size: features [N, D], labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    centers = 10 * torch.randn(num_classes, blobs_per_class, 1, dim, generator=generator)
    noise = torch.randn(num_classes, blobs_per_class, per_blob, dim, generator=generator)
    features = (centers + spread * noise).view(-1, dim)
    labels = torch.arange(num_classes).repeat_interleave(blobs_per_class * per_blob)
    shuffled = torch.randperm(len(labels), generator=generator)
    return features[shuffled], labels[shuffled]


def fit(features, labels, num_classes=None, seed=0, **options):
    torch.manual_seed(seed)
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    surrogate = GaussianMixtureCEM(features.shape[1], num_classes, **options)
    surrogate.after_epoch(features, labels)
    return surrogate


def covariances(surrogate, c):
    """[k, D, D]: of the components of class ``c``."""
    if surrogate.fit == "kmeans":
        return surrogate.variances[c, :, None, None] * torch.eye(surrogate.feature_dim)
    directions = surrogate.directions[c]
    return directions.T @ surrogate.covariances[c] @ directions


def nearest_own(surrogate, features, labels):
    return torch.cdist(features[:, None], surrogate.centroids[labels]).squeeze(1).argmin(1)


# k-means.


def test_every_cluster_is_described_by_its_own_samples():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=generator) + 3
    labels = torch.randint(3, (200,), generator=generator)
    surrogate = fit(features, labels, num_clusters=6)
    cluster = nearest_own(surrogate, features, labels)
    for c in range(3):
        for j in range(6):
            mine = features[(labels == c) & (cluster == j)]
            assert surrogate.weights[c, j].item() == pytest.approx(len(mine) / (labels == c).sum().item())
            torch.testing.assert_close(surrogate.centroids[c, j], mine.mean(0), rtol=1e-5, atol=1e-5)
            expected = (mine - mine.mean(0)).square().mean()
            torch.testing.assert_close(surrogate.variances[c, j], expected, rtol=1e-4, atol=1e-6)


def test_one_cluster_is_the_class_mean_and_variance():
    features, labels = blobs(spread=1.0)
    surrogate = fit(features, labels, num_clusters=1)
    for c in range(3):
        mine = features[labels == c]
        torch.testing.assert_close(surrogate.centroids[c, 0], mine.mean(0))
        torch.testing.assert_close(surrogate.variances[c, 0], mine.var(0, unbiased=False).mean())


def test_tight_clusters_far_from_the_origin_are_told_apart():
    # Inner products of uncentered rows would be off by 6e-8 · 5 · 1e8 in fp32; the clusters are 5 apart.
    generator = torch.Generator().manual_seed(0)
    side = torch.arange(40) % 2
    features = 1e4 + side[:, None] + 0.01 * torch.randn(40, 5, generator=generator)
    surrogate = fit(features, torch.zeros(40, dtype=torch.int64), num_clusters=2)
    assert surrogate.weights.tolist() == [[0.5, 0.5]]
    assert surrogate.variances.max() < 2e-4


def test_samples_are_only_clustered_with_their_own_class():
    features, labels = blobs()
    surrogate = fit(features, labels, num_clusters=4, num_classes=3)
    alone = GaussianMixtureCEM(5, 3, num_clusters=4)
    alone.load_state_dict(surrogate.state_dict())
    keep = labels != 1
    alone.after_epoch(features[keep], labels[keep])
    for c in (0, 2):
        torch.testing.assert_close(alone.centroids[c], surrogate.centroids[c])
        torch.testing.assert_close(alone.variances[c], surrogate.variances[c])


def test_more_steps_lower_the_variance_within_clusters():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(300, 4, generator=generator), torch.arange(300) % 3
    one, many = (fit(features, labels, num_clusters=5, max_iterations=steps) for steps in (1, 50))
    assert ((many.weights * many.variances).sum(1) < (one.weights * one.variances).sum(1)).all()


def test_a_converged_fit_is_a_fixed_point():
    features, labels = blobs(spread=2.0)
    surrogate = fit(features, labels, num_clusters=4)
    before = {name: buffer.clone() for name, buffer in surrogate.named_buffers()}
    surrogate.after_epoch(features, labels)
    for name, buffer in surrogate.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=1e-5, atol=1e-6)


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


def test_an_empty_cluster_in_the_middle_keeps_its_number():
    features = torch.tensor([[0.0], [2.0], [10.0], [14.0], [14.0]])
    surrogate = GaussianMixtureCEM(1, 1, num_clusters=3)
    surrogate.centroids.copy_(torch.tensor([[[0.0], [-500.0], [12.0]]]))
    surrogate.class_counts.fill_(5)  # so that the refit is warm
    surrogate.after_epoch(features, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(surrogate.centroids[0, :, 0], torch.tensor([1.0, -500.0, 38 / 3]))
    torch.testing.assert_close(surrogate.weights[0], torch.tensor([0.4, 0.0, 0.6]))
    torch.testing.assert_close(surrogate.variances[0], torch.tensor([1.0, 0.0, 32 / 9]))


def test_a_singleton_cluster_has_no_variance_and_weighs_one_sample():
    features = torch.tensor([[0.0], [2.0], [100.0], [50.0], [54.0]])
    surrogate = GaussianMixtureCEM(1, 1, num_clusters=3)
    surrogate.centroids.copy_(torch.tensor([[[0.0], [100.0], [50.0]]]))
    surrogate.class_counts.fill_(5)
    surrogate.after_epoch(features, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(surrogate.weights[0], torch.tensor([0.4, 0.2, 0.4]))
    assert surrogate.variances[0].tolist() == [1.0, 0.0, 4.0]


# Both fits: awkward classes.


@pytest.mark.parametrize("kind", FITS)
def test_weights_of_a_fitted_class_sum_to_one(kind):
    surrogate = fit(*blobs(spread=1.0), num_clusters=4, fit=kind)
    torch.testing.assert_close(surrogate.weights.sum(1), torch.ones(3))


@pytest.mark.parametrize("kind", FITS)
def test_class_counts_are_those_of_the_training_set(kind):
    labels = torch.tensor([0, 0, 2, 2, 2, 0, 2, 2])
    surrogate = fit(torch.randn(8, 3), labels, num_classes=4, num_clusters=2, fit=kind)
    assert surrogate.class_counts.tolist() == [3, 0, 5, 0]


@pytest.mark.parametrize("kind", FITS)
def test_a_class_without_samples_becomes_unfitted(kind):
    features, labels = blobs()
    surrogate = fit(features, labels, num_clusters=2, fit=kind)
    surrogate.after_epoch(features[labels != 1], labels[labels != 1])
    assert surrogate.class_counts[1] == 0
    assert (surrogate.weights[1] == 0).all()
    results = surrogate(features[labels == 1], labels[labels == 1])
    assert [result.item() for result in results] == [0.0, 0.0]


@pytest.mark.parametrize("kind", FITS)
def test_a_class_smaller_than_its_clusters_is_fitted_exactly(kind):
    features, labels = 10 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(3).long()
    surrogate = fit(features, labels, num_clusters=8, fit=kind)
    assert surrogate.weights.sum().item() == pytest.approx(1)
    assert surrogate.variances.max() < 2e-4  # reg_covar of the full fit
    assert surrogate(features, labels)[1].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("copies", [1, 6])
def test_a_class_of_one_distinct_sample_is_a_point(kind, copies):
    features, labels = torch.full((copies, 4), 2.5), torch.zeros(copies).long()
    surrogate = fit(features, labels, num_clusters=3, fit=kind)
    assert surrogate.weights.tolist() == [[1.0, 0.0, 0.0]]
    assert surrogate.variances.tolist() == [[0.0, 0.0, 0.0]]
    assert surrogate.centroids[0, 0].tolist() == [2.5] * 4


@pytest.mark.parametrize("kind", FITS)
def test_an_empty_training_set_leaves_nothing_fitted(kind):
    surrogate = fit(*blobs(), num_clusters=2, fit=kind)
    surrogate.after_epoch(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert surrogate.class_counts.tolist() == [0, 0, 0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2)), min_size=1, max_size=30))
def test_any_training_set_gives_a_finite_mixture(samples):
    labels = torch.tensor([label for label, _ in samples])
    features = torch.tensor([[float(value), 1.0] for _, value in samples])
    surrogate = fit(features, labels, num_classes=4, num_clusters=3)
    assert all(buffer.isfinite().all() for buffer in surrogate.buffers())
    assert (surrogate.variances >= 0).all()
    present = (surrogate.class_counts > 0).float()
    torch.testing.assert_close(surrogate.weights.sum(1), present)
    assert torch.equal(surrogate.class_counts, labels.bincount(minlength=4))
    assert all(result.isfinite() for result in surrogate(features, labels))


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused(kind, value):
    features, labels = blobs()
    features[7, 2] = value
    with pytest.raises(ValueError, match="finite"):
        GaussianMixtureCEM(5, 3, fit=kind).after_epoch(features, labels)


@pytest.mark.parametrize("kind", FITS)
def test_half_precision_features_are_fitted_in_fp32(kind):
    features, labels = blobs(spread=1.0)
    features = features.bfloat16()
    half, single = (fit(x, labels, num_clusters=3, fit=kind) for x in (features, features.float()))
    assert all(torch.equal(a, b) for a, b in zip(half.buffers(), single.buffers(), strict=True))


@pytest.mark.parametrize("kind", FITS)
def test_refit_leaves_the_features_alone_and_out_of_any_graph(kind):
    features, labels = blobs()
    before = features.clone()
    surrogate = fit(features.requires_grad_(), labels, num_clusters=3, fit=kind)
    assert torch.equal(features, before)
    assert not any(buffer.requires_grad for buffer in surrogate.buffers())


def test_refit_reads_feature_maps_as_flattened_rows():
    features, labels = blobs(dim=12)
    torch.manual_seed(0)
    maps = GaussianMixtureCEM(12, 3, num_clusters=3)
    maps.after_epoch(features.view(-1, 3, 2, 2), labels)
    assert torch.equal(maps.centroids, fit(features, labels, num_clusters=3).centroids)


# Seeds and state.


@pytest.mark.parametrize("kind", FITS)
def test_a_seeded_refit_repeats_bit_for_bit(kind):
    features, labels = blobs(spread=3.0)
    first, second = (fit(features, labels, num_clusters=5, fit=kind, seed=11) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_another_seed_starts_elsewhere():
    features, labels = blobs(spread=3.0)
    first, second = (fit(features, labels, num_clusters=5, seed=seed) for seed in (1, 2))
    assert not torch.equal(first.centroids, second.centroids)


@pytest.mark.parametrize("kind", FITS)
def test_a_loaded_state_goes_on_bit_for_bit(kind):
    features, labels = blobs(spread=3.0)
    surrogate = fit(features, labels, num_clusters=5, fit=kind)
    resumed = GaussianMixtureCEM(5, 3, num_clusters=5, fit=kind)
    resumed.load_state_dict(surrogate.state_dict(), strict=True)
    assert resumed(features, labels) == surrogate(features, labels)
    for each in (surrogate, resumed):
        torch.manual_seed(5)
        each.after_epoch(features + 1, labels)
    assert all(torch.equal(a, b) for a, b in zip(surrogate.buffers(), resumed.buffers(), strict=True))


# The full-covariance fit, and information.


def test_full_fit_recovers_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([[3.0, 1.0, 0.5], [0.5, 2.0, 1.0]])
    which = torch.arange(4000) % 4 // 3  # three quarters, one quarter
    features = 20.0 * which[:, None] + torch.randn(4000, 3, generator=generator) * scale[which]
    surrogate = fit(features, torch.zeros(4000).long(), num_clusters=2, fit="full")
    order = surrogate.centroids[0, :, 0].argsort()
    torch.testing.assert_close(surrogate.weights[0, order], torch.tensor([0.75, 0.25]), rtol=0.01, atol=0)
    expected = scale.square().diag_embed()
    torch.testing.assert_close(covariances(surrogate, 0)[order], expected, rtol=0.15, atol=0.3)


def test_full_fit_stores_the_trace_of_the_covariance_per_column():
    surrogate = fit(*blobs(spread=2.0), num_clusters=3, fit="full")
    for c in range(3):
        trace = covariances(surrogate, c).diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(surrogate.variances[c], trace / 5)


def test_full_fit_of_more_columns_than_samples_keeps_the_rank_it_has():
    features = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    surrogate = fit(features, torch.zeros(6).long(), num_clusters=2, fit="full")
    assert surrogate.directions.shape == (1, 20, 20)
    assert (surrogate.directions[0, 6:] == 0).all()
    assert math.isfinite(surrogate.information(0.1))


def test_full_fit_keeps_a_hundred_directions():
    features = torch.randn(120, 103, generator=torch.Generator().manual_seed(0))
    surrogate = fit(features, torch.zeros(120).long(), num_clusters=1, fit="full")
    assert surrogate.directions.shape == (1, 100, 103)
    assert surrogate.directions[0].any(1).all()


def test_full_fit_is_silent_about_its_cap_on_steps():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(*blobs(spread=9.0), num_clusters=3, fit="full", max_iterations=1)


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("noise_std", [0.025, 1.0])
def test_information_equals_the_formula_on_whole_covariances(kind, noise_std):
    features, labels = blobs(spread=2.0)
    surrogate = fit(features, labels, num_classes=4, num_clusters=3, fit=kind)  # class 3 is unfitted
    noise = noise_std**2 * torch.eye(5, dtype=torch.float64)
    per_class = []
    for c in range(3):
        total = 0.0
        for pi, sigma in zip(surrogate.weights[c].double(), covariances(surrogate, c).double(), strict=True):
            total += pi * (-pi.log() + (torch.logdet(sigma + noise) - torch.logdet(noise)) / 2)
        per_class.append(total.item())
    assert surrogate.information(noise_std) == pytest.approx(sum(per_class) / 3, rel=1e-4)


def test_information_of_empty_clusters_is_nothing():
    features, labels = torch.full((4, 3), 1.0), torch.zeros(4).long()
    assert fit(features, labels, num_clusters=3).information(0.1) == 0.0


def test_information_takes_the_diagonal_where_cholesky_fails():
    surrogate = GaussianMixtureCEM(2, 1, num_clusters=1, fit="full")
    surrogate.directions.copy_(torch.eye(2)[None])
    surrogate.weights.fill_(1.0)
    surrogate.class_counts.fill_(10)
    surrogate.covariances.copy_(torch.tensor([[[[1.0, 5.0], [5.0, 3.0]]]]))  # determinant -22
    assert surrogate.information(1.0) == pytest.approx((math.log(2.0) + math.log(4.0)) / 2)


def test_one_failed_factorization_does_not_change_the_others():
    surrogate = GaussianMixtureCEM(2, 1, num_clusters=2, fit="full")
    surrogate.weights.fill_(0.5)
    surrogate.class_counts.fill_(10)
    surrogate.covariances.copy_(torch.tensor([[[[1.0, 5.0], [5.0, 3.0]], [[1.0, 1.0], [1.0, 3.0]]]]))
    halves = (math.log(2.0 * 4.0) + math.log(2.0 * 4.0 - 1.0)) / 2
    assert surrogate.information(1.0) == pytest.approx(math.log(2.0) + 0.5 * halves)


@pytest.mark.parametrize("kind", FITS)
def test_a_refit_gives_the_information_at_the_noise_of_the_run(kind):
    torch.manual_seed(0)
    surrogate = GaussianMixtureCEM(5, 3, num_clusters=2, reg_strength=0.3, fit=kind)
    assert surrogate.after_epoch(*blobs(spread=2.0)) == {"information_nats": surrogate.information(0.3)}


def test_a_refit_gives_nothing_without_noise_or_samples():
    assert GaussianMixtureCEM(5, 3, reg_strength=0.0).after_epoch(*blobs()) == {}
    assert GaussianMixtureCEM(5, 3).after_epoch(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)) == {}


@pytest.mark.parametrize("kind", FITS)
def test_more_noise_leaves_less_information(kind):
    surrogate = fit(*blobs(spread=2.0), num_clusters=3, fit=kind)
    figures = [surrogate.information(noise_std) for noise_std in (0.01, 0.1, 1.0, 10.0)]
    assert figures == sorted(figures, reverse=True)
    assert len(set(figures)) == 4


@pytest.mark.parametrize("noise_std", [0.0, -1.0, math.nan, math.inf])
def test_information_needs_noise(noise_std):
    with pytest.raises(ValueError, match=f"noise_std.*got {noise_std}"):
        fit(*blobs(), num_clusters=2).information(noise_std)


def test_information_needs_a_fit():
    with pytest.raises(RuntimeError, match=r"needs a fitted mixture: call after_epoch\(\) first"):
        GaussianMixtureCEM(3, 2).information(0.1)
