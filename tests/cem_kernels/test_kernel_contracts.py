"""What kernels promise beyond their numbers: strides, autocast, refusals, other tile sizes, registered operators."""

from collections.abc import Callable

import pytest
import torch
from exactness import Calls, assert_as_exact, assert_same_bits
from problems import (
    DEVICE,
    FEW,
    Problem,
    assert_same,
    cross_problem,
    every_operator,
    few,
    slot_problem,
)
from torch import Tensor

from cem_kernels import (
    ClassGroups,
    CrossAttentionWeights,
    Nats,
    triton_utils,
)
from cem_kernels.cross_attention import cross_attention
from cem_kernels.cross_attention.reference import cross_attention as reference_cross_attention
from cem_kernels.variance import class_variance

GROUPS = ClassGroups.from_labels(FEW, 4)
B = len(FEW)


def layouts(x: Tensor) -> list[Tensor]:
    """``x [B, T, D]`` with the same values in other strides."""
    return [
        x.transpose(0, 2).contiguous().transpose(0, 2),
        torch.stack([x, -x], dim=1).flatten(0, 1)[::2],  # every second row
        torch.cat([x, -x], dim=2)[:, :, : x.shape[2]],  # of wider rows
        x.transpose(0, 1).contiguous().transpose(0, 1),  # tokens first
    ]


