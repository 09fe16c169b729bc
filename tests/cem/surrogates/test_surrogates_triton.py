"""Whole surrogates in Triton: compiled on a CUDA device, elsewhere in Triton's interpreter."""

import copy
import importlib

import pytest
import torch
from torch import Tensor

import cem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = ("slot_attention", "cross_attention", "variance")
kernels = {name: importlib.import_module(f"cem_kernels.{name}.triton") for name in OPERATORS}


def surrogate(backend: str, feature_dim: int = 32, reduced: int | None = None, **options) -> cem.SlotCrossAttentionCEM:
    torch.manual_seed(0)
    if reduced is not None:
        options["reduction"], feature_dim = cem.linear_reduction(feature_dim, reduced), reduced
    options = {"num_slots": 4, "reg_strength": 0.5, "num_classes": 6, **options}
    return cem.SlotCrossAttentionCEM(feature_dim, backend=backend, **options).to(DEVICE)


def batch(samples: int = 20, width: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features, and labels of which one class has no sample and another has one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (samples,), generator=generator)
    labels[0] = 5
    return torch.randn(samples, width, generator=generator).to(DEVICE), labels.to(DEVICE)


def results(module: cem.Surrogate, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Both losses, and the gradients of their sum to the features and to every parameter."""
    x = features.detach().requires_grad_()
    rob_loss, intra_mse = module(x, labels)
    (rob_loss + intra_mse).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return {"rob_loss": rob_loss.detach(), "intra_mse": intra_mse.detach(), "gradient of features": x.grad, **gradients}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_slots": 8, "num_heads": 8},
        {"reduced": 16},
        {"spatial": True, "feature_dim": 16, "num_iterations": 2},
    ],
    ids=["flat", "eight slots and heads", "reduced", "spatial"],
)
def test_loss_and_all_gradients_are_those_of_the_reference(options):
    exact = surrogate("reference", **options).double().eval()
    module = surrogate("triton", **options).eval()
    module.load_state_dict(exact.state_dict())
    features, labels = batch(width=96 if "spatial" in options else 32)
    features = features.view(-1, 16, 2, 3) if "spatial" in options else features
    found, want = results(module, features, labels), results(exact, features.double(), labels)
    largest = max(float(tensor.norm()) for tensor in want.values())
    for name, tensor in want.items():
        error = float((found[name] - tensor).norm())
        assert error <= 2e-5 * float(tensor.norm()) + 1e-7 * largest, (
            f"{name}: {error:.2g} of {float(tensor.norm()):.2g}"
        )


def launches(monkeypatch: pytest.MonkeyPatch, module: cem.Surrogate, *inputs: Tensor) -> list[str]:
    """Names of the kernels that one forward and backward launch."""
    names = []
    for operator in kernels.values():

        def counted(kernel, *args, launch=operator.launch, **options):
            names.append(kernel.__name__)
            launch(kernel, *args, **options)

        monkeypatch.setattr(operator, "launch", counted)
    results(module, *inputs)
    return names


def centroid(backend: str) -> cem.CentroidCEM:
    return cem.CentroidCEM(32, 6, 0.5, momentum=0.95, backend=backend).to(DEVICE)


@pytest.mark.parametrize("training", [True, False])
def test_centroids_are_those_of_the_reference_batch_after_batch(training):
    exact, module = centroid("reference").double().train(training), centroid("triton").train(training)
    for seed in range(3):
        features, labels = batch(seed=seed)
        found, want = results(module, features, labels), results(exact, features.double(), labels)
        for name, tensor in want.items():
            torch.testing.assert_close(found[name].double(), tensor, rtol=2e-5, atol=1e-7)
    for name, state in exact.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name].double(), state.double(), rtol=2e-5, atol=1e-7)
    assert bool(module.batches.any()) is training


@pytest.mark.parametrize("training", [True, False])
def test_centroids_are_two_launches(monkeypatch, training):
    assert len(launches(monkeypatch, centroid("triton").train(training), *batch())) == 2


def test_forward_and_backward_are_seven_launches(monkeypatch):
    assert len(launches(monkeypatch, surrogate("triton"), *batch())) == 7


def test_split_tokens_are_twelve_launches(monkeypatch):
    monkeypatch.setattr(kernels["slot_attention"], "tokens_are_split", lambda x, groups: True)
    assert len(launches(monkeypatch, surrogate("triton", num_iterations=3), *batch())) == 12


def test_frozen_parameters_change_nothing_for_the_features():
    module = surrogate("triton").eval()
    trained = results(module, *batch())["gradient of features"]
    frozen = results(module.requires_grad_(False), *batch())["gradient of features"]
    assert torch.equal(frozen, trained)


def test_half_precision_features_keep_the_spread_inside_their_class():
    _, labels = batch(60)
    generator = torch.Generator().manual_seed(1)
    center = torch.randn(6, 32, generator=generator).to(DEVICE)
    spread = 0.05 * torch.randn(60, 32, generator=generator).to(DEVICE)
    narrow = (center[labels] + spread).bfloat16()  # what is left inside a class when training succeeds
    module = surrogate("triton", threshold=1e-5, eps_var=1e-6).eval()
    found, want = (results(module, x, labels)["gradient of features"].float() for x in (narrow, narrow.float()))
    assert float((found - want).norm() / want.norm()) < 0.02  # products round by 0.4 %


def test_training_draws_slots_anew_and_repeats_under_the_same_seed():
    module = surrogate("triton").train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(float(module(*batch())[1].detach()))
    assert drawn[0] == drawn[1] != drawn[2]


def test_compiles_as_one_graph_without_a_bound_on_class_sizes():
    """Nothing in it reads a value on the host, and so nothing waits for a device."""
    module = surrogate("triton").eval()
    plain = results(copy.deepcopy(module), *batch())
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = batch()[0].requires_grad_()
    losses = compiled(x, batch()[1])
    sum(losses).backward()
    assert torch.equal(losses[0], plain["rob_loss"])
    torch.testing.assert_close(x.grad, plain["gradient of features"])


def test_only_tokens_and_the_result_are_saved_of_what_is_as_large_as_the_tokens():
    module = surrogate("triton", spatial=True, num_iterations=1)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 32, 8, 8, generator=generator).to(DEVICE).requires_grad_()
    saved = {}

    def keep(tensor):
        if tensor.numel() >= features.numel():
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(features, batch()[1])
    assert len(saved) == 2  # normalized features, and these after cross attention
