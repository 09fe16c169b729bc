"""SlotCrossAttentionCEM: the seeds' names and defaults, and what a training loop relies on."""

import inspect
import warnings

import pytest
import torch

import cem
from cem.surrogates.build import build_surrogate
from cem.surrogates.modules import Normalized
from cem_kernels import BackendUnavailableError

SEED_STATE = [
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


def surrogate(feature_dim=16, **kwargs):
    kwargs = {"num_slots": 4, "reg_strength": 0.5, "num_classes": 5, **kwargs}
    return cem.SlotCrossAttentionCEM(feature_dim, **kwargs)


def batch(num_samples=24, width=16, num_classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, width, generator=generator)
    return features, torch.randint(0, num_classes, (num_samples,), generator=generator)


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
    assert set(surrogate().state_dict()) == set(SEED_STATE)


def test_state_dict_of_the_original_loads_strictly():
    shapes = {name: tensor.shape for name, tensor in surrogate().state_dict().items()}
    original = {name: torch.randn(shapes[name]) for name in SEED_STATE}
    target = surrogate()
    target.load_state_dict(original, strict=True)
    assert torch.equal(target.slot_attention.slot_mu, original["slot_attention.slot_mu"])
    assert target.slot_attention.slot_mu.shape == (1, 1, 16)


@pytest.mark.parametrize(
    "kwargs", [{"reduce_dim": 8}, {"reduce_dim": 2, "reduce": "conv1x1", "feature_shape": (4, 2, 2)}]
)
def test_reduction_adds_one_weight_and_nothing_else(kwargs):
    assert set(surrogate(**kwargs).state_dict()) == {*SEED_STATE, "reduction.weight"}


@pytest.mark.parametrize("training", [True, False])
def test_eager_equals_reference_end_to_end(training):
    features, labels = batch()
    noise = torch.randn(5, 4, 16, dtype=torch.float64)
    results = []
    for backend in ("eager", "reference"):
        torch.manual_seed(0)
        module = surrogate(backend=backend).double().train(training)
        x = features.double().requires_grad_()
        rob_loss, intra_mse = module(x, labels, slot_noise=noise)
        gradients = torch.autograd.grad(rob_loss + intra_mse, [x, *module.parameters()])
        results.append([rob_loss, intra_mse, *gradients])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_training_draws_fresh_slots_each_call():
    features, labels = batch()
    module = surrogate().train()
    assert not torch.equal(module(features, labels)[0], module(features, labels)[0])


def test_evaluation_repeats_exactly_and_survives_a_reload():
    features, labels = batch()
    module = surrogate().eval()
    other = surrogate().eval()
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(features, labels)[0], module(features, labels)[0])
    assert torch.equal(module(features, labels)[0], other(features, labels)[0])


def test_evaluation_draw_keeps_slots_apart():
    module = surrogate().eval()
    tokens = torch.randn(3, 6, 16)
    slots = module.slot_attention(tokens)
    assert slots.shape == (3, 4, 16)
    distances = torch.cdist(slots, slots) + torch.eye(4)
    assert float(distances.min().detach()) > 1e-3


def test_maps_are_flattened():
    features, labels = batch()
    module = surrogate().eval()
    assert torch.equal(module(features.view(-1, 4, 2, 2), labels)[0], module(features, labels)[0])


def test_conv1x1_reduces_channels_before_flattening():
    features, labels = batch(width=32)
    module = surrogate(32, reduce_dim=2, reduce="conv1x1", feature_shape=(8, 2, 2), num_heads=2).eval()
    weight = module.reduction.weight[:, :, 0, 0]
    by_hand = surrogate(8, num_heads=2).eval()
    by_hand.load_state_dict({n: t for n, t in module.state_dict().items() if n != "reduction.weight"})
    reduced = torch.einsum("oc,bchw->bohw", weight, features.view(-1, 8, 2, 2)).flatten(1)
    torch.testing.assert_close(module(features, labels), by_hand(reduced, labels))
    torch.testing.assert_close(module(features.view(-1, 8, 2, 2), labels), by_hand(reduced, labels))


def test_linear_reduction_works_in_the_smaller_width():
    module = surrogate(64, reduce_dim=8)
    assert module.slot_attention.to_q.weight.shape == (8, 8)
    features, labels = batch(width=64)
    x = features.requires_grad_()
    module(x, labels)[0].backward()
    assert float(x.grad.abs().sum()) > 0


