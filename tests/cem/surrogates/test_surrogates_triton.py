"""Whole surrogates in Triton: compiled on a CUDA device, elsewhere in Triton's interpreter."""

import importlib
import math

import pytest
import torch
from small_surrogates import build, seen
from torch._subclasses import FakeTensorMode

import cem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = ("slot_attention", "slot_variance", "cross_attention", "variance")
kernels = {name: importlib.import_module(f"cem_kernels.{name}.triton") for name in OPERATORS}

CASES = {
    "attention": ("attention", {"num_slots": 2}),
    "attention, positions": ("attention", {"num_slots": 2, "spatial": True}),
    "attention, reduced": ("attention", {"num_slots": 2, "reduction": "linear16"}),
    "centroid": ("centroid", {}),
    "slots": ("slots", {"num_slots": 3}),
}
LABELS = torch.tensor([2, 0, 1, 0, -100, 1, 0, 1], device=DEVICE)  # a class of one sample, and classes of none


def built(case, backend):
    name, options = CASES[case]
    return build(name, options, feature_shape=(16, 1, 2), backend=backend).requires_grad_().to(DEVICE)


def batch():
    features = torch.randn(8, 16, 1, 2, generator=torch.Generator().manual_seed(0))
    features[4] = math.nan  # does not count
    return features.to(DEVICE), LABELS


@pytest.mark.parametrize(
    ("case", "training"), [*((case, False) for case in CASES), ("centroid", True), ("slots", True)]
)
def test_losses_all_gradients_and_the_state_are_those_of_the_reference(case, training):
    module, exact = built(case, "triton").train(training), built(case, "reference").train(training).double()
    results = []
    for each, features in ((module, batch()[0]), (exact, batch()[0].double())):
        leaves = {"features": features.requires_grad_(), **dict(each.named_parameters())}
        rob_loss, intra_mse = each(features, LABELS)
        gradients = torch.autograd.grad(rob_loss + intra_mse, list(leaves.values()))
        results.append({"rob_loss": rob_loss.detach(), **dict(zip(leaves, gradients, strict=True))})
        results[-1]["intra_mse"] = intra_mse.detach()
        results[-1].update((name, state.double()) for name, state in each.named_buffers())
    found, want = results
    errors = {name: float((found[name] - each).norm()) for name, each in want.items()}
    assert {name for name, each in want.items() if errors[name] > 2e-5 * float(each.norm()) + 1e-7} == set()


@pytest.mark.parametrize(
    ("case", "split", "launches"),
    [("attention", False, 7), ("attention", True, 12), ("centroid", False, 2), ("slots", False, 2)],
    ids=["attention", "attention, tokens split", "centroid", "slots"],
)
def test_forward_and_backward_are_few_launches(case, split, launches, monkeypatch):
    names = []
    for operator in kernels.values():

        def counted(kernel, *args, launch=operator.launch, **options):
            names.append(kernel.__name__)
            launch(kernel, *args, **options)

        monkeypatch.setattr(operator, "launch", counted)
    monkeypatch.setattr(kernels["slot_attention"], "tokens_are_split", lambda x, groups: split)
    seen(built(case, "triton"), *batch())
    assert len(names) == launches


@pytest.mark.parametrize("case", CASES)
def test_what_can_be_captured_reads_no_value_on_the_host(case, monkeypatch):
    module = built(case, "triton")
    assert module.capturable
    # Fake tensors have shapes and no values: whatever reads a value raises. Values are checked on the CPU alone.
    monkeypatch.setattr("cem_kernels.validation.values_are_checked", lambda tensor: False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = torch.zeros(8, 16, 1, 2, device=DEVICE, requires_grad=True)
        module(features, torch.zeros(8, dtype=torch.long, device=DEVICE))[0].backward()
    assert features.grad.shape == features.shape


def test_only_tokens_and_the_result_are_saved_of_what_is_as_large_as_the_tokens():
    module = cem.SlotCrossAttentionCEM(16, 2, 2, 1, spatial=True, num_classes=2, reg_strength=0.5, backend="triton")
    features = torch.randn(6, 16, 4, 4, device=DEVICE, requires_grad=True)
    saved = {}

    def keep(tensor):
        if tensor.numel() >= features.numel():
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.to(DEVICE)(features, torch.arange(6, device=DEVICE) % 2)
    assert len(saved) == 2  # normalized features, and these after cross attention
