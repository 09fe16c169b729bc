"""What kernels promise beyond their numbers: strides, autocast, compilation, refusals, repeatable bits."""

from functools import partial

import pytest
import torch
from exactness import DEVICE, assert_as_exact
from problems import OPERATORS, Problem, assert_same, cross_problem, labels_with_holes, slot_problem, variance_problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cem_kernels import (
    BackendUnavailableError,
    ClassGroups,
    CrossAttentionWeights,
    LogHinge,
    Nats,
    SlotAttentionWeights,
    backends,
    triton_utils,
)
from cem_kernels.cross_attention import cross_attention
from cem_kernels.cross_attention import triton as cross_attention_kernels
from cem_kernels.cross_attention.reference import cross_attention as reference_cross_attention
from cem_kernels.slot_attention import slot_attention
from cem_kernels.slot_attention import triton as slot_attention_kernels
from cem_kernels.variance import class_variance
from cem_kernels.variance import triton as variance_kernels

LABELS = labels_with_holes(23, 7).to(DEVICE)
GROUPS = ClassGroups.from_labels(LABELS, 7)
every_kernel = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())


def problem_of(make) -> Problem:
    problem = make(LABELS, 7, T=3, D=32)
    return Problem({name: leaf.float() for name, leaf in problem.leaves.items()}, problem.run)


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(found[name], want), name