@every_operator
def test_strides_do_not_matter(make):
    problem = few(make)
    leaf = next(iter(problem.leaves))

    def gradient(x: Tensor, relayout: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        output = problem.run("triton", **(problem.leaves | {leaf: x}))[-1]
        upstream = torch.randn(*output.shape[::-1], 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)[..., 0]
        return output, torch.autograd.grad(output, x, relayout(upstream.permute(*range(output.dim())[::-1])))[0]

    want = gradient(problem.leaves[leaf], Tensor.contiguous)
    for x in layouts(problem.leaves[leaf]):
        assert not x.is_contiguous()
        # Every second number of a larger tensor, transposed: what a slice or a permutation sends back.
        for found, expected in zip(gradient(x, lambda upstream: upstream), want, strict=True):
            assert torch.equal(found, expected)


@every_operator
def test_expanded_upstream_gradients_are_read_right_and_results_are_fp32(make):
    problem = few(make).to(torch.bfloat16)
    leaf, gradients = next(iter(problem.leaves)), []
    for summed in (lambda t: t.sum(), lambda t: (t * torch.ones_like(t)).sum()):
        x = problem.leaves[leaf].clone().requires_grad_()
        outputs = problem.run("triton", **(problem.leaves | {leaf: x}))
        assert {output.dtype for output in outputs} == {torch.float32}
        summed(outputs[-1]).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@every_operator
def test_autocast_changes_nothing(make):
    """Neither around the forward, nor around the backward of what kernels compute themselves."""
    problem, autocast = few(make), torch.autocast(DEVICE, dtype=torch.bfloat16)
    assert_same_bits(problem.results("triton", forward_under=autocast), problem.results("triton"))
    x = next(iter(problem.leaves.values())).requires_grad_()
    loss = problem.run("triton", **problem.leaves)[0].square().sum()
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    with autocast:
        (inside,) = torch.autograd.grad(loss, x)
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("make", [slot_problem, cross_problem], ids=["slot_attention", "cross_attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_products_in_half_precision_leave_all_else_in_fp32(make, dtype):
    problem, mixed = (few(make, D=32, **options) for options in ({}, {"product_dtype": dtype}))
    exact = problem.results("reference")
    rounded = problem.to(dtype).results("triton")
    for name, found in mixed.results("triton").items():
        assert found.dtype == torch.float32
        error, of_all_rounded = (found - exact[name]).norm(), (rounded[name] - exact[name]).norm()
        luck = torch.finfo(dtype).eps if found.numel() == 1 else 1e-6  # one number may be rounded to the exact one
        assert 0 < error <= 2 * of_all_rounded + luck * exact[name].norm(), name


@every_operator
def test_differentiating_twice_is_refused(make):
    problem = few(make)
    first, *_ = (leaf.requires_grad_() for leaf in problem.leaves.values())
    output = problem.run("triton", **problem.leaves)[-1]
    (gradient,) = torch.autograd.grad(output.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice.*once_differentiable"):
        gradient.sum().backward()


@every_operator
def test_operators_are_registered_right(make):
    with Calls() as calls:
        few(make).results("triton")
    assert len(calls.found) == (4 if make is cross_problem else 2)
    for operator, (args, _) in calls.found.items():
        torch.library.opcheck(operator, args)


# dropout


def test_dropout_drops_its_share_and_scales_the_rest():
    problem = few(cross_problem, T=60, D=32)
    shut, tokens = {"alpha_ffn": torch.zeros((), device=DEVICE)}, problem.leaves["tokens"]

    def read(dropout: float) -> Tensor:
        """Without feed-forward and input: zero where an element was dropped."""
        torch.manual_seed(3)
        dropping = few(cross_problem, T=60, D=32, dropout=dropout)
        return dropping.run("triton", **(problem.leaves | shut))[0] - tokens

    dropped, plain = read(0.25), read(0.0)
    gone = dropped == 0
    assert 0.23 < float(gone.float().mean()) < 0.27
    torch.testing.assert_close(dropped[~gone], plain[~gone] / 0.75, rtol=1e-3, atol=1e-5)
    assert torch.equal(read(0.25), dropped)


def test_gradients_through_dropout_are_those_of_the_reference_with_the_same_mask():
    leaves = few(cross_problem, D=16).leaves
    shut = leaves.pop("alpha_ffn") * 0

    def run(backend, tokens, slots, **weights):
        weights = CrossAttentionWeights(**weights, alpha_ffn=shut.to(tokens.dtype))
        if backend == "triton":
            torch.manual_seed(5)
            return (cross_attention(tokens, slots, GROUPS, weights, num_heads=2, dropout=0.5, backend="triton"),)
        plain = reference_cross_attention(tokens, slots, GROUPS, weights, 2, 0.0)
        return (tokens + keep * (plain - tokens),)

    (out,) = run("triton", **leaves)
    keep = torch.where(out == leaves["tokens"], 0.0, 2.0)
    assert_as_exact(Problem(leaves, run))


# tile sizes


OTHER_SIZES = {
    "variance_forward": {"BLOCK_R": 4, "BLOCK_C": 32},
    "variance_backward": {"BLOCK_R": 8, "num_warps": 2},
    "slot_variance_forward": {"BLOCK_R": 4, "BLOCK_C": 16},
    "slot_variance_backward": {"BLOCK_R": 8, "num_warps": 2},
    "slot_attention_forward": {"BLOCK_D": 16, "BLOCK_K": 32},
    "slot_attention_backward": {"BLOCK_N": 32, "BLOCK_K": 16},
    "gated_read_forward": {"BLOCK_N": 16, "BLOCK_D": 16},
    "gated_read_backward": {"BLOCK_N": 16, "BLOCK_K": 16},
}


@every_operator
def test_other_sizes_on_request_change_nothing_but_the_last_bits(make, monkeypatch):
    monkeypatch.setattr(triton_utils, "_tuned", {})
    problem = few(make, D=40)
    default = problem.results("triton")
    for operator, sizes in OTHER_SIZES.items():
        triton_utils.tune(operator, **sizes)
    assert_same(problem.results("triton"), default, tolerance=1e-5)


def test_tuning_a_size_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(triton_utils, "_tuned", {})
    triton_utils.tune("variance_forward", BLOCK_X=1)
    with pytest.raises(ValueError, match="BLOCK_X"):
        class_variance(torch.randn(B, 4, device=DEVICE), GROUPS, Nats(0.1), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m gpu")
def test_offsets_beyond_two_to_the_31_are_read_right():
    rows = torch.randn(2**31 + 64, dtype=torch.bfloat16, device="cuda").as_strided((2, 1, 32), (2**31, 32, 1))
    groups = ClassGroups.from_labels(torch.zeros(2, dtype=torch.long, device="cuda"), 1)
    far, near = (class_variance(x, groups, Nats(0.1), backend="triton") for x in (rows, rows.clone()))
    assert torch.equal(far.class_penalty, near.class_penalty)
    problem = cross_problem(groups.order * 0, 1, D=32, S=4).to(torch.float32)
    (far,), (near,) = (problem.run("triton", **(problem.leaves | {"tokens": x})) for x in (rows, rows.clone()))
    assert torch.equal(far, near)
