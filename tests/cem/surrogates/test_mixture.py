"""The Gaussian-mixture surrogate in a step: values, gradients, and what the original got wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cem
from cem import GaussianMixtureCEM
from cem.errors import BackendError, UsageError

D, K, N_CLUSTERS = 6, 4, 3


def training_set(seed=0, num_samples=80, dim=D, num_classes=K):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    centers = 2 * torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_samples, dim, generator=generator, dtype=torch.float64)
    return centers[labels] + noise, labels


def fitted(**options):
    """An fp64 surrogate after one refit."""
    torch.manual_seed(0)
    surrogate = GaussianMixtureCEM(D, K, **{"num_clusters": N_CLUSTERS, **options}).double()
    surrogate.after_epoch(*training_set())
    return surrogate


def hand_set(centroids, weights, variances, counts, **options):
    """An fp64 surrogate with this mixture: centroids [K, k, D], weights and variances [K, k], counts [K]."""
    centroids = torch.tensor(centroids, dtype=torch.float64)
    num_classes, num_clusters, dim = centroids.shape
    surrogate = GaussianMixtureCEM(dim, num_classes, num_clusters=num_clusters, **options).double()
    surrogate.centroids.copy_(centroids)
    surrogate.weights.copy_(torch.tensor(weights))
    surrogate.variances.copy_(torch.tensor(variances))
    surrogate.class_counts.copy_(torch.tensor(counts))
    return surrogate


def loop(surrogate, features, labels):
    """The definition: one class, one cluster, one sample at a time."""
    penalties, distances = [], []
    for c in range(surrogate.num_classes):
        members = [z for z, label in zip(features, labels.tolist(), strict=True) if label == c]
        if not members or surrogate.class_counts[c] == 0:
            continue
        clusters = {}
        for z in members:
            distance = [(z - mu).square().sum().item() for mu in surrogate.centroids[c]]
            candidates = [j for j in range(surrogate.num_clusters) if surrogate.weights[c, j] > 0]
            nearest = min(candidates, key=lambda j: distance[j])
            clusters.setdefault(nearest, []).append((z - surrogate.centroids[c, nearest]).square().mean())
        penalty = 0.0
        for j, squared in clusters.items():
            weight, stored = surrogate.weights[c, j], surrogate.variances[c, j]
            a = min(10 * len(squared) / (weight.item() * surrogate.class_counts[c].item()), 0.99)
            v = a * sum(squared) / len(squared) + (1 - a) * stored
            threshold = surrogate.var_threshold * surrogate.reg_strength**2
            excess = torch.log(v + surrogate.gamma) - math.log(threshold + surrogate.gamma)
            penalty = penalty + weight * torch.relu(excess)
        penalties.append(penalty)
        distances.append(sum(sum(squared) for squared in clusters.values()) / len(members))
    if not penalties:
        return features.sum() * 0, features.sum() * 0
    return sum(penalties) / len(penalties), sum(distances) / len(distances)


def gradient(result, features):
    return torch.autograd.grad(result, features, retain_graph=True)[0]


def test_it_asks_for_refits_and_for_no_captured_graph():
    surrogate = GaussianMixtureCEM(D, K)
    assert surrogate.needs_epoch_features
    assert not surrogate.capturable


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_strength": 0.0},
        {"var_threshold": 4.0, "reg_strength": 0.5},  # some clusters below the threshold
        {"num_clusters": 1},
        {"fit": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_samples", [1, 7, 40])
def test_forward_equals_the_loop(options, num_samples):
    surrogate = fitted(**options)
    features, labels = training_set(seed=1, num_samples=num_samples)
    features.requires_grad_()
    expected, actual = loop(surrogate, features, labels), surrogate(features, labels)
    for name, want, have in zip(("rob_loss", "intra_mse"), expected, actual, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(gradient(have, features), gradient(want, features), rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, K - 1), max_size=24), st.integers(0, 2**16))
def test_forward_equals_the_loop_for_any_labels(labels, seed):
    surrogate = fitted()
    surrogate.class_counts[1] = 0
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(labels), D, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(labels, dtype=torch.int64)
    for have, want in zip(surrogate(features, labels), loop(surrogate, features, labels), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient(have, features), gradient(want, features), rtol=1e-10, atol=1e-12)


def test_gradients_match_finite_differences():
    surrogate = fitted()
    features, labels = training_set(seed=1, num_samples=9)
    assert torch.autograd.gradcheck(lambda z: surrogate(z, labels), features.requires_grad_())


def test_order_of_samples_does_not_matter():
    surrogate = fitted()
    features, labels = training_set(seed=1, num_samples=30)
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    for have, want in zip(surrogate(features[shuffled], labels[shuffled]), surrogate(features, labels), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=0)


def test_gradient_flows_to_nothing_but_the_features():
    surrogate = fitted()
    assert not list(surrogate.parameters())
    assert not any(buffer.requires_grad for buffer in surrogate.buffers())


# What the published code gets wrong.


def two_classes(**options):
    """Class 0 has weights .25/.75, class 1 has .9/.1; centroids at 0 and 10 in both."""
    return hand_set(
        centroids=[[[0.0, 0.0], [10.0, 10.0]]] * 2,
        weights=[[0.25, 0.75], [0.9, 0.1]],
        variances=[[1.0, 2.0], [3.0, 4.0]],
        counts=[40, 200],
        var_threshold=0.5,
        reg_strength=0.2,
        gamma=0.01,
        **options,
    )


def test_classes_keep_their_own_cluster_weights():
    # Class 0: cluster 0 holds two samples: v = (1 + 4) / 2, a = min(10·2 / (.25·40), .99) = .99.
    # Class 1: cluster 1 holds one: v = 4, a = min(10 / (.1·200), .99) = .5. The threshold is .5·.2² = .02.
    features = torch.tensor([[1.0, 1.0], [2.0, 2.0], [12.0, 12.0]], dtype=torch.float64)
    rob_loss, intra_mse = two_classes()(features, torch.tensor([0, 0, 1]))
    class_0 = 0.25 * (math.log(0.99 * 2.5 + 0.01 * 1.0 + 0.01) - math.log(0.02 + 0.01))
    class_1 = 0.1 * (math.log(0.5 * 4.0 + 0.5 * 4.0 + 0.01) - math.log(0.02 + 0.01))
    assert rob_loss.item() == pytest.approx((class_0 + class_1) / 2, rel=1e-6)
    assert intra_mse.item() == pytest.approx((2.5 + 4.0) / 2)


def test_a_class_is_penalized_alike_with_and_without_the_others():
    surrogate = fitted()
    features, labels = training_set(seed=1, num_samples=40)
    alone = [surrogate(features[labels == c], labels[labels == c])[0] for c in range(K)]
    for kept in ([0, 1, 2, 3], [3, 1], [2, 0, 1], [0, 3]):
        # The kept classes' samples in the order in which kept names them.
        rows = torch.cat([torch.nonzero(labels == c).flatten() for c in kept])
        expected = torch.stack([alone[c] for c in kept]).mean()
        torch.testing.assert_close(surrogate(features[rows], labels[rows])[0], expected, rtol=1e-12, atol=0)


def test_stored_variance_is_looked_up_by_centroid_number_beside_an_empty_cluster():
    surrogate = hand_set(
        centroids=[[[0.0], [5.0], [10.0]]],
        weights=[[0.5, 0.0, 0.5]],  # the middle cluster got no training sample
        variances=[[1.0, 0.0, 7.0]],
        counts=[1000],
        reg_strength=0.0,
    )
    a = 10 / 500
    rob_loss, _ = surrogate(torch.tensor([[12.0]], dtype=torch.float64), torch.tensor([0]))
    assert rob_loss.item() == pytest.approx(0.5 * math.log((a * 4.0 + (1 - a) * 7.0 + 0.01) / 0.01))


def test_an_empty_cluster_takes_no_sample():
    surrogate = hand_set(
        centroids=[[[0.0], [5.0], [10.0]]],
        weights=[[0.5, 0.0, 0.5]],
        variances=[[1.0, 0.0, 7.0]],
        counts=[20],
    )
    rob_loss, intra_mse = surrogate(torch.tensor([[5.5]], dtype=torch.float64), torch.tensor([0]))
    assert intra_mse.item() == pytest.approx(4.5**2)  # to the cluster at 10, though one at 5 is nearer
    assert rob_loss > 0


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_empty_clusters_are_no_anomaly():
    surrogate = two_classes()
    surrogate.weights[:, 0] = 0.0
    features = torch.tensor([[1.0, 1.0], [12.0, 12.0]], dtype=torch.float64, requires_grad=True)
    with torch.autograd.detect_anomaly():  # raises where a backward function returns NaN, even if masked later
        surrogate(features, torch.tensor([0, 1]))[0].backward()
    assert features.grad.isfinite().all()


def test_no_noise_is_an_ordinary_setting():
    surrogate = two_classes()
    surrogate.reg_strength = 0.0
    features = torch.tensor([[1.0, 1.0], [12.0, 12.0]], dtype=torch.float64, requires_grad=True)
    rob_loss, _ = surrogate(features, torch.tensor([0, 1]))
    (16.0 * rob_loss).backward()
    assert rob_loss.isfinite()
    assert rob_loss > 0
    assert features.grad.isfinite().all()
    assert (features.grad != 0).all()


# Nothing to penalize.


def assert_attached_zeros(results, features):
    for result in results:
        assert result.item() == 0
        assert result.dim() == 0
        assert torch.equal(gradient(result, features), torch.zeros_like(features))


def test_before_the_first_refit_the_results_are_attached_zeros():
    features = torch.randn(5, D, requires_grad=True)
    assert_attached_zeros(GaussianMixtureCEM(D, K)(features, torch.tensor([0, 1, 1, 3, 0])), features)


def test_unfitted_classes_alone_give_attached_zeros():
    surrogate = fitted()
    surrogate.class_counts[2] = 0
    features = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    assert_attached_zeros(surrogate(features, torch.tensor([2, 2, 2])), features)


def test_unfitted_classes_do_not_touch_the_others_even_when_not_finite():
    surrogate = fitted()
    features, labels = training_set(seed=1, num_samples=20)
    expected = surrogate(features[labels != 2], labels[labels != 2])
    surrogate.class_counts[2] = 0
    features[labels == 2] = math.nan
    features.requires_grad_()
    actual = surrogate(features, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert (gradient(actual[0], features)[labels == 2] == 0).all()


# Precisions, compilation, bad input.


def test_half_precision_is_computed_in_fp32():
    surrogate = fitted().float()
    features, labels = training_set(seed=1, num_samples=20)
    features = features.bfloat16()
    assert surrogate(features, labels) == surrogate(features.float(), labels)


def test_half_precision_stays_finite_over_its_whole_range():
    torch.manual_seed(0)
    surrogate = GaussianMixtureCEM(D, 1, num_clusters=2)
    features = torch.tensor([0.0, 1e-38, 3e38 / 1e20, -1e18]).repeat(3)[:, None].expand(12, D).bfloat16()
    labels = torch.zeros(12, dtype=torch.int64)
    surrogate.after_epoch(features, labels)
    assert all(result.isfinite() for result in surrogate(features, labels))


def test_compiles_without_a_graph_break():
    surrogate = fitted()
    features, labels = training_set(seed=1, num_samples=20)
    compiled = torch.compile(surrogate, fullgraph=True, backend="eager")
    assert compiled(features, labels) == surrogate(features, labels)


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3).long(), ValueError, r"feature_dim=6 features, got \[3, 5\]"),
        (torch.zeros(3, 2, 3), torch.zeros(3).long(), ValueError, r"got \[3, 2, 3\]"),
        (torch.zeros(3, 6).long(), torch.zeros(3).long(), TypeError, "features.*int64"),
        (torch.zeros(3, 6), torch.zeros(3), TypeError, "labels.*float32"),
        (torch.zeros(3, 6), torch.zeros(4).long(), ValueError, r"labels.*\[B=3\].*got \[4\]"),
        (torch.zeros(3, 6), torch.tensor([0, 1, 4]), ValueError, "labels.*4.*0 to 4"),
    ],
)
def test_a_refit_refuses_what_a_step_does(features, labels, error, message):
    with pytest.raises(error, match=message):
        GaussianMixtureCEM(D, K).after_epoch(features, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 0}, "feature_dim.*got 0"),
        ({"num_classes": 0}, "num_classes.*got 0"),
        ({"num_clusters": 0}, "num_clusters.*got 0"),
        ({"max_iterations": 0}, "max_iterations.*got 0"),
        ({"var_threshold": -1.0}, "var_threshold.*got -1"),
        ({"reg_strength": math.nan}, "reg_strength.*got nan"),
        ({"gamma": 0.0}, "gamma.*got 0"),
        ({"fit": "em"}, "'kmeans' or 'full', got 'em'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixtureCEM(**{"feature_dim": D, "num_classes": K, **options})


# For a run.


def built(bounded=False, backend="auto", **options):
    context = cem.Context((2, 3, 1), (3, 8, 8), num_classes=K, noise_std=0.1, bounded=bounded, backend=backend)
    return cem.SURROGATES.build("mixture", context, GaussianMixtureCEM.Options(**options).checked("mixture."))


def test_build_takes_what_the_run_says():
    surrogate = built()
    assert (surrogate.feature_dim, surrogate.num_classes, surrogate.reg_strength) == (D, K, 0.1)
    assert (surrogate.schedule, surrogate.Options.weight) == ("rising", 16.0)


@pytest.mark.parametrize(("option", "value"), [("var_threshold", 0.5), ("gamma", 0.1), ("fit", "full")])
def test_build_hands_an_option_through(option, value):
    assert getattr(built(**{option: value}), option) == value != getattr(built(), option)


@pytest.mark.parametrize(
    ("clusters", "bounded", "expected"), [(None, False, 15), (None, True, 5), (7, False, 7), (7, True, 7)]
)
def test_build_takes_five_clusters_of_bounded_features_unless_told(clusters, bounded, expected):
    assert built(bounded, clusters=clusters).num_clusters == expected


def test_build_refuses_the_backend_that_it_does_not_have():
    with pytest.raises(BackendError, match="the surrogate mixture has no 'triton' backend"):
        built(backend="triton")


@pytest.mark.parametrize(("option", "value"), [("clusters", 0), ("var_threshold", -1.0), ("gamma", 0.0), ("fit", "em")])
def test_an_option_out_of_range_is_refused_by_name(option, value):
    with pytest.raises(UsageError, match=f"--mixture.{option.replace('_', '-')} .* got '?{value}"):
        built(**{option: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    def test_refit_and_step_equal_the_cpu(self):
        cpu, gpu = fitted(), GaussianMixtureCEM(D, K, num_clusters=N_CLUSTERS).double().cuda()
        torch.manual_seed(0)
        gpu.after_epoch(*(tensor.cuda() for tensor in training_set()))
        features, labels = training_set(seed=1, num_samples=40)
        torch.testing.assert_close(gpu.centroids.cpu(), cpu.centroids, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            [result.cpu() for result in gpu(features.cuda(), labels.cuda())], list(cpu(features, labels))
        )

    def test_a_step_repeats_bit_for_bit_without_a_host_sync(self):
        surrogate = fitted().float().cuda()
        features, labels = training_set(seed=1, num_samples=40)
        features, labels = features.float().cuda().requires_grad_(), labels.cuda()
        gradients = []
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                gradients.append(gradient(surrogate(features, labels)[0], features))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(*gradients)

    def test_a_refit_repeats_bit_for_bit(self):
        features, labels = (tensor.cuda() for tensor in training_set(num_samples=2000))
        fits = [GaussianMixtureCEM(D, K, num_clusters=N_CLUSTERS).cuda() for _ in range(2)]
        for each in fits:
            torch.manual_seed(0)
            each.after_epoch(features, labels)
        assert all(torch.equal(a, b) for a, b in zip(fits[0].buffers(), fits[1].buffers(), strict=True))
