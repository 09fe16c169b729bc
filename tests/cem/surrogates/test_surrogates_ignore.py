"""Samples labeled −100 do not count in any surrogate and backend, whatever they hold and whether labels are read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cem

K, D = 4, 16
LABELS = torch.arange(24) % K
AWAY = torch.tensor([0, 5, 23])
HOLES = LABELS.clone().index_fill_(0, AWAY, -100)
KEPT = HOLES >= 0


def mixture(**options: object) -> cem.GaussianMixtureCEM:
    surrogate = cem.GaussianMixtureCEM(D, K, num_clusters=2)
    generator = torch.Generator().manual_seed(0)
    surrogate.refit(torch.randn(200, D, generator=generator), torch.arange(200) % K)
    return surrogate


MAKE: dict[str, Callable[..., cem.Surrogate]] = {
    "centroid": lambda **o: cem.CentroidCEM(D, K, 0.1, **o),
    "centroid, eval()": lambda **o: cem.CentroidCEM(D, K, 0.1, **o).eval(),
    "attention": lambda **o: cem.SlotCrossAttentionCEM(D, 4, 2, 2, num_classes=K, reg_strength=0.1, **o).eval(),
    "attention, classes unknown": lambda **o: cem.SlotCrossAttentionCEM(D, 4, 2, 2, reg_strength=0.1, **o).eval(),
    "mixture": mixture,
}
every_surrogate = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def measured(surrogate: cem.Surrogate, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    features = features.clone().requires_grad_()
    loss, intra_mse = surrogate(features, labels)
    loss.backward()
    return loss.detach(), intra_mse.detach(), features.grad


@every_surrogate
@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_ignored_samples_change_nothing_and_get_zeros_back(make, backend):
    features = torch.randn(24, D, generator=torch.Generator().manual_seed(1))
    bad = features.index_fill(0, AWAY[:2], float("inf")).index_fill(0, AWAY[2:], float("nan"))
    torch.manual_seed(0)
    surrogate = make(backend=backend)
    state = {name: value.clone() for name, value in surrogate.state_dict().items()}
    *want, gradient = measured(surrogate, features[KEPT], LABELS[KEPT])
    moved = {name: value.clone() for name, value in surrogate.state_dict().items()}
    surrogate.load_state_dict(state)
    *found, with_holes = measured(surrogate, bad, HOLES)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(with_holes[KEPT], gradient, rtol=1e-4, atol=1e-7)
    assert with_holes[AWAY].eq(0).all()
    torch.testing.assert_close(dict(surrogate.state_dict()), moved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in MAKE if "unknown" not in name])  # which reads classes off labels
def test_labels_out_of_range_are_ignored_where_values_are_not_read(name, monkeypatch):
    make = MAKE[name]
    features = torch.randn(24, D)
    torch.manual_seed(0)
    *_, want = measured(make(), features, HOLES)
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    torch.manual_seed(0)
    *_, found = measured(make(), features, HOLES.masked_fill(HOLES < 0, K + 3))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)


@every_surrogate
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_any_integer_dtype_are_the_same(make, dtype):
    features = torch.randn(24, D)
    results = []
    for labels in (LABELS, LABELS.to(dtype)):
        torch.manual_seed(0)
        results.append(measured(make(), features, labels)[2])
    assert torch.equal(*results)


def test_mixture_is_refitted_without_the_ignored_samples():
    features, generator = torch.randn(40, D), torch.arange(40) % K
    with_holes, plain = cem.GaussianMixtureCEM(D, K, num_clusters=2), cem.GaussianMixtureCEM(D, K, num_clusters=2)
    for surrogate, rows, labels in (
        (with_holes, features.index_fill(0, AWAY, float("nan")), generator.index_fill(0, AWAY, -100)),
        (plain, features[[i for i in range(40) if i not in AWAY]], generator[[i for i in range(40) if i not in AWAY]]),
    ):
        torch.manual_seed(0)
        surrogate.refit(rows, labels)
    torch.testing.assert_close(dict(with_holes.state_dict()), dict(plain.state_dict()))
