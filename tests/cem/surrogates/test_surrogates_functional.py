"""Surrogates in functional training loops, and under torch.compile in evaluation."""

from collections.abc import Callable

import pytest
import torch

import cem

K, D = 5, 16
LABELS = torch.arange(40) % K


def mixture() -> cem.GaussianMixtureCEM:
    surrogate = cem.GaussianMixtureCEM(D, K, num_clusters=2)
    surrogate.refit(torch.randn(200, D), torch.arange(200) % K)
    return surrogate


MAKE: dict[str, Callable[[], cem.Surrogate]] = {
    "centroid": lambda: cem.CentroidCEM(D, K, 0.1),
    "centroid, eval()": lambda: cem.CentroidCEM(D, K, 0.1).eval(),
    "attention": lambda: cem.SlotCrossAttentionCEM(D, num_classes=K, reg_strength=0.1),
    "attention, eval()": lambda: cem.SlotCrossAttentionCEM(D, num_classes=K, reg_strength=0.1).eval(),
    "attention, a ramp": lambda: cem.SlotCrossAttentionCEM(D, num_classes=K, threshold=cem.Ramp(0.1, 0.01)).eval(),
    "attention, reference": lambda: cem.SlotCrossAttentionCEM(D, num_classes=K, reg_strength=0.1, backend="reference"),
    "mixture": mixture,
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
def test_func_grad_of_a_functional_call_is_the_gradient_of_autograd(make):
    torch.manual_seed(0)
    surrogate, features = make(), torch.randn(40, D)
    state = {name: value.clone() for name, value in surrogate.state_dict().items()}
    leaf = features.clone().requires_grad_()
    torch.manual_seed(1)
    surrogate(leaf, LABELS)[0].backward()

    def loss(z: torch.Tensor) -> torch.Tensor:
        copies = {name: value.clone() for name, value in state.items()}
        return torch.func.functional_call(surrogate, copies, (z, LABELS))[0]

    torch.manual_seed(1)
    torch.testing.assert_close(torch.func.grad(loss)(features), leaf.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["centroid, eval()", "attention, eval()", "attention, a ramp"])
def test_evaluation_compiles_into_one_graph(name):
    torch.compiler.reset()
    torch.manual_seed(0)
    surrogate, features = MAKE[name](), torch.randn(40, D)
    compiled = torch.compile(surrogate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, LABELS), surrogate(features, LABELS), rtol=1e-5, atol=1e-6)
