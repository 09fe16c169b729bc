"""SlotCrossAttentionCEM: the original's names and defaults, and what it measures."""

import inspect
import math

import pytest
import torch
from small_surrogates import CLASSES, WIDTH, attention, batch, seen
from torch.nn import functional as F

import cem
from cem.surrogates import modules
from cem.surrogates.modules import Normalized
from cem_kernels import BackendUnavailableError, ClassGroups

ORIGINAL = """
slot_attention: slot_mu slot_log_sigma to_q.weight to_k.weight to_v.weight
slot_attention: gru.weight_ih gru.weight_hh gru.bias_ih gru.bias_hh mlp.0.weight mlp.0.bias mlp.2.weight mlp.2.bias
slot_attention: norm_inputs.weight norm_inputs.bias norm_slots.weight norm_slots.bias norm_mlp.weight norm_mlp.bias
cross_attention: ln_q.weight ln_q.bias ln_kv.weight ln_kv.bias ln_ff.weight ln_ff.bias
cross_attention: to_q.weight to_k.weight to_v.weight proj.weight proj.bias alpha_xattn alpha_ffn
cross_attention: ffn.0.weight ffn.0.bias ffn.2.weight ffn.2.bias
"""


def original_names():
    lines = (line.split(": ") for line in ORIGINAL.strip().splitlines())
    return {f"{module}.{name}" for module, names in lines for name in names.split()}


# the original's interface


def test_positional_arguments_are_the_original_s():
    parameters = inspect.signature(cem.SlotCrossAttentionCEM).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = "feature_dim num_slots num_heads num_iterations eps_var var_threshold reg_strength"
    assert [p.name for p in positional] == names.split()
    assert [p.default for p in positional] == [inspect.Parameter.empty, 8, 4, 3, 1e-4, 0.1, 0.0]


def test_state_dict_of_the_original_loads_strictly():
    target = attention()
    state = target.state_dict()
    assert set(state) == original_names()
    original = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    target.load_state_dict(original, strict=True)
    torch.testing.assert_close(dict(target.state_dict()), original, rtol=0, atol=0)
    assert target.slot_attention.slot_mu.shape == (1, 1, WIDTH)


# what it measures


@pytest.mark.parametrize("hinge", ["relu", "softplus"])
def test_the_loss_is_the_log_variance_over_the_threshold_of_samples_that_read_their_slots(hinge):
    features, labels = batch()
    module = attention(hinge=hinge, eps_var=0.3, gamma=0.02, threshold=0.9, num_iterations=2).eval()
    groups = ClassGroups.from_labels(labels, CLASSES)
    normal = F.layer_norm(features[:, None], (WIDTH,))
    enhanced = module.cross_attention(normal, module.slot_attention(normal, groups), groups)[:, 0]
    losses, squares = [], []
    for c in range(CLASSES):
        mine = enhanced[labels == c]
        excess = torch.log(mine.var(dim=0).clamp(min=0.3) + 0.02) - math.log(0.9 + 0.02)
        losses.append(getattr(F, hinge)(excess).mean())
        squares.append(mine.var(dim=0, unbiased=False).mean())
    share = labels.bincount() / 24
    rob_loss, intra_mse = module(features, labels)
    torch.testing.assert_close(rob_loss, sum(share * torch.stack(losses)))
    torch.testing.assert_close(intra_mse, sum(share * torch.stack(squares)))


@pytest.mark.parametrize(("option", "value"), [("num_slots", 2), ("num_heads", 1), ("num_iterations", 1)])
def test_parts_are_made_as_asked(option, value):
    features, labels = batch()
    module, plain = attention(**{option: value}).eval(), attention().eval()
    part = module.cross_attention if option == "num_heads" else module.slot_attention
    assert getattr(part, option) == value
    assert module(features, labels)[0] != plain(features, labels)[0]


def test_eager_equals_reference_end_to_end():
    features, labels = batch()
    results = [seen(attention(backend=each).double(), features.double(), labels) for each in ("eager", "reference")]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_classes_of_too_few_samples_are_left_out():
    features, labels = batch()
    counted = (labels.bincount() >= 5)[labels]
    assert 0 < counted.sum() < 24
    found = attention(min_samples=5).eval()(features, labels)
    torch.testing.assert_close(found, attention().eval()(features[counted], labels[counted]))
    alone = seen(attention(), features[:CLASSES], torch.arange(CLASSES))
    assert alone.rob_loss.item() == 0
    assert not alone.gradient.any()


def test_a_class_above_the_static_bound_is_refused():
    with pytest.raises(ValueError, match="max_class_size is 2, but a class has 6 samples"):
        attention(max_class_size=2)(*batch())


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_an_empty_batch_gives_zero_without_num_classes(backend):
    found = seen(attention(num_classes=None, backend=backend), torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.long))
    assert found.rob_loss.item() == 0


def test_classes_are_read_off_the_labels_without_num_classes():
    features, labels = batch()
    names = torch.tensor([100, -3, 7, 2_000_000_000, 5])[labels]  # any integers name classes, but for one
    labels[3] = names[3] = -100
    features[3] = math.nan
    found, want = (seen(attention(num_classes=n).eval(), features, y) for n, y in ((None, names), (CLASSES, labels)))
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_an_infinite_sample_alone_in_its_class_leaves_the_losses_alone(backend):
    features, labels = batch()
    labels = labels.clamp(max=3)
    labels[0] = 4
    module = attention(backend=backend).eval()
    poisoned = features.clone()
    poisoned[0] = math.inf
    torch.testing.assert_close(module(poisoned, labels), module(features, labels))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_of_training(training):
    found, plain = (seen(attention(dropout=each).train(training), *batch()) for each in (0.5, 0.0))
    assert (found.rob_loss != plain.rob_loss) == training


