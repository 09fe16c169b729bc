"""SlotCrossAttentionCEM: the original's names and defaults, and what it measures."""

import inspect
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from attention_surrogates import batch, draw, gradient_of, measured, surrogate

import cem
from cem.surrogates.modules import Normalized
from cem_kernels import BackendUnavailableError, ClassGroups

ORIGINAL = [
    "slot_attention.slot_mu",
    "slot_attention.slot_log_sigma",
    "slot_attention.to_q.weight",
    "slot_attention.to_k.weight",
    "slot_attention.to_v.weight",
    "slot_attention.gru.weight_ih",
    "slot_attention.gru.weight_hh",
    "slot_attention.gru.bias_ih",
    "slot_attention.gru.bias_hh",
    "slot_attention.mlp.0.weight",
    "slot_attention.mlp.0.bias",
    "slot_attention.mlp.2.weight",
    "slot_attention.mlp.2.bias",
    "slot_attention.norm_inputs.weight",
    "slot_attention.norm_inputs.bias",
    "slot_attention.norm_slots.weight",
    "slot_attention.norm_slots.bias",
    "slot_attention.norm_mlp.weight",
    "slot_attention.norm_mlp.bias",
    "cross_attention.ln_q.weight",
    "cross_attention.ln_q.bias",
    "cross_attention.ln_kv.weight",
    "cross_attention.ln_kv.bias",
    "cross_attention.ln_ff.weight",
    "cross_attention.ln_ff.bias",
    "cross_attention.to_q.weight",
    "cross_attention.to_k.weight",
    "cross_attention.to_v.weight",
    "cross_attention.proj.weight",
    "cross_attention.proj.bias",
    "cross_attention.alpha_xattn",
    "cross_attention.alpha_ffn",
    "cross_attention.ffn.0.weight",
    "cross_attention.ffn.0.bias",
    "cross_attention.ffn.2.weight",
    "cross_attention.ffn.2.bias",
]


# the original's interface


