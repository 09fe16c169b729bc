"""Operators in functional training loops and under torch.compile: the gradients of ordinary autograd, one graph."""

import pytest
import torch
from exactness import assert_same_bits
from problems import DEVICE, FEW, OPERATORS, Problem, every_backend, every_operator, few

from cem_kernels import ClassGroups, Nats
from cem_kernels.variance import class_variance


@every_operator
@every_backend
def test_func_grad_is_the_gradient_of_autograd(make, backend):
    problem = few(make)

    def loss(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        return problem.run(backend, **leaves)[0].square().sum()

    found = torch.func.grad(loss)(problem.leaves)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in problem.leaves.items()}
    want = torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True)
    for name, expected in zip(leaves, want, strict=True):
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@every_operator
def test_kernels_compile_into_one_graph_with_the_same_bits(make):
    problem = few(make)
    torch.compiler.reset()
    compiled = Problem(problem.leaves, torch.compile(problem.run, fullgraph=True, backend="aot_eager"))
    assert_same_bits(compiled.results("triton"), problem.results("triton"))


@pytest.mark.parametrize(
    ("make", "bound"), list(zip(OPERATORS.values(), (None, 6, 6, None, None), strict=True)), ids=OPERATORS
)
def test_eager_compiles_into_one_graph_without_reading_a_value(make, bound):
    torch.compiler.reset()
    problem = few(make, bound=bound)
    want = problem.run("eager", **problem.leaves)
    found = torch.compile(problem.run, fullgraph=True, backend="aot_eager")("eager", **problem.leaves)
    for each, expected in zip(found, want, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-6)


def test_groups_are_made_inside_a_compiled_graph():
    torch.compiler.reset()

    def loss(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return class_variance(features, ClassGroups.from_labels(labels, 4), Nats(0.1), backend="eager").rob_loss

    features = torch.randn(len(FEW), 16, device=DEVICE)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, FEW), loss(features, FEW), rtol=1e-5, atol=1e-6)
