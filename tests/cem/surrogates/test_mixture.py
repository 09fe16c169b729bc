"""The Gaussian-mixture surrogate in a step: values, gradients, and what the original got wrong."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from small_surrogates import build, seen

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


def loop(surrogate, features, labels):
    """The definition: one class, one cluster, one sample at a time."""
    penalties, distances = [], []
    log_threshold = math.log(surrogate.var_threshold * surrogate.reg_strength**2 + surrogate.gamma)
    for c in set(labels.tolist()):
        if surrogate.class_counts[c] == 0:
            continue
        mine, clusters = features[labels == c], {}
        for z in mine:
            distance = (z - surrogate.centroids[c]).square().mean(1)
            nearest = min((j for j in range(len(distance)) if surrogate.weights[c, j] > 0), key=distance.__getitem__)
            clusters.setdefault(nearest, []).append(distance[nearest])
        penalty = 0.0
        for j, squared in clusters.items():
            weight, stored = surrogate.weights[c, j], surrogate.variances[c, j]
            a = min(10 * len(squared) / (weight.item() * surrogate.class_counts[c].item()), 0.99)
            v = a * sum(squared) / len(squared) + (1 - a) * stored
            penalty = penalty + weight * torch.relu(torch.log(v + surrogate.gamma) - log_threshold)
        penalties.append(penalty)
        distances.append(sum(sum(squared) for squared in clusters.values()) / len(mine))
    return sum(penalties) / len(penalties), sum(distances) / len(distances)


def gradient(result, features):
    return torch.autograd.grad(result, features, retain_graph=True)[0]


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
    surrogate.class_counts[(labels[0] + 1) % K] = 0
    surrogate.weights[:, 1:2] = 0  # as of a cluster that got no training sample
    features.requires_grad_()
    expected, actual = loop(surrogate, features, labels), surrogate(features, labels)
    for want, have in zip(expected, actual, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient(have, features), gradient(want, features), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_empty_clusters_are_no_anomaly():
    surrogate = fitted()
    surrogate.weights[:, 0] = 0.0
    with torch.autograd.detect_anomaly():  # raises where a backward function returns NaN, even if masked later
        assert seen(surrogate, *training_set(seed=1)).gradient.any()


def test_classes_that_no_fit_has_seen_give_attached_zeros():
    surrogate = fitted()
    surrogate.class_counts[2] = 0
    for unfitted, labels in ((surrogate, [2, 2, 2]), (GaussianMixtureCEM(D, K), [0, 1, 1])):
        found = seen(unfitted, torch.randn(3, D), torch.tensor(labels))
        assert (found.rob_loss.item(), found.intra_mse.item()) == (0, 0)
        assert not found.gradient.any()


def test_unfitted_classes_do_not_touch_the_others_even_when_not_finite():
    surrogate, (features, labels) = fitted(), training_set(seed=1, num_samples=20)
    want = seen(surrogate, features[labels != 2], labels[labels != 2])
    surrogate.class_counts[2] = 0
    found = seen(surrogate, features.masked_fill((labels == 2)[:, None], math.nan), labels)
    torch.testing.assert_close(found[:2], want[:2], rtol=1e-12, atol=0)
    assert not found.gradient[labels == 2].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 0}, "feature_dim.*got 0"),
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


@pytest.mark.parametrize(
    ("options", "run", "name", "value"),
    [
        ({}, {"noise_std": 0.3}, "reg_strength", 0.3),
        ({}, {"num_classes": 7}, "num_classes", 7),
        ({"var_threshold": 0.5}, {}, "var_threshold", 0.5),
        ({"gamma": 0.1}, {}, "gamma", 0.1),
        ({"fit": "full"}, {}, "fit", "full"),
        ({}, {}, "num_clusters", 15),
        ({}, {"bounded": True}, "num_clusters", 5),
        ({"clusters": 7}, {"bounded": True}, "num_clusters", 7),
    ],
)
def test_build_takes_options_and_the_run(options, run, name, value):
    assert getattr(build("mixture", options, **run), name) == value


def test_build_refuses_the_backend_that_it_does_not_have():
    with pytest.raises(BackendError, match="the surrogate mixture has no 'triton' backend"):
        build("mixture", backend="triton")


@pytest.mark.parametrize(("option", "value"), [("clusters", 0), ("var_threshold", -1.0), ("gamma", 0.0), ("fit", "em")])
def test_an_option_out_of_range_is_refused_by_name(option, value):
    with pytest.raises(UsageError, match=f"--mixture.{option.replace('_', '-')} .* got '?{value}"):
        build("mixture", {option: value})


def test_a_training_without_a_fit_is_told_once_that_nothing_is_measured():
    surrogate, (features, labels) = GaussianMixtureCEM(D, K), training_set()
    with pytest.warns(UserWarning, match=r"has no mixture yet, so its penalty is 0: after_epoch\(") as told:
        rob_losses = [surrogate(features, labels)[0] for _ in range(2)]
    assert rob_losses == [0, 0]
    assert [Path(each.filename) for each in told] == [Path(__file__)]
    surrogate = GaussianMixtureCEM(D, K)
    surrogate.after_epoch(features, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surrogate(features, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m gpu")
def test_on_a_gpu_all_is_as_on_the_cpu_and_repeats_bit_for_bit():
    features, labels = training_set(seed=1, num_samples=40)
    runs = []
    for device in ("cpu", "cuda", "cuda"):
        torch.manual_seed(0)
        surrogate = GaussianMixtureCEM(D, K, num_clusters=N_CLUSTERS).double().to(device)
        surrogate.after_epoch(*(tensor.to(device) for tensor in training_set()))
        runs.append([*surrogate.buffers(), *seen(surrogate, features.to(device), labels.to(device))[:3]])
    cpu, first, second = runs
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    torch.testing.assert_close([tensor.cpu() for tensor in first], cpu, rtol=1e-10, atol=1e-10)