def layouts(x: Tensor) -> dict[str, Tensor]:
    """``x [B, T, D]`` with the same values in other strides."""
    return {
        "transposed": x.transpose(0, 2).contiguous().transpose(0, 2),
        "every second row": torch.stack([x, -x], dim=1).flatten(0, 1)[::2],
        "wider rows": torch.cat([x, -x], dim=2)[:, :, : x.shape[2]],
        "tokens first": x.transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("layout", ["transposed", "every second row", "wider rows", "tokens first"])
@pytest.mark.parametrize("name", OPERATORS)
def test_strides_do_not_matter(name, layout):
    problem = problem_of(OPERATORS[name])
    leaf = next(iter(problem.leaves))
    plain = problem.leaves[leaf]
    strided = layouts(plain)[layout]
    assert not strided.is_contiguous()
    others = {n: t for n, t in problem.leaves.items() if n != leaf}

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        output = problem.run("triton", **{leaf: x}, **others)[-1]
        # Every second number of a larger tensor, transposed: what a slice or a permutation sends back.
        upstream = torch.randn(*output.shape[::-1], 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        return output, torch.autograd.grad(output, x, upstream[..., 0].permute(*range(output.dim())[::-1]))[0]

    for found, want in zip(gradient(strided), gradient(plain), strict=True):
        assert torch.equal(found, want)


@every_kernel
def test_expanded_upstream_gradients_are_read_right(make):
    problem = problem_of(make)
    leaf = next(iter(problem.leaves))
    results = []
    for summed in (lambda t: t.sum(), lambda t: (t * torch.ones_like(t)).sum()):
        x = problem.leaves[leaf].clone().requires_grad_()
        others = {n: t for n, t in problem.leaves.items() if n != leaf}
        (summed(problem.run("triton", **{leaf: x}, **others)[-1])).backward()
        results.append(x.grad)
    assert torch.equal(*results)


def test_expanded_features_are_read_right():
    row = torch.randn(1, 40, device=DEVICE).expand(23, 40)
    result = class_variance(row, GROUPS, Nats(0.1), backend="triton")
    assert torch.equal(result.class_mse, torch.zeros(7, device=DEVICE))
    wide = torch.randn(23, 1, device=DEVICE)
    expanded = class_variance(wide.expand(23, 40), GROUPS, Nats(0.1), backend="triton")
    copied = class_variance(wide.expand(23, 40).contiguous(), GROUPS, Nats(0.1), backend="triton")
    assert torch.equal(expanded.class_penalty, copied.class_penalty)


@every_kernel
def test_autocast_changes_nothing(make):
    problem = problem_of(make)
    autocast = torch.autocast(DEVICE, dtype=torch.bfloat16)
    same_bits(problem.results("triton", forward_under=autocast), problem.results("triton"))


@every_kernel
def test_results_are_fp32_and_gradients_in_the_dtype_of_their_leaf(make):
    problem = make(LABELS, 7, T=3, D=32)
    for name, result in problem.results("triton", **{n: t.bfloat16() for n, t in problem.leaves.items()}).items():
        assert result.dtype == (torch.float32 if name.startswith("output") else torch.bfloat16), name


@pytest.mark.parametrize(
    ("make", "operator", "weights_of"),
    [
        (partial(slot_problem, J=3), slot_attention, SlotAttentionWeights),
        (cross_problem, partial(cross_attention, num_heads=2), CrossAttentionWeights),
    ],
    ids=["slot_attention", "cross_attention"],
)
@pytest.mark.parametrize("product_dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_leave_all_else_in_fp32(make, operator, weights_of, product_dtype):
    problem = problem_of(make)

    def run(backend, tokens, slots, **weights):
        return (operator(tokens, slots, GROUPS, weights_of(**weights), product_dtype=product_dtype, backend=backend),)

    exact = problem.results("reference")
    rounded = problem.results("triton", **{name: leaf.to(product_dtype) for name, leaf in problem.leaves.items()})
    for name, found in Problem(problem.leaves, run).results("triton").items():
        assert found.dtype == torch.float32
        error, of_all_rounded = (found - exact[name]).norm(), (rounded[name] - exact[name]).norm()
        assert 0 < error <= 2 * of_all_rounded + 1e-6 * exact[name].norm(), name


@every_kernel
def test_differentiating_twice_is_refused(make):
    problem = problem_of(make)
    leaves = {name: leaf.requires_grad_() for name, leaf in problem.leaves.items()}
    output = problem.run("triton", **leaves)[-1]
    first = next(iter(leaves.values()))
    (gradient,) = torch.autograd.grad(output.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice.*once_differentiable"):
        gradient.sum().backward()


@every_kernel
def test_compiles_into_one_graph_with_the_same_bits(make):
    problem = problem_of(make)
    torch.compiler.reset()
    compiled = Problem(problem.leaves, torch.compile(problem.run, fullgraph=True, backend="aot_eager"))
    same_bits(compiled.results("triton"), problem.results("triton"))


def operator_calls() -> list[tuple[object, tuple[object, ...]]]:
    x = torch.randn(23, 40, device=DEVICE)
    features, penalty = (x, GROUPS.order, GROUPS.offsets), (None, "relu", 0.1, 1e-4, 1e-6)
    around_means = (*features, None, None, None, *penalty, 2, 0.0)
    kept = variance_kernels.variance_forward(*around_means)[4:]
    running = torch.randn(7, 40, device=DEVICE), torch.rand(7, 40, device=DEVICE), torch.arange(7, device=DEVICE)
    around_centroids = (*features, *running, *penalty, 1, 0.99)
    tokens, queries = torch.randn(23, 2, 32, device=DEVICE), torch.randn(7, 16, 32, device=DEVICE)
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    read = (tokens, GROUPS.order, GROUPS.offsets, queries, queries[:, :, 0].contiguous(), queries.clone(),
            torch.tensor(0.1, device=DEVICE), seed)  # fmt: skip
    y, statistics = cross_attention_kernels.gated_read_forward(*read, 4, 0.5)
    matrices = [0.2 * torch.randn(size, 32, device=DEVICE) for size in (32, 96, 96, 48)]
    slots = (tokens, GROUPS.order, GROUPS.offsets)
    weights = (*matrices, 0.2 * torch.randn(32, 48, device=DEVICE), torch.randn(15 * 32 + 48, device=DEVICE))
    initial = torch.randn(7, 4, 32, device=DEVICE)
    rows = slot_attention_kernels.slot_attention_forward(*slots, initial, *weights, 2, 1e-8)
    w, ones = torch.randn(128, 32, device=DEVICE), torch.ones(23, device=DEVICE)
    network = (
        torch.tensor(0.1, device=DEVICE),
        w,
        w[:, 0].clone(),
        w.t().clone(),
        w[0].clone(),
        w[1].clone(),
        w[2].clone(),
    )
    return [
        (cross_attention_kernels.feed_forward_forward, (tokens, ones, *network, torch.float32)),
        (
            cross_attention_kernels.feed_forward_backward,
            (tokens, tokens.clone(), ones, *network, torch.float32, False),
        ),
        (slot_attention_kernels.slot_attention_forward, (*slots, initial, *weights, 2, 1e-8)),
        (slot_attention_kernels.slot_attention_backward, (*slots, *weights, *rows, initial, 1e-8)),
        (variance_kernels.variance_forward, around_means),
        (variance_kernels.variance_backward, (*features, *kept, torch.ones((), device=DEVICE), None, None, None, 2)),
        (variance_kernels.variance_forward, around_centroids),
        (cross_attention_kernels.gated_read_forward, (*read, 4, 0.5)),
        (cross_attention_kernels.gated_read_backward, (*read, statistics, y, 4, 0.5)),
    ]


@pytest.mark.parametrize("index", range(9))
def test_operators_are_registered_right(index):
    operator, args = operator_calls()[index]
    torch.library.opcheck(operator, args)


def read_with_dropout(tokens: Tensor, dropout: float) -> Tensor:
    """The read, without feed-forward and input: zero where an element was dropped."""
    problem = cross_problem(LABELS, 7, T=tokens.shape[1], D=32, S=4, H=2)
    weights = {n: t.float() for n, t in problem.leaves.items() if n not in ("tokens", "slots")}
    weights["alpha_ffn"] = torch.zeros((), device=DEVICE)
    slots = problem.leaves["slots"].float()
    weights = CrossAttentionWeights(**weights)
    out = cross_attention(tokens, slots, GROUPS, weights, num_heads=2, dropout=dropout, backend="triton")
    return out - tokens


def test_dropout_drops_its_share_scales_the_rest_and_is_replayed_in_the_backward():
    tokens = torch.randn(23, 50, 32, device=DEVICE)
    torch.manual_seed(3)
    dropped = read_with_dropout(tokens, 0.25)
    plain = read_with_dropout(tokens, 0.0)
    gone = dropped == 0
    assert 0.23 < float(gone.float().mean()) < 0.27
    torch.testing.assert_close(dropped[~gone], plain[~gone] / 0.75, rtol=1e-3, atol=1e-5)
    torch.manual_seed(3)
    assert torch.equal(read_with_dropout(tokens, 0.25), dropped)

    # What was dropped sends no gradient back: with dropped elements alone as upstream, the slots see nothing.
    torch.manual_seed(3)
    tokens.requires_grad_()
    (gradient,) = torch.autograd.grad(read_with_dropout(tokens, 0.25), tokens, gone.float())
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_gradients_through_dropout_are_those_of_the_reference_with_the_same_mask():
    problem = cross_problem(LABELS, 7, T=2, D=16, S=4, H=2)
    leaves = {n: t.float() for n, t in problem.leaves.items() if n != "alpha_ffn"}

    def run(backend, tokens, slots, **weights):
        shut = torch.zeros((), dtype=tokens.dtype, device=DEVICE)
        weights = CrossAttentionWeights(**weights, alpha_ffn=shut)
        if backend == "triton":
            torch.manual_seed(5)
            return (cross_attention(tokens, slots, GROUPS, weights, num_heads=2, dropout=0.5, backend="triton"),)
        plain = reference_cross_attention(tokens, slots, GROUPS, weights, 2, 0.0)
        return (tokens + keep * (plain - tokens),)

    (out,) = run("triton", **leaves)
    keep = torch.where(out == leaves["tokens"], 0.0, 2.0)
    assert_as_exact(Problem(leaves, run))


REFUSED = {
    "D=8": (lambda: cross_problem(LABELS, 7, D=8), "kernels take D from 16 to 512, got 8"),
    "D=520": (lambda: cross_problem(LABELS, 7, D=520), "kernels take D from 16 to 512, got 520"),
    "S=33": (lambda: cross_problem(LABELS, 7, D=16, S=33), "kernels take S from 1 to 32, got 33"),
    "H=17": (lambda: cross_problem(LABELS, 7, D=34, H=17), "kernels take H from 1 to 16, got 17"),
    "fp64": (lambda: variance_problem(LABELS, 7), "kernels take fp32, bf16 and fp16, got torch.float64"),
    "slots, D=8": (lambda: slot_problem(LABELS, 7, D=8), "kernels take D from 16 to 512, got 8"),
    "slots, S=33": (lambda: slot_problem(LABELS, 7, D=16, S=33), "kernels take S from 1 to 32, got 33"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_kernels_do_not_support_is_refused_by_name(make, message):
    problem = make()
    dtype = torch.float64 if "fp64" in message or "float64" in message else torch.float32
    with pytest.raises(BackendUnavailableError, match=message):
        problem.run("triton", **{name: leaf.to(dtype) for name, leaf in problem.leaves.items()})


def test_threshold_that_takes_a_gradient_is_refused_by_name():
    threshold = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(BackendUnavailableError, match="the threshold takes a gradient"):
        class_variance(torch.randn(23, 4, device=DEVICE), GROUPS, LogHinge(threshold), backend="triton")


def test_cpu_tensors_are_refused_by_name_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "INTERPRETING", False)
    groups = ClassGroups.from_labels(torch.tensor([0, 0]), 1)
    with pytest.raises(BackendUnavailableError, match="kernels run on CUDA devices, got a tensor on cpu"):
        class_variance(torch.randn(2, 4), groups, Nats(0.1), backend="triton")


@pytest.mark.parametrize(
    ("dtype", "objection", "taken"),
    [(torch.float32, None, "triton"), (torch.float32, "too wide", "eager"), (torch.float64, None, "eager")],
)
def test_auto_takes_kernels_on_cuda_where_they_support_the_call(dtype, objection, taken):
    with FakeTensorMode():
        tokens = torch.empty(2, 16, dtype=dtype, device="cuda")
        assert backends.pick("auto", "x", tokens, objection) == taken


@pytest.mark.parametrize(("allowed", "precision"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_fp32_products_follow_pytorchs_precision(allowed, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        assert triton_utils.input_precision(torch.float32) == precision
        assert triton_utils.input_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


OTHER_SIZES = {
    "variance_forward": {"BLOCK_R": 4, "BLOCK_C": 32},
    "variance_backward": {"BLOCK_R": 8, "num_warps": 2},
    "slot_attention_forward": {"BLOCK_D": 16, "BLOCK_K": 32},
    "slot_attention_backward": {"BLOCK_N": 32, "BLOCK_K": 16},
    "gated_read_forward": {"BLOCK_N": 16, "BLOCK_D": 16},
    "gated_read_backward": {"BLOCK_N": 16, "BLOCK_K": 16},
}


@every_kernel
def test_other_sizes_on_request_change_nothing_but_the_last_bits(make, monkeypatch):
    monkeypatch.setattr(triton_utils, "_tuned", {})
    problem = problem_of(make)
    default = problem.results("triton")
    for operator, sizes in OTHER_SIZES.items():
        triton_utils.tune(operator, **sizes)
    assert_same(problem.results("triton"), default, tolerance=1e-5)


def test_tuning_a_size_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(triton_utils, "_tuned", {})
    triton_utils.tune("variance_forward", BLOCK_X=1)
    with pytest.raises(ValueError, match="BLOCK_X"):
        class_variance(torch.randn(23, 4, device=DEVICE), GROUPS, Nats(0.1), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_two_to_the_31_are_read_right():
    rows = torch.randn(2**31 + 64, dtype=torch.bfloat16, device="cuda").as_strided((2, 1, 32), (2**31, 32, 1))
    groups = ClassGroups.from_labels(torch.zeros(2, dtype=torch.long, device="cuda"), 1)
    far = class_variance(rows, groups, Nats(0.1), backend="triton")
    near = class_variance(rows.clone(), groups, Nats(0.1), backend="triton")
    assert torch.equal(far.class_penalty, near.class_penalty)
    problem = cross_problem(groups.order * 0, 1, D=32, S=4, H=2)
    leaves = {n: t.float() for n, t in problem.leaves.items()}
    (far,) = problem.run("triton", **(leaves | {"tokens": rows}))
    (near,) = problem.run("triton", **(leaves | {"tokens": rows.clone()}))
    assert torch.equal(far, near)