def test_no_class_with_enough_samples_gives_an_attached_zero():
    features = torch.randn(4, 16, requires_grad=True)
    rob_loss, intra_mse = surrogate()(features, torch.arange(4))
    assert rob_loss.item() == 0
    assert intra_mse.item() == 0
    rob_loss.backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("num_classes", [5, None])
def test_empty_batch_gives_zero(num_classes, backend):
    features = torch.randn(0, 16, requires_grad=True)
    rob_loss, _ = surrogate(num_classes=num_classes, backend=backend)(features, torch.zeros(0, dtype=torch.long))
    assert rob_loss.item() == 0
    rob_loss.backward()


def test_classes_are_read_off_the_labels_without_num_classes():
    features, labels = batch()
    known, unknown = surrogate().eval(), surrogate(num_classes=None).eval()
    unknown.load_state_dict(known.state_dict())
    names = torch.tensor([100, -3, 7, 2_000_000_000, 5])  # any integers name classes
    torch.testing.assert_close(unknown(features, names[labels]), known(features, labels))


def test_unique_labels_of_the_batch_change_nothing():
    features, labels = batch()
    module = surrogate().eval()
    torch.testing.assert_close(module(features, labels, torch.unique(labels)), module(features, labels))


def test_unique_labels_restrict_to_those_classes():
    features, labels = batch()
    module = surrogate().eval()
    chosen = (labels == 1) | (labels == 3)
    torch.testing.assert_close(module(features, labels, torch.tensor([1, 3])), module(features[chosen], labels[chosen]))


def test_penalty_is_what_gradient_descent_on_the_features_lowers():
    features, labels = batch()
    module = surrogate(var_threshold=0.1).eval()
    before = module(features, labels)[0].item()
    x = features.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        module(x, labels)[0].backward()
        optimizer.step()
    assert module(x, labels)[0].item() < 0.5 * before


def test_original_calls_of_the_parts_are_accepted():
    parts = surrogate()
    tokens = torch.randn(6, 16)
    slots = parts.slot_attention(tokens[None])
    assert slots.shape == (1, 4, 16)
    assert parts.cross_attention(tokens, slots).shape == (6, 16)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reg_strength": 0.0}, "eps_var=0.0001 is above the variance threshold 1e-08"),
        ({"reg_strength": 0.0, "eps_var": 1e-9}, "gamma=1e-06 is above the variance threshold 1e-08"),
        ({"reg_strength": 0.025}, "eps_var=0.0001 is above the variance threshold 6.25e-05"),
    ],
)
def test_swamped_threshold_warns(kwargs, message):
    with pytest.warns(UserWarning, match=message):
        surrogate(**kwargs)


def test_sound_threshold_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surrogate(reg_strength=0.1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"feature_dim": 10}, "feature_dim=10 must be a multiple of num_heads, got num_heads=4"),
        ({"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
        ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
        ({"reg_strength": -1.0}, "reg_strength must be finite and not negative, got -1.0"),
        ({"var_threshold": float("nan")}, "var_threshold must be finite and not negative, got nan"),
        ({"reduce_dim": 0}, "reduce_dim must be at least 1, got 0"),
        ({"reduce_dim": 4, "reduce": "conv1x1"}, r"reduce='conv1x1' needs reduce_dim and feature_shape=\(C, H, W\)"),
        ({"tokens": "patches"}, "tokens must be one of flat, spatial, got 'patches'"),
        ({"tokens": "spatial"}, r"tokens='spatial' needs feature_shape=\(C, H, W\)"),
        ({"tokens": "spatial", "feature_shape": (4, 2, 2), "reduce_dim": 4}, "reduces with reduce='conv1x1' if at all"),
        ({"reduce_dim": 4, "reduce": "pool"}, "reduce must be one of linear, conv1x1, got 'pool'"),
        (
            {"feature_shape": (4, 2, 3)},
            r"feature_shape must be \(C, H, W\) with C\*H\*W = feature_dim = 16, got \(4, 2, 3\)",
        ),
        ({"feature_shape": (4, 4)}, r"feature_shape must be \(C, H, W\)"),
        ({"reduce": "conv1x1", "feature_shape": (4, 2, 2)}, "got reduce_dim=None"),
        ({"hinge": "elu"}, "hinge must be one of relu, softplus, identity, got 'elu'"),
        ({"min_samples": 1}, "min_samples must be at least 2, got 1"),
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


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.randn(4, 15), torch.zeros(4, dtype=torch.long), r"features must have shape \[B, D=16\]"),
        (torch.randn(4, 2, 8), torch.zeros(4, dtype=torch.long), r"got \[4, 2, 8\]"),
        (torch.randn(4, 16), torch.zeros(3, dtype=torch.long), r"labels must have shape \[B=4\], got \[3\]"),
        (torch.randn(4, 16), torch.full((4,), 5), r"labels must lie in \[0, 5\)"),
    ],
)
def test_bad_batch_is_refused(features, labels, message):
    with pytest.raises(ValueError, match=message):
        surrogate()(features, labels)


