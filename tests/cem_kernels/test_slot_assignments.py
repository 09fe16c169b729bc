"""The attention that says which slots a token belongs to, and the labels that say which slots it may."""

import math

import pytest
import torch
from exactness import every_labeling
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, random_slot_weights
from slot_variance_problems import GROUPS, LABELS, OPTIONS
from torch._subclasses.fake_tensor import FakeTensorMode

from cem_kernels import ClassGroups, SlotAttentionWeights, slot_assignments, slot_attention, slot_variance

# -------------------------------------------------------------------------------------------------- slot_assignments


def assignment_problem(labels, num_classes, *, T=2, D=6, S=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    groups = ClassGroups.from_labels(labels, num_classes)
    leaves = {
        "tokens": torch.randn(len(labels), T, D, generator=generator, dtype=torch.float64).to(dtype),
        "slots": torch.randn(num_classes, S, D, generator=generator, dtype=torch.float64).to(dtype),
        **random_slot_weights(D, generator, dtype)._asdict(),
    }
    leaves = {name: leaf.to(labels.device) for name, leaf in leaves.items()}

    def run(_, tokens, slots, **weights):
        return (slot_assignments(tokens, slots, groups, SlotAttentionWeights(**weights)),)

    return Problem(leaves, run)


def assigned(problem, **replaced):
    return problem.run(None, **(problem.leaves | replaced))[0]


def unabsorbed(labels, tokens, slots, weights):
    """Softmax over the slots of a token's class of ``k·q / D^1/4``, one token at a time."""

    def normalized(row, scale, shift):
        centered = row - row.mean()
        return centered / torch.sqrt(centered.square().mean() + 1e-5) * scale + shift

    B, T, D = tokens.shape
    w = weights
    result = tokens.new_zeros(B, T, slots.shape[1])
    for n in range(B):
        queries = [
            w.to_q @ normalized(slot, w.norm_slots_weight, w.norm_slots_bias) * D**-0.5 for slot in slots[labels[n]]
        ]
        for t in range(T):
            key = w.to_k @ normalized(tokens[n, t], w.norm_inputs_weight, w.norm_inputs_bias)
            weight = torch.stack([key @ query / D**0.25 for query in queries]).exp()
            result[n, t] = weight / weight.sum()
    return result


@every_labeling
@pytest.mark.parametrize("sizes", [{}, {"T": 1, "D": 5, "S": 1}, {"T": 3, "D": 1, "S": 4}])
def test_assignments_are_the_attention_of_unabsorbed_projections(labels, num_classes, sizes):
    problem = assignment_problem(labels, num_classes, **sizes)
    leaves = dict(problem.leaves)
    tokens, slots = leaves.pop("tokens"), leaves.pop("slots")
    want = unabsorbed(labels, tokens, slots, SlotAttentionWeights(**leaves))
    torch.testing.assert_close(assigned(problem), want, rtol=1e-10, atol=1e-12)


@given(
    labels=st.lists(st.integers(0, 4), max_size=12),
    sizes=st.fixed_dictionaries({"T": st.integers(1, 3), "D": st.integers(1, 9), "S": st.integers(1, 5)}),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_assignments_of_a_token_sum_to_one(labels, sizes, seed):
    found = assigned(assignment_problem(torch.tensor(labels, dtype=torch.long), 5, seed=seed, **sizes))
    assert found.shape == (len(labels), sizes["T"], sizes["S"])
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(dim=2), torch.ones_like(found[..., 0]), rtol=0, atol=1e-12)


def test_assignments_are_the_attention_that_slot_attention_averages_with():
    """One iteration with the GRU made to hand on its input's sign: the mean of a slot is that of its assignments."""
    labels, D = torch.zeros(9, dtype=torch.long), 6
    problem = assignment_problem(labels, 1, D=D)
    zero = {name: torch.zeros_like(leaf) for name, leaf in problem.leaves.items() if name.startswith(("gru", "mlp"))}
    # The reset gate does not matter, the update gate is shut, and the new state is tanh of a small update.
    zero["gru_weight_ih"][2 * D :] = 1e-4 * torch.eye(D, dtype=torch.float64)
    zero["gru_bias_ih"][D : 2 * D] = -100
    leaves = problem.leaves | zero
    p = assigned(problem, **zero).flatten(0, 1)
    tokens, slots = leaves.pop("tokens"), leaves.pop("slots")
    w = SlotAttentionWeights(**leaves)
    values = torch.nn.functional.layer_norm(tokens, (D,), w.norm_inputs_weight, w.norm_inputs_bias) @ w.to_v.T
    groups = ClassGroups.from_labels(labels, 1)
    found = slot_attention(tokens, slots, groups, w, num_iterations=1, eps=1e-30, backend="reference")
    want = (p / p.sum(dim=0)).T @ values.flatten(0, 1)
    torch.testing.assert_close(found[0] / 1e-4, want, rtol=1e-5, atol=1e-6)


def test_a_sample_looks_at_the_slots_of_its_own_class_only():
    problem = assignment_problem(LABELS, 5)
    want, slots = assigned(problem), problem.leaves["slots"].clone()
    slots[[0, 1, 2, 4]] = math.nan
    found = assigned(problem, slots=slots)
    assert torch.equal(found[LABELS == 3], want[LABELS == 3])
    assert found[LABELS == 1].isnan().all()


def test_slots_of_other_classes_get_no_gradient():
    problem = assignment_problem(LABELS, 5)
    slots = problem.leaves["slots"].requires_grad_()
    (gradient,) = torch.autograd.grad(assigned(problem, slots=slots)[LABELS == 3].square().sum(), slots)
    assert gradient[3].abs().max() > 0
    assert torch.equal(gradient[[0, 1, 2, 4]], torch.zeros_like(gradient[[0, 1, 2, 4]]))


def test_a_token_that_is_not_finite_leaves_the_assignments_of_others_alone():
    problem = assignment_problem(LABELS, 5)
    want, tokens = assigned(problem), problem.leaves["tokens"].clone()
    tokens[4, 1] = math.nan
    found = assigned(problem, tokens=tokens)
    others = torch.ones(13, 2, dtype=torch.bool)
    others[4, 1] = False
    assert torch.equal(found[others], want[others])


def test_permuting_the_samples_permutes_their_assignments():
    shuffle = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    plain, shuffled = assignment_problem(LABELS, 5), assignment_problem(LABELS[shuffle], 5)
    found = assigned(shuffled, tokens=plain.leaves["tokens"][shuffle])
    torch.testing.assert_close(found, assigned(plain)[shuffle], rtol=1e-12, atol=1e-12)


def test_permuting_the_slots_permutes_assignments_to_them():
    problem = assignment_problem(LABELS, 5)
    found = assigned(problem, slots=problem.leaves["slots"][:, [2, 0, 1]])
    torch.testing.assert_close(found, assigned(problem)[..., [2, 0, 1]], rtol=1e-12, atol=1e-12)


def test_gradcheck_of_assignments():
    problem = assignment_problem(torch.tensor([0, 2, 2, 0]), 4, D=4)
    # One of the keys' or the queries' weights alone would not show which of them is passed on.
    names = [name for name in problem.leaves if not name.startswith(("gru", "mlp", "norm_mlp", "to_v"))]
    leaves = [problem.leaves[name].requires_grad_() for name in names]
    assert len(names) == 8

    def call(*leaves):
        return assigned(problem, **dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_assignments_of_narrow_tokens_are_computed_in_fp32(dtype):
    problem = assignment_problem(LABELS, 5, dtype=dtype)
    want = assigned(problem, **{name: leaf.double() for name, leaf in problem.leaves.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = assigned(problem)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5)


def test_narrow_tokens_take_the_slots_that_slot_attention_has_returned():
    problem = assignment_problem(LABELS, 5, dtype=torch.bfloat16)
    leaves = dict(problem.leaves)
    tokens, slots = leaves.pop("tokens"), leaves.pop("slots")
    weights, groups = SlotAttentionWeights(**leaves), ClassGroups.from_labels(LABELS, 5)
    final = slot_attention(tokens, slots, groups, weights)
    assert final.dtype == torch.float32
    p = slot_assignments(tokens, final, groups, weights)
    torch.testing.assert_close(p.sum(dim=2), torch.ones(13, 2))
    assert slot_variance(tokens, p, groups, **OPTIONS).rob_loss.isfinite()


def test_assignments_stay_finite_for_extreme_tokens():
    problem = assignment_problem(LABELS, 5, dtype=torch.float32)
    assert assigned(problem, tokens=problem.leaves["tokens"] * 1e18).isfinite().all()


def test_assignments_need_no_host_sync(monkeypatch):
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    with FakeTensorMode():
        problem = assignment_problem(torch.zeros(23, dtype=torch.long), 7)
        assert problem.results(None)["output 0"].shape == (23, 2, 3)


def test_assignments_compile_whole():
    torch.compiler.reset()
    problem = assignment_problem(LABELS, 5)
    compiled = torch.compile(problem.run, fullgraph=True, backend="eager")
    (found,) = compiled(None, **problem.leaves)
    torch.testing.assert_close(found, assigned(problem), rtol=1e-12, atol=1e-12)


TOKENS, SLOTS = torch.randn(4, 2, 8), torch.randn(3, 5, 8)
WEIGHTS = random_slot_weights(8, torch.Generator().manual_seed(0), torch.float32)


def assignments(tokens=TOKENS, slots=SLOTS, weights=WEIGHTS):
    return slot_assignments(tokens, slots, GROUPS, weights)


BAD_ASSIGNMENTS = [
    ({"tokens": TOKENS[:, 0]}, ValueError, r"tokens must have shape \[B=4, T>0, D>0\], got \[4, 8\]"),
    ({"tokens": TOKENS[:3]}, ValueError, r"tokens must have shape \[B=4, T>0, D>0\], got \[3, 2, 8\]"),
    ({"tokens": TOKENS[:, :0]}, ValueError, r"tokens must have shape \[B=4, T>0, D>0\], got \[4, 0, 8\]"),
    ({"tokens": TOKENS[..., :4], "slots": SLOTS[..., :4]}, ValueError, r"weights.to_q must have shape \[D=4, D'=4\]"),
    ({"slots": SLOTS[:2]}, ValueError, r"slots must have shape \[K=3, S>0, D=8\], got \[2, 5, 8\]"),
    ({"slots": SLOTS[:, :0]}, ValueError, r"slots must have shape \[K=3, S>0, D=8\], got \[3, 0, 8\]"),
    ({"slots": SLOTS[..., :4]}, ValueError, r"slots must have shape \[K=3, S>0, D=8\], got \[3, 5, 4\]"),
    ({"slots": SLOTS.to("meta")}, ValueError, "slots must be on the tokens' device cpu, got meta"),
    ({"weights": WEIGHTS._replace(to_k=torch.randn(8, 4))}, ValueError, r"weights.to_k must have shape \[8, 8\]"),
    ({"weights": WEIGHTS._replace(to_q=torch.randn(4, 4))}, ValueError, r"weights.to_q must have shape \[D=8, D'=8\]"),
    ({"weights": WEIGHTS._replace(norm_slots_bias=torch.ones(7))}, ValueError, r"norm_slots_bias .* \[8\], got \[7\]"),
    ({"tokens": TOKENS.long()}, TypeError, "tokens must be a floating-point tensor, got torch.int64"),
    ({"tokens": None}, TypeError, "tokens must be a floating-point tensor, got NoneType"),
    ({"slots": SLOTS.long()}, TypeError, "slots must be a floating-point tensor, got torch.int64"),
    ({"slots": SLOTS.double()}, TypeError, "slots is torch.float64 but the tokens are torch.float32"),
    ({"tokens": TOKENS.double()}, TypeError, "weights.to_q is torch.float32 but the tokens are torch.float64"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD_ASSIGNMENTS, ids=[m for _, _, m in BAD_ASSIGNMENTS])
def test_bad_argument_of_assignments_is_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        assignments(**kwargs)


# ----------------------------------------------------------------------------------------------------------- labels


@given(st.lists(st.integers(0, 6), max_size=30), st.sampled_from([torch.int16, torch.uint8, torch.int64]))
@settings(max_examples=40, deadline=None)
def test_labels_of_groups_are_those_they_were_made_from(labels, dtype):
    labels = torch.tensor(labels, dtype=dtype)
    found = ClassGroups.from_labels(labels, 7).labels
    assert found.dtype == torch.int64
    assert torch.equal(found, labels.long())


def test_labels_of_groups_read_no_value_on_the_host():
    groups = ClassGroups.from_labels(torch.zeros(5, dtype=torch.long, device="meta"), 4)
    assert groups.labels.shape == (5,)