def test_training_draws_fresh_slots_each_call_unless_the_caller_does():
    module, (features, labels) = attention(), batch()
    assert module(features, labels)[0] != module(features, labels)[0]
    shown, drawn = cem.Batch(None, labels, features, features), torch.randn(2, CLASSES, 4, WIDTH)
    first, again, other = (module.measure(shown, slot_noise=drawn[i]).loss for i in (0, 0, 1))
    assert first == again != other
    with pytest.raises(ValueError, match=r"slot_noise must have shape \[K, S, D\] = \[5, 4, 16\], got \[4, 16\]"):
        module.measure(shown, slot_noise=torch.randn(4, WIDTH))


def test_evaluation_draw_keeps_slots_apart_and_parts_take_the_original_s_calls():
    parts, tokens = attention().eval(), torch.randn(6, WIDTH)
    slots = parts.slot_attention(tokens[None])
    assert slots.shape == (1, 4, WIDTH)
    assert (torch.cdist(slots, slots) + torch.eye(4)).min() > 1e-3
    assert parts.cross_attention(tokens, slots).shape == (6, WIDTH)


def test_fp64_features_meet_fp32_parameters_with_an_error():
    features, labels = batch()
    with pytest.raises(TypeError, match="fp64 does not mix"):
        attention()(features.double(), labels)


@pytest.mark.parametrize(("dtype", "handed"), [(torch.bfloat16, torch.bfloat16), (torch.float32, None)])
def test_products_are_asked_for_in_the_dtype_of_half_precision_features(dtype, handed, monkeypatch):
    module, asked = attention(), []
    for part in (modules.SlotAttention, modules.CrossAttention):
        forward = part.forward
        monkeypatch.setattr(part, "forward", lambda *a, f=forward: asked.append(a[-1]) or f(*a))
    features, labels = batch()
    module(features.to(dtype), labels)
    assert asked == [handed, handed]


@pytest.mark.parametrize("backend", ["auto", "triton", "eager", "reference"])
def test_it_waits_for_no_device_where_all_of_it_is_kernels(backend):
    assert attention(backend=backend).capturable is (backend in ("auto", "triton"))


def test_normalization_is_layer_norm_and_its_derivatives():
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mT.requires_grad_()
    torch.testing.assert_close(Normalized.apply(x)[0], F.layer_norm(x, (5,)))
    assert torch.autograd.gradcheck(Normalized.apply, x)
    assert torch.autograd.gradgradcheck(lambda x: Normalized.apply(x)[0], x)
    # Without a second derivative to come, the backward takes another way.
    assert torch.autograd.gradcheck(lambda x: Normalized.apply(x)[0], x)


@pytest.mark.filterwarnings("ignore:gamma=1e-06 is above")
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reg_strength": 0.0}, "eps_var=0.0001 is above the variance threshold 1e-08: the penalty never reaches zero"),
        ({"reg_strength": 0.0, "eps_var": 1e-9}, "gamma=1e-06 is above .* 1e-08: the penalty begins at gamma"),
        ({"threshold": 1e-5}, "eps_var=0.0001 is above the variance threshold 1e-05"),
        ({"threshold": cem.Ramp(0.05, 1e-5)}, "eps_var=0.0001 is above the variance threshold 1e-05"),
        ({"threshold": cem.Ramp(1e-5, 0.05)}, "eps_var=0.0001 is above the variance threshold 1e-05"),
    ],
)
def test_a_swamped_threshold_warns_where_the_surrogate_is_made(kwargs, message):
    with pytest.warns(UserWarning, match=message) as caught:
        cem.SlotCrossAttentionCEM(16, **{"reg_strength": 0.5, **kwargs})
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("threshold", [0.05, None, cem.Ramp(0.05, 0.01)])
def test_a_sound_threshold_does_not_warn(threshold):
    attention(threshold=threshold)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"feature_dim": 10}, "feature_dim=10 must be a multiple of num_heads, got num_heads=4"),
        ({"reg_strength": -1.0}, "reg_strength must be finite and not negative, got -1.0"),
        ({"threshold": 0.0}, "threshold must be finite and positive, got 0.0"),
        ({"min_samples": 1}, "min_samples must be at least 2, got 1: one sample has no variance"),
        ({"eps_var": float("nan")}, "eps_var must be finite and positive, got nan"),
        ({"dropout": 2.0}, r"dropout must lie in \[0, 1\), got 2.0"),
        ({"backend": "gpu"}, "backend must be one of auto, triton, eager, reference, got 'gpu'"),
    ],
)
def test_bad_construction_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attention(**kwargs)


def test_a_backend_that_is_not_to_be_had_is_refused_when_it_is_built(monkeypatch):
    monkeypatch.setattr("cem_kernels.backends.TRITON_INSTALLED", False)
    with pytest.raises(BackendUnavailableError, match="backend='triton' needs the package triton"):
        attention(backend="triton")
