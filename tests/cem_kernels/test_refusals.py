"""Errors name what was expected and what came. A backend that is asked for by name is used or refused."""

import math
from typing import Any

import pytest
import torch
from problems import (
    DEVICE,
    FEW,
    cross_problem,
    few,
    random_cross_weights,
    random_slot_weights,
    slot_problem,
    variance_problem,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from cem_kernels import BackendUnavailableError, ClassGroups, LogHinge, Nats, RunningMoments, backends, set_debug
from cem_kernels.cross_attention import cross_attention
from cem_kernels.slot_attention import slot_attention
from cem_kernels.slot_variance import RunningSlots, slot_variance
from cem_kernels.variance import centroid_variance, class_variance

LABELS = torch.tensor([0, 1, 1, 2], device=DEVICE)
GROUPS = ClassGroups.from_labels(LABELS, 3)
TOKENS, SLOTS = torch.randn(4, 2, 8, device=DEVICE), torch.randn(3, 5, 8, device=DEVICE)
MOMENTS, COUNTS = torch.zeros(3, 16, device=DEVICE), torch.zeros(3, dtype=torch.long, device=DEVICE)
SLOT_WEIGHTS, CROSS_WEIGHTS = (
    type(weights)(*(weight.float().to(DEVICE) for weight in weights))
    for weights in (draw(8, torch.Generator().manual_seed(0)) for draw in (random_slot_weights, random_cross_weights))
)
NAN, GRADIENT = math.nan, {"requires_grad": True}


def labels(labels: Any = LABELS, num_classes: int = 3, **options: Any) -> object:
    return ClassGroups.from_labels(labels, num_classes, **options)


def slots(tokens=TOKENS, slots=SLOTS, weights=SLOT_WEIGHTS, **options: Any) -> object:
    return slot_attention(tokens, slots, GROUPS, weights, **options)


def cross(tokens=TOKENS, slots=SLOTS, weights=CROSS_WEIGHTS, **options: Any) -> object:
    return cross_attention(tokens, slots, GROUPS, weights, **options)


def variance(features=TOKENS, penalty: Any = None, **options: Any) -> object:
    return class_variance(features, GROUPS, penalty or Nats(0.1), **options)


def moving(penalty: Any = None, momentum: float = 0.9, backend: str = "eager", **replaced: Any) -> object:
    running = RunningMoments(MOMENTS, MOMENTS, COUNTS, COUNTS)._replace(**replaced)
    return centroid_variance(TOKENS, GROUPS, running, penalty or Nats(0.1), momentum=momentum, backend=backend)


def around(features=TOKENS, penalty: Any = None, backend: str = "eager", S: int = 2, **replaced: Any) -> object:
    moments, shares = torch.zeros(3, S, 16, device=DEVICE), torch.zeros(3, S, device=DEVICE)
    running = RunningSlots(moments, moments, shares, COUNTS, COUNTS)._replace(**replaced)
    return slot_variance(features, GROUPS, running, penalty or Nats(0.1), backend=backend)


def hinge(threshold: Any = 0.1, **options: Any) -> object:
    return LogHinge(threshold, **options)


def kernels(make: Any, **sizes: Any) -> object:
    problem = make(FEW, 4) if sizes.pop("wide", False) else few(make, **sizes)
    return problem.run("triton", **problem.leaves)


OUT_OF_RANGE = r"labels must lie in \[0, 3\), or be -100 where a sample does not count, got values from"
BAD_VALUES = [
    (labels, {"labels": LABELS + 1}, OUT_OF_RANGE),
    (labels, {"labels": LABELS - 1}, OUT_OF_RANGE),
    (labels, {"labels": LABELS - 101}, OUT_OF_RANGE),
    (labels, {"labels": torch.tensor([2**64 - 100], dtype=torch.uint64)}, OUT_OF_RANGE),  # not the ignored one
    (labels, {"labels": LABELS[:, None]}, r"labels must have shape \[B\], got \[4, 1\]"),
    (labels, {"num_classes": 0}, "num_classes must be positive, got 0"),
    (labels, {"max_class_size": 0}, "max_class_size must be positive, got 0"),
    (labels, {"max_class_size": 1}, "max_class_size is 1, but a class has 2 samples"),
    (slots, {"tokens": TOKENS[:, 0]}, r"tokens must have shape \[B=4, T>0, D>0\], got \[4, 8\]"),
    (slots, {"tokens": TOKENS[:3]}, r"tokens must have shape \[B=4, T>0, D>0\], got \[3, 2, 8\]"),
    (slots, {"tokens": TOKENS[:, :0]}, r"tokens must have shape \[B=4, T>0, D>0\], got \[4, 0, 8\]"),
    (slots, {"slots": SLOTS[:2]}, r"slots must have shape \[K=3, S>0, D=8\], got \[2, 5, 8\]"),
    (slots, {"slots": SLOTS[:, :0]}, r"slots must have shape \[K=3, S>0, D=8\], got \[3, 0, 8\]"),
    (slots, {"slots": SLOTS[..., :4]}, r"slots must have shape \[K=3, S>0, D=8\], got \[3, 5, 4\]"),
    (slots, {"slots": SLOTS.to("meta")}, "slots must be on the tokens' device .*, got meta"),
    (slots, {"weights": SLOT_WEIGHTS._replace(to_v=torch.randn(8, 4))}, r"weights.to_v must have shape \[8, 8\]"),
    (slots, {"weights": SLOT_WEIGHTS._replace(gru_bias_hh=torch.randn(8))}, r"weights.gru_bias_hh .* \[24\]"),
    (slots, {"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
    (slots, {"num_iterations": 2.5}, "num_iterations must be a whole number, at least 1, got 2.5"),
    (slots, {"eps": NAN}, "eps must be finite and positive, got nan"),
    (slots, {"backend": "cuda"}, "backend must be one of auto, triton, eager, reference, got 'cuda'"),
    (cross, {"slots": SLOTS.to("meta")}, "slots must be on the tokens' device .*, got meta"),
    (cross, {"num_heads": 3}, "the token width D=8 must be a multiple of num_heads, got num_heads=3"),
    (cross, {"num_heads": 0}, "the token width D=8 must be a multiple of num_heads, got num_heads=0"),
    (cross, {"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    (cross, {"dropout": NAN}, r"dropout must lie in \[0, 1\), got nan"),
    (cross, {"weights": CROSS_WEIGHTS._replace(alpha_ffn=torch.randn(1))}, r"weights.alpha_ffn must have shape \[\]"),
    (cross, {"tokens": TOKENS[..., :4], "slots": SLOTS[..., :4]}, r"weights.to_q must have shape \[D=4, D'=4\]"),
    (variance, {"features": TOKENS[:, 0, 0]}, r"features must have shape \[B=4, ...\], got \[4\]"),
    (variance, {"features": TOKENS[:2]}, r"features must have shape \[B=4, ...\], got \[2, 2, 8\]"),
    (variance, {"min_samples": 1}, "min_samples must be at least 2, got 1"),
    (moving, {"centroids": MOMENTS[:2]}, r"running.centroids must have shape \[K=3, C=16\], got"),
    (moving, {"variances": MOMENTS[:, :5]}, r"running.variances must have shape \[K=3, C=16\], got"),
    (moving, {"batches": COUNTS[:, None]}, r"running.batches must have shape \[K=3\], got \[3, 1\]"),
    (moving, {"ignored": COUNTS[:2]}, r"running.ignored must have shape \[K=3\], got \[2\]"),
    (moving, {"batches": COUNTS.to("meta")}, "running.batches must be on the features' device"),
    (moving, {"centroids": torch.zeros(3, 16, **GRADIENT)}, "running.centroids takes no gradient"),
    (moving, {"momentum": 1.0}, "momentum must lie between 0 and 1, got 1.0"),
    (moving, {"momentum": NAN}, "momentum must lie between 0 and 1, got nan"),
    (moving, {"penalty": LogHinge(torch.tensor(0.1, **GRADIENT))}, "threshold takes no gradient here"),
    (moving, {"backend": "cuda"}, "backend must be one of auto, triton, eager, reference, got 'cuda'"),
    (around, {"features": TOKENS[:2]}, r"features must have shape \[B=4, ...\], got \[2, 2, 8\]"),
    (around, {"centroids": MOMENTS}, r"running.centroids must have shape \[K=3, S=2, C=16\], got \[3, 16\]"),
    (around, {"variances": torch.zeros(3, 2, 5)}, r"running.variances must have shape \[K=3, S=2, C=16\], got"),
    (around, {"shares": MOMENTS[:2, :2]}, r"running.shares must have shape \[K=3, S=2\], got \[2, 2\]"),
    (around, {"shares": torch.zeros(3, 2, device="meta")}, "running.shares must be on the features' device"),
    (around, {"variances": torch.zeros(3, 2, 16, **GRADIENT)}, "running.variances takes no gradient"),
    (around, {"backend": "cuda"}, "backend must be one of auto, triton, eager, reference, got 'cuda'"),
    (Nats, {"noise_std": 0.0}, "noise_std must be finite and positive, got 0.0"),
    (Nats, {"noise_std": "0.1"}, "noise_std must be finite and positive, got '0.1'"),
    (Nats, {"noise_std": 10**400}, "noise_std must be finite and positive, got 10"),
    (hinge, {"threshold": 0.0}, "threshold must be finite and positive, got 0.0"),
    (hinge, {"threshold": NAN}, "threshold must be finite and positive, got nan"),
    (hinge, {"threshold": torch.ones(2)}, r"threshold must have shape \[\], got \[2\]"),
    (hinge, {"floor": -1.0}, "floor must be finite and positive, got -1.0"),
    (hinge, {"gamma": math.inf}, "gamma must be finite and positive, got inf"),
    (hinge, {"hinge": "elu"}, "hinge must be one of relu, softplus, got 'elu'"),
]
BAD_TYPES = [
    (labels, {"labels": LABELS.float()}, "labels must be an integer tensor, got torch.float32"),
    (labels, {"labels": LABELS > 0}, "labels must be an integer tensor, got torch.bool"),
    (labels, {"labels": [0, 1]}, "labels must be an integer tensor, got list"),
    (slots, {"tokens": TOKENS.long()}, "tokens must be a floating-point tensor, got torch.int64"),
    (slots, {"tokens": None}, "tokens must be a floating-point tensor, got NoneType"),
    (slots, {"tokens": TOKENS.double()}, "weights.to_q is torch.float32 but the tokens are torch.float64"),
    (slots, {"product_dtype": torch.float64}, "product_dtype must be fp32, bf16 or fp16, got torch.float64"),
    (slots, {"product_dtype": torch.int8}, "product_dtype must be fp32, bf16 or fp16, got torch.int8"),
    (cross, {"slots": SLOTS.double()}, "slots is torch.float64 but the tokens are torch.float32"),
    (variance, {"features": TOKENS.int()}, "features must be a floating-point tensor, got torch.int32"),
    (variance, {"penalty": 0.1}, "penalty must be Nats or LogHinge, got float"),
    (around, {"features": TOKENS.int()}, "features must be a floating-point tensor, got torch.int32"),
    (around, {"penalty": LogHinge(0.1)}, "penalty must be Nats, got LogHinge"),
    (
        around,
        {"shares": COUNTS[:, None].expand(3, 2)},
        "running.shares must be a floating-point tensor, got",
    ),
    (around, {"batches": COUNTS.int()}, "running.batches must be torch.int64, got torch.int32"),
    (moving, {"batches": COUNTS.int()}, "running.batches must be torch.int64, got torch.int32"),
    (moving, {"ignored": COUNTS.int()}, "running.ignored must be torch.int64, got torch.int32"),
    (moving, {"batches": COUNTS.bool()}, "running.batches must be torch.int64, got torch.bool"),
]
BY_KERNELS = [
    (kernels, {"make": cross_problem, "D": 8}, "kernels take D from 16 to 512, got 8"),
    (kernels, {"make": cross_problem, "D": 520}, "kernels take D from 16 to 512, got 520"),
    (kernels, {"make": cross_problem, "S": 33}, "kernels take S from 1 to 32, got 33"),
    (kernels, {"make": cross_problem, "D": 34, "H": 17}, "kernels take H from 1 to 16, got 17"),
    (kernels, {"make": slot_problem, "D": 15}, "kernels take D from 16 to 512, got 15"),
    (kernels, {"make": slot_problem, "S": 40}, "kernels take S from 1 to 32, got 40"),
    (kernels, {"make": variance_problem, "wide": True}, "kernels take fp32, bf16 and fp16, got torch.float64"),
    (variance, {"penalty": LogHinge(torch.tensor(0.1, **GRADIENT)), "backend": "triton"}, "threshold takes a gradient"),
    (around, {"S": 17, "backend": "triton"}, "kernels take at most 16 slots, got 17"),
    (around, {"shares": torch.zeros(2, 3, device=DEVICE).T, "backend": "triton"}, "fp32 and contiguous"),
    (around, {"centroids": torch.zeros(3, 2, 16).double(), "backend": "triton"}, "fp32 and contiguous"),
    *(
        (moving, {**replaced, "backend": "triton"}, "kernels take running moments that are fp32 and contiguous")
        for replaced in (
            {"centroids": MOMENTS.double()},
            {"variances": torch.zeros(16, 3, device=DEVICE).T},
            {"batches": torch.zeros(3, 2, dtype=torch.long, device=DEVICE)[:, 0]},
            {"batches": COUNTS[:1].expand(3)},
        )
    ),
]
CASES = [
    pytest.param(error, *case, id=f"{case[0].__name__} {' '.join(case[1])}: {case[2]}")
    for error, cases in ((ValueError, BAD_VALUES), (TypeError, BAD_TYPES), (BackendUnavailableError, BY_KERNELS))
    for case in cases
]


@pytest.mark.parametrize(("error", "call", "options", "message"), CASES)
def test_call_is_refused(error, call, options, message):
    with pytest.raises(error, match=message):
        call(**options)


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
    assert backends.pick("auto", "x", torch.empty(2, 16, dtype=dtype)) == "eager"


def test_debug_mode_refuses_tokens_that_are_not_finite():
    features = TOKENS.clone()
    features[1, 0] = NAN
    assert class_variance(features, GROUPS, Nats(0.1)).rob_loss.isnan()
    set_debug(True)
    try:
        with pytest.raises(ValueError, match="features must be finite, got NaN or infinity"):
            class_variance(features, GROUPS, Nats(0.1))
    finally:
        set_debug(False)