def test_defaults_are_the_original_ones():
    parameters = inspect.signature(cem.SlotCrossAttentionCEM).parameters
    positional = {n: p.default for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert positional == {
        "feature_dim": inspect.Parameter.empty,
        "num_slots": 8,
        "num_heads": 4,
        "num_iterations": 3,
        "eps_var": 1e-4,
        "var_threshold": 0.1,
        "reg_strength": 0.0,
    }


def test_state_dict_has_the_original_names_and_nothing_else():
    assert set(surrogate().state_dict()) == set(ORIGINAL)


def test_state_dict_of_the_original_loads_strictly():
    shapes = {name: tensor.shape for name, tensor in surrogate().state_dict().items()}
    original = {name: torch.randn(shapes[name]) for name in ORIGINAL}
    target = surrogate()
    target.load_state_dict(original, strict=True)
    assert torch.equal(target.slot_attention.slot_mu, original["slot_attention.slot_mu"])
    assert target.slot_attention.slot_mu.shape == (1, 1, 16)


def test_original_calls_of_the_parts_are_accepted():
    parts = surrogate()
    tokens = torch.randn(6, 16)
    slots = parts.slot_attention(tokens[None])
    assert slots.shape == (1, 4, 16)
    assert parts.cross_attention(tokens, slots).shape == (6, 16)


# what it measures


@pytest.mark.parametrize("hinge", ["relu", "softplus"])
def test_the_loss_is_the_log_variance_over_the_threshold_of_samples_that_read_their_slots(hinge):
    features, labels = batch()
    module = surrogate(hinge=hinge, eps_var=0.3, gamma=0.02, threshold=0.9, min_samples=2).eval()
    groups = ClassGroups.from_labels(labels, 5)
    normal = F.layer_norm(features[:, None], (16,))
    enhanced = module.cross_attention(normal, module.slot_attention(normal, groups), groups)[:, 0]
    losses, squares = [], []
    for c in range(5):
        mine = enhanced[labels == c]
        excess = torch.log(mine.var(dim=0).clamp(min=0.3) + 0.02) - math.log(0.9 + 0.02)
        losses.append(getattr(F, hinge)(excess).mean())
        squares.append(mine.var(dim=0, unbiased=False).mean())
    share = labels.bincount() / 24
    rob_loss, intra_mse = module(features, labels)
    torch.testing.assert_close(rob_loss, sum(share * torch.stack(losses)))
    torch.testing.assert_close(intra_mse, sum(share * torch.stack(squares)))


@pytest.mark.parametrize("training", [True, False])
def test_eager_equals_reference_end_to_end(training):
    features, labels = batch()
    results = []
    for backend in ("eager", "reference"):
        module = surrogate(backend=backend).double().train(training)
        x = features.double().requires_grad_()
        rob_loss, intra_mse = measured(module, x, labels, draw().double())
        gradients = torch.autograd.grad(rob_loss + intra_mse, [x, *module.parameters()])
        results.append([rob_loss, intra_mse, *gradients])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_it_does_not_know_how_large_features_are():
    features, labels = batch()
    near, far = (surrogate().eval()(scale * features, labels)[0].item() for scale in (1, 10))
    assert far == pytest.approx(near, abs=1e-3)


def test_gradient_descent_on_the_features_lowers_it():
    features, labels = batch()
    module = surrogate().eval()
    before = module(features, labels)[0].item()
    x = features.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        module(x, labels)[0].backward()
        optimizer.step()
    assert module(x, labels)[0].item() < 0.5 * before


def test_classes_of_too_few_samples_are_left_out():
    features, labels = batch()
    counted = (labels.bincount() >= 5)[labels]
    assert 0 < counted.sum() < 24
    found = surrogate(min_samples=5).eval()(features, labels)
    torch.testing.assert_close(found, surrogate().eval()(features[counted], labels[counted]))


def test_no_class_with_enough_samples_gives_an_attached_zero():
    rob_loss, gradient = gradient_of(surrogate(), batch(4)[0], torch.arange(4))
    assert rob_loss.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_an_empty_batch_gives_zero_without_num_classes(backend):
    features = torch.randn(0, 16, requires_grad=True)
    rob_loss, _ = surrogate(num_classes=None, backend=backend)(features, torch.zeros(0, dtype=torch.long))
    assert rob_loss.item() == 0
    rob_loss.backward()


def test_classes_are_read_off_the_labels_without_num_classes():
    features, labels = batch()
    names = torch.tensor([100, -3, 7, 2_000_000_000, 5])  # any integers name classes
    found = surrogate(num_classes=None).eval()(features, names[labels])
    torch.testing.assert_close(found, surrogate().eval()(features, labels))


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_an_infinite_sample_alone_in_its_class_leaves_the_losses_alone(backend):
    features, labels = batch()
    labels = labels.clamp(max=3)
    labels[0] = 4
    module = surrogate(backend=backend).eval()
    poisoned = features.clone()
    poisoned[0] = float("inf")
    torch.testing.assert_close(module(poisoned, labels), module(features, labels))


def test_dropout_is_of_training():
    features, labels = batch()
    module = surrogate(dropout=0.5)
    assert measured(module, features, labels, draw()) != measured(module, features, labels, draw())
    assert module.eval()(features, labels) == surrogate().eval()(features, labels)


# slots


def test_training_draws_fresh_slots_each_call():
    features, labels = batch()
    module = surrogate().train()
    assert not torch.equal(module(features, labels)[0], module(features, labels)[0])


def test_slots_may_be_drawn_by_the_caller():
    features, labels = batch()
    first, again, other = (measured(surrogate(), features, labels, draw(seed=seed)) for seed in (7, 7, 8))
    assert first == again != other


def test_evaluation_repeats_exactly():
    features, labels = batch()
    module = surrogate().eval()
    assert module(features, labels) == module(features, labels)


def test_evaluation_draw_keeps_slots_apart():
    module = surrogate().eval()
    slots = module.slot_attention(torch.randn(3, 6, 16))
    assert slots.shape == (3, 4, 16)
    distances = torch.cdist(slots, slots) + torch.eye(4)
    assert float(distances.min().detach()) > 1e-3


def test_slot_noise_of_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"slot_noise must have shape \[K, S, D\] = \[5, 4, 16\], got \[4, 16\]"):
        measured(surrogate(), *batch(), torch.randn(4, 16))


# precisions and compilation


def test_bf16_features_keep_their_spread():
    features, labels = batch(200)
    center = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    narrow = (center[labels] + 0.05 * features).bfloat16()  # what is left inside a class when training succeeds
    module = surrogate(threshold=1e-5, eps_var=1e-6).eval()
    found, want = (gradient_of(module, narrow.to(dtype), labels)[1].float() for dtype in (torch.bfloat16, torch.float))
    assert want.any()
    assert float((found - want).norm() / want.norm()) < 0.005  # bf16 rounds by 0.4 %


