"""Errors name what was expected and what came."""

import pytest
import torch
from problems import cross_problem, random_cross_weights, random_slot_weights, slot_problem

from cem_kernels import ClassGroups, LogHinge
from cem_kernels.cross_attention import cross_attention
from cem_kernels.slot_attention import slot_attention
from cem_kernels.variance import class_variance

LABELS = torch.tensor([0, 1, 1, 2])
GROUPS = ClassGroups.from_labels(LABELS, 3)
TOKENS, SLOTS = torch.randn(4, 2, 8), torch.randn(3, 5, 8)
SLOT_WEIGHTS = random_slot_weights(8, torch.Generator().manual_seed(0), torch.float32)
CROSS_WEIGHTS = random_cross_weights(8, torch.Generator().manual_seed(0), torch.float32)


def slots(tokens=TOKENS, slots=SLOTS, weights=SLOT_WEIGHTS, **kwargs):
    return slot_attention(tokens, slots, GROUPS, weights, **kwargs)


def cross(tokens=TOKENS, slots=SLOTS, weights=CROSS_WEIGHTS, **kwargs):
    return cross_attention(tokens, slots, GROUPS, weights, **kwargs)


def variance(features=TOKENS, **kwargs):
    return class_variance(features, GROUPS, LogHinge(0.1), **kwargs)


def hinge(threshold=0.1, **kwargs):
    return LogHinge(threshold, **kwargs)


BAD_VALUES = [
    (slots, {"tokens": TOKENS[:, 0]}, r"tokens must have shape \[B=4, T>0, D>0\], got \[4, 8\]"),
    (slots, {"tokens": TOKENS[:3]}, r"tokens must have shape \[B=4, T>0, D>0\], got \[3, 2, 8\]"),
    (slots, {"tokens": TOKENS[:, :0]}, r"tokens must have shape \[B=4, T>0, D>0\], got \[4, 0, 8\]"),
    (slots, {"slots": SLOTS[:2]}, r"slots must have shape \[K=3, S>0, D=8\], got \[2, 5, 8\]"),
    (slots, {"slots": SLOTS[:, :0]}, r"slots must have shape \[K=3, S>0, D=8\], got \[3, 0, 8\]"),
    (slots, {"slots": SLOTS[..., :4]}, r"slots must have shape \[K=3, S>0, D=8\], got \[3, 5, 4\]"),
    (
        slots,
        {"weights": SLOT_WEIGHTS._replace(to_v=torch.randn(8, 4))},
        r"weights.to_v must have shape \[8, 8\]",
    ),
    (slots, {"weights": SLOT_WEIGHTS._replace(gru_bias_hh=torch.randn(8))}, r"weights.gru_bias_hh .* \[24\]"),
    (slots, {"num_iterations": 0}, "num_iterations must be finite and positive, got 0"),
    (slots, {"eps": float("nan")}, "eps must be finite and positive, got nan"),
    (slots, {"backend": "cuda"}, "backend must be one of auto, triton, eager, reference, got 'cuda'"),
    (cross, {"num_heads": 3}, "the token width D=8 must be a multiple of num_heads, got num_heads=3"),
    (cross, {"num_heads": 0}, "the token width D=8 must be a multiple of num_heads, got num_heads=0"),
    (cross, {"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    (cross, {"dropout": float("nan")}, r"dropout must lie in \[0, 1\), got nan"),
    (
        cross,
        {"weights": CROSS_WEIGHTS._replace(alpha_ffn=torch.randn(1))},
        r"weights.alpha_ffn must have shape \[\]",
    ),
    (
        cross,
        {"tokens": TOKENS[..., :4], "slots": SLOTS[..., :4]},
        r"weights.to_q must have shape \[D=4, D'=4\]",
    ),
    (variance, {"features": TOKENS[:, 0, 0]}, r"features must have shape \[B=4, ...\], got \[4\]"),
    (variance, {"features": TOKENS[:2]}, r"features must have shape \[B=4, ...\], got \[2, 2, 8\]"),
    (variance, {"min_samples": 1}, "min_samples must be at least 2, got 1"),
    (hinge, {"threshold": 0.0}, "threshold must be finite and positive, got 0.0"),
    (hinge, {"threshold": float("nan")}, "threshold must be finite and positive, got nan"),
    (hinge, {"threshold": torch.ones(2)}, r"threshold must have shape \[\], got \[2\]"),
    (hinge, {"floor": -1.0}, "floor must be finite and positive, got -1.0"),
    (hinge, {"gamma": float("inf")}, "gamma must be finite and positive, got inf"),
    (hinge, {"hinge": "elu"}, "hinge must be one of relu, softplus, got 'elu'"),
]


@pytest.mark.parametrize(("call", "kwargs", "message"), BAD_VALUES, ids=[m for _, _, m in BAD_VALUES])
def test_bad_value_is_refused(call, kwargs, message):
    with pytest.raises(ValueError, match=message):
        call(**kwargs)


BAD_TYPES = [
    (slots, {"tokens": TOKENS.long()}, "tokens must be a floating-point tensor, got torch.int64"),
    (slots, {"tokens": None}, "tokens must be a floating-point tensor, got NoneType"),
    (slots, {"tokens": TOKENS.double()}, "weights.to_q is torch.float32 but the tokens are torch.float64"),
    (cross, {"slots": SLOTS.double()}, "slots is torch.float64 but the tokens are torch.float32"),
    (variance, {"features": TOKENS.int()}, "features must be a floating-point tensor, got torch.int32"),
]


@pytest.mark.parametrize(("call", "kwargs", "message"), BAD_TYPES, ids=[m for _, _, m in BAD_TYPES])
def test_bad_type_is_refused(call, kwargs, message):
    with pytest.raises(TypeError, match=message):
        call(**kwargs)


@pytest.mark.parametrize("call", [slots, cross])
def test_tensors_on_two_devices_are_refused(call):
    with pytest.raises(ValueError, match="slots must be on the tokens' device cpu, got meta"):
        call(slots=SLOTS.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_products_in_another_dtype_are_refused(dtype):
    with pytest.raises(TypeError, match=f"product_dtype must be fp32, bf16 or fp16, got {dtype}"):
        slots(product_dtype=dtype)


@pytest.mark.parametrize("make", [slot_problem, cross_problem])
def test_auto_is_eager_on_the_cpu(make):
    problem = make(LABELS, 3)
    for found, want in zip(problem.run("auto", **problem.leaves), problem.run("eager", **problem.leaves), strict=True):
        assert torch.equal(found, want)