@pytest.mark.parametrize("num_classes", [5, None])
@pytest.mark.parametrize(
    ("features", "labels", "unique", "message"),
    [
        (torch.ones(4, 16, dtype=torch.long), torch.zeros(4, dtype=torch.long), None, "features must be a floating"),
        (torch.randn(4, 16), torch.zeros(4), None, "labels must be an integer tensor, got torch.float32"),
        (
            torch.randn(4, 16),
            torch.zeros(4, dtype=torch.bool),
            None,
            "labels must be an integer tensor, got torch.bool",
        ),
        (torch.randn(4, 16), [0, 0, 1, 1], None, "labels must be an integer tensor, got list"),
        (torch.randn(4, 16), torch.zeros(4, dtype=torch.long), torch.zeros(1), "unique_labels must be an integer"),
    ],
)
def test_batch_of_wrong_types_is_refused(features, labels, unique, message, num_classes):
    with pytest.raises(TypeError, match=message):
        surrogate(num_classes=num_classes)(features, labels, unique)


def test_unique_labels_out_of_range_are_refused():
    features, labels = batch()
    with pytest.raises(ValueError, match=r"unique_labels must lie in \[0, 5\), got values from 1 to 99"):
        surrogate()(features, labels, torch.tensor([1, 99]))


def test_maps_of_another_layout_are_refused():
    module = surrogate(reduce_dim=2, reduce="conv1x1", feature_shape=(4, 2, 2))
    with pytest.raises(ValueError, match=r"\[B, D=16\] or \[B, 4, 2, 2\], got \[3, 2, 2, 4\]"):
        module(torch.randn(3, 2, 2, 4), torch.zeros(3, dtype=torch.long))


def test_slot_noise_of_wrong_shape_is_refused():
    features, labels = batch()
    with pytest.raises(ValueError, match=r"slot_noise must have shape \[K, S, D\] = \[5, 4, 16\], got \[4, 16\]"):
        surrogate()(features, labels, slot_noise=torch.randn(4, 16))


@pytest.mark.parametrize("kwargs", [{}, {"reduce_dim": 8}])
def test_bf16_features_keep_their_spread(kwargs):
    features, labels = batch(200)
    center = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    narrow = (center[labels] + 0.05 * features).bfloat16()  # what is left inside a class when training succeeds
    module = surrogate(hinge="identity", **kwargs).eval()
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        x = narrow.to(dtype, copy=True).requires_grad_()
        module(x, labels)[0].backward()
        gradients.append(x.grad.float())
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.005  # bf16 rounds by 0.4 %


@pytest.mark.parametrize("kwargs", [{}, {"reduce_dim": 8}])
def test_autocast_changes_nothing(kwargs):
    features, labels = batch()
    module = surrogate(**kwargs).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(features, labels)
    assert torch.equal(found[0], module(features, labels)[0])


@pytest.mark.parametrize("kwargs", [{}, {"reduce_dim": 8}])
def test_fp64_features_meet_fp32_parameters_with_an_error(kwargs):
    features, labels = batch()
    with pytest.raises(TypeError, match="fp64 does not mix"):
        surrogate(**kwargs)(features.double(), labels)


def test_bf16_module_gives_fp32_losses():
    features, labels = batch()
    rob_loss, _ = surrogate().bfloat16()(features.bfloat16(), labels)
    assert rob_loss.dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_infinite_sample_alone_in_its_class_leaves_the_losses_alone(backend):
    features, labels = batch()
    labels = labels.clamp(max=3)
    labels[0] = 4
    want = surrogate(backend=backend).eval()
    poisoned = features.clone()
    poisoned[0] = float("inf")
    torch.testing.assert_close(want(poisoned, labels), want(features, labels))


def test_build_reduces_wide_features_only_and_only_for_attention():
    common = {"num_classes": 5, "noise_std": 0.1, "var_threshold": 0.1}
    assert build_surrogate("attention", feature_shape=(1024,), **common).reduction is None
    common |= {"measure": "enhanced", "anchor": 0.0}
    assert build_surrogate("attention", feature_shape=(8, 8, 8), **common).reduction is None
    assert build_surrogate("attention", feature_shape=(16, 8, 8), **common).reduction.weight.shape == (
        128,
        1024,
    )
    assert build_surrogate("attention", feature_shape=(1024,), reduce_dim=0, **common).reduction is None
    assert build_surrogate("attention", feature_shape=(512,), reduce_dim=64, **common).reduction.out_features == 64