def test_fp64_features_meet_fp32_parameters_with_an_error():
    features, labels = batch()
    with pytest.raises(TypeError, match="fp64 does not mix"):
        surrogate()(features.double(), labels)


def test_bf16_module_gives_fp32_losses():
    features, labels = batch()
    rob_loss, _ = surrogate().bfloat16()(features.bfloat16(), labels)
    assert rob_loss.dtype == torch.float32


@pytest.mark.parametrize(("backend", "captured"), [("auto", True), ("triton", True), ("eager", False)])
def test_it_waits_for_no_device_where_all_of_it_is_kernels(backend, captured):
    assert surrogate(backend=backend).capturable is captured


@pytest.mark.slow
def test_eager_compiles_as_one_graph_under_a_static_bound():
    features, labels = batch()
    module = surrogate(max_class_size=24, backend="eager").eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, labels), module(features, labels))
    torch.testing.assert_close(gradient_of(compiled, features, labels), gradient_of(module, features, labels))


def test_normalization_is_layer_norm_and_its_derivatives():
    x = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mT.requires_grad_()
    torch.testing.assert_close(Normalized.apply(x)[0], torch.nn.functional.layer_norm(x, (7,)))
    assert torch.autograd.gradcheck(lambda x: Normalized.apply(x)[0], x)
    assert torch.autograd.gradcheck(Normalized.apply, x)
    assert torch.autograd.gradgradcheck(lambda x: Normalized.apply(x)[0], x)


# what is warned about, and what is refused


@pytest.mark.filterwarnings("ignore:gamma=1e-06 is above")
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reg_strength": 0.0}, "eps_var=0.0001 is above the variance threshold 1e-08: the penalty never reaches zero"),
        ({"reg_strength": 0.0, "eps_var": 1e-9}, "gamma=1e-06 is above .* 1e-08: the penalty begins at gamma"),
        ({"reg_strength": 0.025}, "eps_var=0.0001 is above the variance threshold 6.25e-05"),
        ({"threshold": 1e-5}, "eps_var=0.0001 is above the variance threshold 1e-05"),
        ({"threshold": cem.Ramp(0.05, 1e-5)}, "eps_var=0.0001 is above the variance threshold 1e-05"),
        ({"threshold": cem.Ramp(1e-5, 0.05)}, "eps_var=0.0001 is above the variance threshold 1e-05"),
    ],
)
def test_a_swamped_threshold_warns_where_the_surrogate_is_made(kwargs, message):
    with pytest.warns(UserWarning, match=message) as caught:
        cem.SlotCrossAttentionCEM(16, **{"reg_strength": 0.5, **kwargs})
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "kwargs",
    [{"reg_strength": 0.1}, {"threshold": 0.05, "reg_strength": 0.0}, {"threshold": cem.Ramp(0.05, 0.01)}],
)
def test_a_sound_threshold_does_not_warn(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surrogate(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"feature_dim": 10}, "feature_dim=10 must be a multiple of num_heads, got num_heads=4"),
        ({"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
        ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"reg_strength": -1.0}, "reg_strength must be finite and not negative, got -1.0"),
        ({"var_threshold": float("nan")}, "var_threshold must be finite and not negative, got nan"),
        ({"threshold": 0.0}, "threshold must be finite and positive, got 0.0"),
        ({"hinge": "elu"}, "hinge must be one of relu, softplus, got 'elu'"),
        ({"min_samples": 1}, "min_samples must be at least 2, got 1: one sample has no variance"),
        ({"gamma": 0.0}, "gamma must be finite and positive, got 0.0"),
        ({"eps_var": float("nan")}, "eps_var must be finite and positive, got nan"),
        ({"dropout": 2.0}, r"dropout must lie in \[0, 1\), got 2.0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"max_class_size": 0}, "max_class_size must be at least 1, got 0"),
        ({"backend": "gpu"}, "backend must be one of auto, triton, eager, reference, got 'gpu'"),
    ],
)
def test_bad_construction_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        surrogate(**kwargs)


def test_a_backend_that_is_not_to_be_had_is_refused_when_it_is_built(monkeypatch):
    monkeypatch.setattr("cem_kernels.backends.TRITON_INSTALLED", False)
    with pytest.raises(BackendUnavailableError, match="backend='triton' needs the package triton"):
        surrogate(backend="triton")
