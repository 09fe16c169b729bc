"""Operators in functional training loops and under torch.compile: the gradients of ordinary autograd, one graph."""

import pytest
import torch
from exactness import DEVICE
from problems import OPERATORS, Problem, labels_with_holes

from cem_kernels import ClassGroups, Nats
from cem_kernels.variance import class_variance

LABELS = labels_with_holes(23, 7).to(DEVICE)
every_operator = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
every_backend = pytest.mark.parametrize("backend", ["reference", "eager", "triton"])


def in_single(problem: Problem) -> Problem:
    return Problem({name: leaf.float() for name, leaf in problem.leaves.items()}, problem.run)


@every_operator
@every_backend
def test_func_grad_is_the_gradient_of_autograd(make, backend):
    problem = in_single(make(LABELS, 7, T=2, D=16))

    def loss(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        return problem.run(backend, **leaves)[0].square().sum()

    found = torch.func.grad(loss)(problem.leaves)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in problem.leaves.items()}
    want = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
    for (name, expected), each in zip(leaves.items(), want, strict=True):
        expected = torch.zeros_like(expected) if each is None else each
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@every_operator
def test_backward_of_kernels_under_autocast_changes_nothing(make):
    """Not that of the products in front of them, which are PyTorch's own."""
    problem = in_single(make(LABELS, 7, T=2, D=32))
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in problem.leaves.items()}
    first = next(iter(leaves.values()))
    loss = problem.run("triton", **leaves)[0].square().sum()
    (plain,) = torch.autograd.grad(loss, first, retain_graph=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad(loss, first)
    assert torch.equal(plain, inside)


@every_operator
@pytest.mark.parametrize("bound", [None, 12], ids=["no bound", "a bound"])
def test_eager_compiles_into_one_graph_without_reading_a_value(make, bound):
    torch.compiler.reset()
    problem = in_single(make(LABELS, 7, T=2, D=16, bound=bound))
    want = problem.run("eager", **problem.leaves)
    found = torch.compile(problem.run, fullgraph=True, backend="aot_eager")("eager", **problem.leaves)
    for each, expected in zip(found, want, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-6)


def test_groups_are_made_inside_a_compiled_graph():
    torch.compiler.reset()

    def loss(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return class_variance(features, ClassGroups.from_labels(labels, 7), Nats(0.1), backend="eager").rob_loss

    features = torch.randn(23, 16, device=DEVICE)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, LABELS), loss(features, LABELS), rtol=1e-5, atol=1e-6)