def test_build_takes_any_width():
    common = {"num_classes": 5, "noise_std": 0.1, "var_threshold": 0.1}
    heads = [
        build_surrogate(
            "attention", feature_shape=(width,), measure="enhanced", anchor=0.0, **common
        ).cross_attention.num_heads
        for width in (9, 10, 12)
    ]
    assert heads == [1, 2, 4]


def test_build_refuses_a_backend_that_nothing_would_use():
    common = {"num_classes": 5, "noise_std": 0.1, "var_threshold": 0.1}
    with pytest.raises(BackendUnavailableError, match="the gmm surrogate has no 'triton' backend"):
        build_surrogate("gmm", feature_shape=(8,), backend="triton", **common)


def test_build_makes_the_three_choices_and_refuses_others():
    common = {"feature_shape": (8, 2, 2), "num_classes": 5, "noise_std": 0.1, "var_threshold": 0.1}
    assert isinstance(build_surrogate("attention", **common), cem.SlotCrossAttentionCEM)
    assert isinstance(build_surrogate("gmm", **common), cem.GaussianMixtureCEM)
    assert isinstance(build_surrogate("none", **common), cem.NoSurrogate)
    assert build_surrogate("gmm", gmm_fit="full", **common).fit == "full"
    assert build_surrogate("gmm", sigmoid=True, **common).num_clusters == 5
    with pytest.raises(ValueError, match="surrogate must be one of attention, gmm, none, got 'pca'"):
        build_surrogate("pca", **common)


def test_no_surrogate_is_a_zero_whose_gradient_is_zero_even_for_nan():
    features = torch.full((3, 4), float("nan"), requires_grad=True)
    rob_loss, _ = cem.NoSurrogate()(features, torch.zeros(3, dtype=torch.long))
    rob_loss.backward()
    assert rob_loss.item() == 0
    assert torch.equal(features.grad, torch.zeros(3, 4))


@pytest.mark.slow
def test_eager_compiles_as_one_graph_under_a_static_bound():
    features, labels = batch()
    module = surrogate(max_class_size=24, backend="eager").eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, y = features.clone().requires_grad_(), features.clone().requires_grad_()
    found, want = compiled(x, labels), module(y, labels)
    torch.testing.assert_close(found, want)
    sum(found).backward()
    sum(want).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_spatial_tokens_are_the_positions_of_a_map():
    features, labels = batch(width=4 * 6)
    maps = features.view(24, 4, 2, 3)
    spatial = surrogate(24, tokens="spatial", feature_shape=(4, 2, 3), num_heads=2, hinge="identity").eval()
    assert spatial.slot_attention.slot_dim == 4
    # The same positions in another order are the same tokens, and so are features that come flat.
    turned = surrogate(24, tokens="spatial", feature_shape=(4, 3, 2), num_heads=2, hinge="identity").eval()
    turned.load_state_dict(spatial.state_dict())
    torch.testing.assert_close(turned(maps.transpose(2, 3).contiguous(), labels), spatial(maps, labels))
    torch.testing.assert_close(spatial(features, labels), spatial(maps, labels))


def test_spatial_tokens_of_one_position_are_flat_ones():
    features, labels = batch()
    flat = surrogate().eval()
    spatial = surrogate(tokens="spatial", feature_shape=(16, 1, 1)).eval()
    spatial.load_state_dict(flat.state_dict())
    assert spatial(features, labels) == flat(features, labels)


def test_spatial_tokens_after_conv1x1_are_as_wide_as_its_channels():
    features, labels = batch(width=8 * 4)
    sizes = {"reduce": "conv1x1", "feature_shape": (8, 2, 2), "num_heads": 2}
    module = surrogate(32, tokens="spatial", reduce_dim=6, **sizes)
    assert module.slot_attention.slot_dim == 6
    assert all(loss.isfinite() for loss in module(features, labels))


def test_normalization_is_layer_norm_and_its_derivatives():
    x = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mT.requires_grad_()
    torch.testing.assert_close(Normalized.apply(x)[0], torch.nn.functional.layer_norm(x, (7,)))
    assert torch.autograd.gradcheck(lambda x: Normalized.apply(x)[0], x)
    assert torch.autograd.gradcheck(Normalized.apply, x)
    assert torch.autograd.gradgradcheck(lambda x: Normalized.apply(x)[0], x)
