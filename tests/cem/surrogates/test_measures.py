"""What the attention surrogate measures, what trains it, what it remembers, and how it is built from options."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import cem
import cem_kernels
from cem.surrogates.build import build_surrogate
from cem.surrogates.modules import Normalised
from cem.training.injection import penalty_of
from cem_kernels import BackendUnavailableError, ClassGroups

ORIGINAL = {"measure": "enhanced", "num_slots": 8, "anchor": 0.0, "eps_var": 1e-4, "gamma": 1e-6}
COMMON = {"num_classes": 5, "noise_std": 0.5, "var_threshold": 0.1}
MEASURES = pytest.mark.parametrize("measure", ["enhanced", "slots"])
PENALTIES = [(measure, penalty) for measure in ("enhanced", "slots") for penalty in ("hinge", "entropy")]
PENALTIES.append(("slots", "joint_entropy"))
OBJECTIVES = pytest.mark.parametrize("objective", ["likelihood", "reconstruction"])


def surrogate(feature_dim=16, **kwargs):
    """Its slots differ, and a token clearly belongs to some of them more than to others."""
    kwargs = {"num_slots": 4, "reg_strength": 0.5, "num_classes": 5, **kwargs}
    torch.manual_seed(0)
    module = cem.SlotCrossAttentionCEM(feature_dim, **kwargs)
    if module.slot_attention is not None:
        with torch.no_grad():
            module.slot_attention.to_q.weight.mul_(30)
    return module


def batch(num_samples=24, width=16, num_classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, width, generator=generator)
    return features, torch.randint(0, num_classes, (num_samples,), generator=generator)


def draw(width=16, num_classes=5, num_slots=4, seed=7):
    """The slots' noise, for calls in training that are compared."""
    return torch.randn(num_classes, num_slots, width, generator=torch.Generator().manual_seed(seed))


def gradient_of(module, features, labels, **kwargs):
    """``rob_loss``, and its gradient to the features."""
    x = features.detach().clone().requires_grad_()
    loss = module(x, labels, **kwargs)[0]
    return loss, torch.autograd.grad(loss, x)[0]


def slots_by_hand(module, tokens, labels, raw=None, noise=None, **options):
    """The measure of slots of ``tokens``, from the parts; ``raw`` is what is sent, if that is another."""
    groups = ClassGroups.from_labels(labels, 5)
    with torch.no_grad():
        normal = F.layer_norm(tokens, tokens.shape[-1:])
        slots = module.slot_attention(normal, groups, noise)
        attention = cem_kernels.slot_assignments(normal, slots, groups, module.slot_attention.weights())
    assert float(attention.amax(2).mean()) > 0.4  # of 4 slots
    sent = tokens if raw is None else raw
    return cem_kernels.slot_variance(sent, attention, groups, **{"threshold": 0.1 * 0.5**2, **options})


# measure


def test_slots_need_no_cross_attention():
    enhanced, slots = set(surrogate().state_dict()), set(surrogate(measure="slots").state_dict())
    assert slots == {name for name in enhanced if name.startswith("slot_attention.")}
    assert slots < enhanced


def test_enhanced_is_the_default():
    features, labels = batch()
    assert surrogate(measure="enhanced").eval()(features, labels) == surrogate().eval()(features, labels)


@pytest.mark.parametrize("hinge", ["relu", "softplus", "identity"])
def test_slots_measure_features_as_they_are_around_the_centroids_of_slots(hinge):
    features, labels = batch()
    module = surrogate(measure="slots", hinge=hinge).eval()
    x = features.clone().requires_grad_()
    want = slots_by_hand(module, x[:, None], labels, hinge=hinge)
    loss, gradient = gradient_of(module, features, labels)
    torch.testing.assert_close(loss, want.rob_loss)
    torch.testing.assert_close(module(features, labels)[1], want.intra_mse)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.rob_loss, x)[0])


def test_slots_follow_the_noise_that_is_given():
    features, labels = batch()
    module = surrogate(measure="slots").train()
    loss = module(features, labels, slot_noise=draw())[0]
    assert loss.item() == pytest.approx(slots_by_hand(module, features[:, None], labels, noise=draw()).rob_loss.item())
    assert loss.item() != pytest.approx(module(features, labels, slot_noise=draw(seed=8))[0].item())


def test_slots_obey_threshold_floor_and_least_number_of_samples():
    features, labels = batch()
    numbers = {"eps_var": 0.3, "gamma": 0.2, "min_samples": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the floor swamps the threshold
        module = surrogate(measure="slots", **numbers, threshold="fixed", threshold_value=0.2).eval()
    want = slots_by_hand(module, features[:, None], labels, threshold=0.2, **numbers).rob_loss
    assert module(features, labels)[0].item() == pytest.approx(want.item())
    assert 0 < (labels.bincount() < 5).sum() < 5


def test_slots_tell_two_clusters_of_a_class_apart_from_one():
    generator = torch.Generator().manual_seed(0)
    spread = 0.1 * torch.randn(40, 16, generator=generator)
    labels = torch.zeros(40, dtype=torch.int64)
    two = torch.randn(2, 16, generator=generator)[torch.arange(40) % 2]
    module = surrogate(measure="slots", hinge="identity").eval()
    apart = module(two + spread, labels)[0].item()
    variance = (two + spread).var(0)
    around_the_mean = torch.log((variance + 1e-6) / (0.025 + 1e-6)).mean().item()
    assert apart < around_the_mean - 0.5


def test_slots_know_how_large_features_are_against_the_noise():
    features, labels = batch()
    module = surrogate(measure="slots", hinge="identity").eval()
    near, far = (module(scale * features, labels)[0].item() for scale in (1, 10))
    assert far - near == pytest.approx(2 * math.log(10), abs=1e-3)


def test_enhanced_does_not_know_how_large_features_are():
    features, labels = batch()
    module = surrogate(hinge="identity").eval()
    near, far = (module(scale * features, labels)[0].item() for scale in (1, 10))
    assert far == pytest.approx(near, abs=1e-3)


def test_slots_are_lowered_by_gradient_descent_on_the_features():
    features, labels = batch()
    module = surrogate(measure="slots").eval()
    before = module(features, labels)[0].item()
    x = features.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        module(x, labels)[0].backward()
        optimizer.step()
    assert module(x, labels)[0].item() < 0.5 * before


def test_slots_pass_no_gradient_to_their_parameters():
    features, labels = batch()
    module = surrogate(measure="slots").train()
    penalty = penalty_of(module, features, labels)
    assert not any(gradient.any() for gradient in penalty.grads)
    assert penalty.z_grad.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("penalty", ["hinge", "entropy", "joint_entropy"])
def test_slots_of_eager_equal_those_of_reference(training, penalty):
    features, labels = batch()
    results = []
    for backend in ("eager", "reference"):
        module = surrogate(measure="slots", penalty=penalty, backend=backend).double().train(training)
        x = features.double().requires_grad_()
        rob_loss, intra_mse = module(x, labels, slot_noise=draw().double())
        results.append([rob_loss, intra_mse, torch.autograd.grad(rob_loss + intra_mse, x)[0]])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_slots_repeat_exactly_in_evaluation_and_survive_a_reload():
    features, labels = batch()
    module, other = (
        surrogate(measure="slots").eval(),
        cem.SlotCrossAttentionCEM(16, num_slots=4, reg_strength=0.5, num_classes=5, measure="slots").eval(),
    )
    other.load_state_dict(module.state_dict(), strict=True)
    assert module(features, labels) == module(features, labels)
    assert module(features, labels) == other(features, labels)


def test_slots_are_drawn_afresh_in_training():
    features, labels = batch()
    module = surrogate(measure="slots").train()
    assert not torch.equal(module(features, labels)[0], module(features, labels)[0])


def test_slots_of_spatial_tokens_belong_to_positions():
    features, labels = batch(width=4 * 6)
    maps = features.view(24, 4, 2, 3)
    module = surrogate(24, measure="slots", tokens="spatial", feature_shape=(4, 2, 3), num_heads=2).eval()
    tokens = maps.flatten(2).mT  # [B, 6 positions, 4 channels]
    want = slots_by_hand(module, tokens, labels)
    torch.testing.assert_close(module(maps, labels), (want.rob_loss, want.intra_mse))
    torch.testing.assert_close(module(features, labels), (want.rob_loss, want.intra_mse))


def test_slots_of_spatial_tokens_of_one_position_are_flat_ones():
    features, labels = batch()
    flat = surrogate(measure="slots").eval()
    spatial = surrogate(measure="slots", tokens="spatial", feature_shape=(16, 1, 1)).eval()
    spatial.load_state_dict(flat.state_dict(), strict=True)
    assert spatial(features, labels) == flat(features, labels)


def test_slots_of_spatial_tokens_after_conv1x1_are_as_wide_as_its_channels():
    features, labels = batch(width=8 * 4)
    sizes = {"reduce": "conv1x1", "reduce_dim": 6, "feature_shape": (8, 2, 2)}
    module = surrogate(32, measure="slots", tokens="spatial", **sizes).eval()
    assert module.slot_attention.slot_dim == 6
    tokens = torch.einsum("oc,bchw->bhwo", module.reduction.weight[:, :, 0, 0], features.view(24, 8, 2, 2)).flatten(
        1, 2
    )
    raw = features.view(24, 8, 4).mT
    assert module(features, labels)[0].item() == pytest.approx(
        slots_by_hand(module, tokens, labels, raw).rob_loss.item()
    )


def test_slots_without_a_class_of_enough_samples_give_an_attached_zero():
    features = torch.randn(4, 16, requires_grad=True)
    rob_loss, intra_mse = surrogate(measure="slots")(features, torch.arange(4))
    assert (rob_loss.item(), intra_mse.item()) == (0, 0)
    rob_loss.backward()
    assert not features.grad.any()


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("num_classes", [5, None])
def test_slots_of_an_empty_batch_give_zero(num_classes, backend):
    features = torch.randn(0, 16, requires_grad=True)
    module = surrogate(measure="slots", num_classes=num_classes, backend=backend)
    rob_loss, _ = module(features, torch.zeros(0, dtype=torch.int64))
    assert rob_loss.item() == 0
    rob_loss.backward()


def test_slots_leave_an_infinite_sample_alone_in_its_class_out():
    features, labels = batch()
    labels = labels.clamp(max=3)
    labels[0] = 4
    module = surrogate(measure="slots").eval()
    want = gradient_of(module, features, labels)
    features[0] = math.inf
    torch.testing.assert_close(gradient_of(module, features, labels), want)


def test_slots_read_classes_off_the_labels_without_num_classes():
    features, labels = batch()
    known, unknown = surrogate(measure="slots").eval(), surrogate(measure="slots", num_classes=None).eval()
    names = torch.tensor([100, -3, 7, 2_000_000_000, 5])
    torch.testing.assert_close(unknown(features, names[labels]), known(features, labels))


def test_slots_do_not_change_under_autocast():
    features, labels = batch()
    module = surrogate(measure="slots").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(features, labels)
    assert found == module(features, labels)


def test_slots_of_bf16_features_keep_their_spread():
    features, labels = batch(200)
    centre = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    narrow = (centre[labels] + 0.05 * features).bfloat16()
    module = surrogate(measure="slots", hinge="identity").eval()
    found, want = (
        gradient_of(module, narrow.to(dtype), labels)[1].float() for dtype in (torch.bfloat16, torch.float32)
    )
    assert float((found - want).norm() / want.norm()) < 0.005  # bf16 rounds by 0.4 %


@pytest.mark.slow
def test_slots_compile_as_one_graph_under_a_static_bound():
    features, labels = batch()
    module, other = (
        surrogate(measure="slots", max_class_size=24, memory_bank=3, backend="eager").train() for _ in range(2)
    )
    for each in (module, other):
        each.bank.remember(*batch(seed=1))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        gradient_of(compiled, features, labels, slot_noise=draw()),
        gradient_of(other, features, labels, slot_noise=draw()),
    )
    assert torch.equal(module.bank.features, other.bank.features)


def test_slots_of_a_reduction_know_how_large_features_themselves_are_against_the_noise():
    features, _ = batch(400, width=64)
    labels = torch.zeros(400, dtype=torch.int64)
    whole, reduced = (
        surrogate(64, measure="slots", penalty="entropy", **kwargs).eval()(features, labels)[0].item()
        for kwargs in ({"num_slots": 1}, {"num_slots": 2, "reduce_dim": 32})
    )
    assert reduced == pytest.approx(whole, rel=0.1)


# penalty


def test_entropy_is_the_nats_that_cross_the_noise():
    features = batch(50)[0] * torch.linspace(0.01, 3, 16)
    module = surrogate(measure="slots", penalty="entropy", num_slots=1, reg_strength=0.7).eval()
    by_hand = 0.5 * torch.log(1 + features.var(dim=0, unbiased=True) / 0.7**2).mean()
    rob_loss, intra_mse = module(features, torch.zeros(50, dtype=torch.int64))
    assert rob_loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert intra_mse.item() == pytest.approx(features.var(dim=0, unbiased=False).mean().item(), rel=1e-5)


def test_entropy_of_enhanced_features_is_that_of_the_same_formula():
    features, labels = batch()
    module = surrogate(penalty="entropy").eval()
    groups = ClassGroups.from_labels(labels, 5)
    normal = F.layer_norm(features[:, None], (16,))
    enhanced = module.cross_attention(normal, module.slot_attention(normal, groups), groups)[:, 0]
    nats = [0.5 * torch.log(1 + enhanced[labels == c].var(dim=0) / 0.5**2).mean() for c in range(5)]
    want = sum(n * count for n, count in zip(nats, labels.bincount(minlength=5), strict=True)) / len(labels)
    assert module(features, labels)[0].item() == pytest.approx(want.item(), rel=1e-4)


@MEASURES
def test_entropy_of_identical_samples_is_zero(measure):
    features = batch(1)[0].expand(10, 16)
    module = surrogate(measure=measure, penalty="entropy").eval()
    assert module(features, torch.zeros(10, dtype=torch.int64))[0].item() == pytest.approx(0, abs=1e-6)


def test_entropy_has_no_floor():
    features = 1e-4 * batch(50)[0]  # variances of 1e-8, far below eps_var
    module = surrogate(measure="slots", penalty="entropy", num_slots=1, reg_strength=1e-4).eval()
    loss, gradient = gradient_of(module, features, torch.zeros(50, dtype=torch.int64))
    assert loss.item() == pytest.approx(0.5 * math.log(2), rel=0.1)
    assert bool((gradient != 0).all())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"reg_strength": 0.0},
        {"threshold": "fixed"},
        {"threshold": "ramp"},
        {"threshold": "quantile"},
        {"hinge": "softplus"},
        {"hinge": "identity"},
    ],
)
@pytest.mark.parametrize("penalty", ["entropy", "joint_entropy"])
def test_entropy_is_refused_without_noise_and_with_what_it_does_not_have(kwargs, penalty):
    message = f"penalty='{penalty}' needs reg_strength above 0, and has neither a threshold nor a hinge, got reg_str"
    with pytest.raises(ValueError, match=message):
        surrogate(measure="slots", penalty=penalty, **kwargs)


def test_joint_entropy_is_that_of_features_around_the_slots_they_belong_to():
    features, labels = batch()
    module = surrogate(measure="slots", penalty="joint_entropy", reg_strength=0.7).eval()
    normal, _ = Normalised.apply(features[:, None])
    groups = ClassGroups.from_labels(labels, 5)
    slots = module.slot_attention(normal, groups)
    attention = cem_kernels.slot_assignments(normal, slots, groups, module.slot_attention.weights())
    want = cem_kernels.joint_entropy(features[:, None], attention, groups, noise_std=0.7)
    torch.testing.assert_close(module(features, labels), tuple(want))


def test_one_slot_is_the_class_and_has_no_parameters():
    features, labels = batch()
    module = surrogate(measure="slots", num_slots=1)
    groups = ClassGroups.from_labels(labels, 5)
    want = cem_kernels.class_variance(features, groups, threshold=module.threshold())
    assert list(module.parameters()) == []
    torch.testing.assert_close(module(features, labels), (want.rob_loss, want.intra_mse))


def test_joint_entropy_of_normalised_features_is_refused():
    with pytest.raises(ValueError, match="penalty='joint_entropy' needs measure='slots'"):
        surrogate(penalty="joint_entropy")


def test_joint_entropy_has_no_kernels():
    with pytest.raises(cem_kernels.BackendUnavailableError, match="joint_entropy has no 'triton' backend"):
        surrogate(measure="slots", penalty="joint_entropy", backend="triton")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"measure": "slot"}, "measure must be one of enhanced, slots, got 'slot'"),
        ({"penalty": "log"}, "penalty must be one of hinge, entropy, joint_entropy, got 'log'"),
        ({"objective": "ml"}, "objective must be one of penalty, likelihood, reconstruction, got 'ml'"),
    ],
)
def test_unknown_name_is_refused_with_the_choices(kwargs, message):
    with pytest.raises(ValueError, match=message):
        surrogate(**kwargs)


def test_slots_refuse_a_backend_that_they_do_not_have():
    with pytest.raises(BackendUnavailableError, match="slot_variance has no 'triton' backend"):
        surrogate(measure="slots", backend="triton")


# objective


@MEASURES
def test_penalty_is_no_loss_of_its_own(measure):
    assert surrogate(measure=measure).own_loss(*batch()) is None


def test_other_surrogates_have_no_loss_of_their_own():
    assert cem.NoSurrogate().own_loss(*batch()) is None


@pytest.mark.parametrize("kwargs", [{}, {"tokens": "spatial", "feature_shape": (4, 2, 2)}])
def test_likelihood_is_that_of_slots_as_centres_of_unit_gaussians(kwargs):
    features, labels = batch()
    module = surrogate(objective="likelihood", **kwargs).eval()
    tokens = features.view(24, 4, 4).mT if kwargs else features[:, None]
    normal = F.layer_norm(tokens, tokens.shape[-1:])
    slots = module.slot_attention(normal, ClassGroups.from_labels(labels, 5))
    width = tokens.shape[-1]
    gaussians = torch.distributions.MultivariateNormal(slots[labels][:, None], torch.eye(width))  # [B, 1, S]
    mixture = gaussians.log_prob(normal[:, :, None]).exp().mean(dim=2).log().mean()
    want = -(mixture + width / 2 * math.log(2 * math.pi)) / width
    assert module.own_loss(features, labels).item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"tokens": "spatial", "feature_shape": (4, 2, 2)}])
def test_reconstruction_is_the_squared_distance_to_what_slots_make_of_a_sample(kwargs):
    features, labels = batch()
    module = surrogate(objective="reconstruction", **kwargs).eval()
    tokens = features.view(24, 4, 4).mT if kwargs else features[:, None]
    normal, groups = F.layer_norm(tokens, tokens.shape[-1:]), ClassGroups.from_labels(labels, 5)
    slots = module.slot_attention(normal, groups)
    attention = cem_kernels.slot_assignments(normal, slots, groups, module.slot_attention.weights())
    made = torch.einsum("nts,nsd->ntd", attention, slots[labels])
    assert module.own_loss(features, labels).item() == pytest.approx((made - normal).square().mean().item(), rel=1e-5)


@OBJECTIVES
def test_own_loss_does_not_know_how_large_features_are(objective):
    features, labels = batch()
    module = surrogate(objective=objective).eval()
    near, far = (module.own_loss(scale * features, labels).item() for scale in (1, 10))
    assert far == pytest.approx(near, abs=1e-3)


@OBJECTIVES
@pytest.mark.parametrize("kwargs", [{}, {"reduce_dim": 8}])
def test_own_loss_gives_neither_features_nor_their_reduction_a_gradient(objective, kwargs):
    features, labels = batch()
    module = surrogate(objective=objective, **kwargs)
    x = features.requires_grad_()
    module.own_loss(x, labels).backward()
    assert x.grad is None
    trained = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in trained} == {"slot_attention"}
    assert {"slot_attention.slot_mu", "slot_attention.to_q.weight"} <= trained


@OBJECTIVES
@MEASURES
def test_own_loss_is_lowered_by_adam_on_the_parameters(objective, measure):
    features, labels = batch(60)
    module = surrogate(objective=objective, measure=measure).eval()
    before = module.own_loss(features, labels).item()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        module.own_loss(features, labels).backward()
        optimizer.step()
    assert module.own_loss(features, labels).item() < before - 0.05


@OBJECTIVES
@MEASURES
def test_a_step_trains_parameters_on_their_own_loss_and_features_on_the_penalty(objective, measure):
    features, labels = batch()
    module = surrogate(objective=objective, measure=measure).eval()
    penalty = penalty_of(module, features, labels)
    loss, gradient = gradient_of(module, features, labels)
    own = torch.autograd.grad(
        module.own_loss(features, labels), list(module.parameters()), allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(penalty.z_grad, gradient)
    torch.testing.assert_close(penalty.grads, list(own))
    assert penalty.rob_loss.item() == pytest.approx(loss.item())
    assert penalty.finite


@OBJECTIVES
def test_an_objective_changes_neither_the_penalty_nor_its_gradient(objective):
    features, labels = batch()
    found = gradient_of(surrogate(objective=objective).eval(), features, labels)
    torch.testing.assert_close(found, gradient_of(surrogate().eval(), features, labels))


@OBJECTIVES
def test_a_frozen_surrogate_has_no_use_for_its_own_loss(objective):
    module = surrogate(objective=objective).requires_grad_(False)
    module.own_loss = None  # not even called
    assert penalty_of(module, *batch()).grads == []


@OBJECTIVES
def test_own_loss_reads_classes_off_the_labels_without_num_classes(objective):
    features, labels = batch()
    known, unknown = surrogate(objective=objective).eval(), surrogate(objective=objective, num_classes=None).eval()
    names = torch.tensor([100, -3, 7, 2_000_000_000, 5])
    torch.testing.assert_close(unknown.own_loss(features, names[labels]), known.own_loss(features, labels))


@OBJECTIVES
def test_own_loss_of_an_empty_batch_is_zero(objective):
    module = surrogate(objective=objective)
    assert module.own_loss(torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64)).item() == 0


@OBJECTIVES
def test_own_loss_leaves_classes_of_too_few_samples_out(objective):
    features, labels = batch()
    module = surrogate(objective=objective, min_samples=5).eval()
    counted = (labels.bincount() >= 5)[labels]
    assert 0 < counted.sum() < 24
    found, want = module.own_loss(features, labels), module.own_loss(features[counted], labels[counted])
    torch.testing.assert_close(found, want)


@OBJECTIVES
def test_own_loss_leaves_an_infinite_sample_alone_in_its_class_out(objective):
    features, labels = batch()
    labels = labels.clamp(max=3)
    labels[0] = 4
    features[0] = math.inf
    assert penalty_of(surrogate(objective=objective, measure="slots"), features, labels).finite


@OBJECTIVES
def test_own_loss_does_not_change_under_autocast(objective):
    features, labels = batch()
    module = surrogate(objective=objective).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module.own_loss(features, labels)
    assert found == module.own_loss(features, labels)


# memory


def remembering(size=6, **kwargs):
    return surrogate(memory_bank=size, **kwargs).train()


def same_without_memory(module, **kwargs):
    other = surrogate(**kwargs).to(module.slot_attention.slot_mu).train()
    other.load_state_dict({name: value for name, value in module.state_dict().items() if "bank" not in name})
    return other


def test_memory_is_off_by_default_and_then_not_in_the_state_dict():
    assert not [name for name in surrogate().state_dict() if "bank" in name]
    assert {name for name in remembering().state_dict() if "bank" in name} == {"bank.features", "bank.written"}


@pytest.mark.parametrize("kwargs", [{"memory_bank": 4, "num_classes": None}, {"memory_bank": -1}])
def test_memory_of_unknown_classes_or_a_negative_size_is_refused(kwargs):
    with pytest.raises(ValueError, match="memory_bank must be at least 0, and needs num_classes, got"):
        surrogate(**kwargs)


def test_memory_holds_what_is_measured_before_it_is_normalised():
    features, labels = batch(10)
    module = remembering()
    module(features, labels)
    assert module.bank.written.tolist() == labels.bincount(minlength=5).tolist()
    for c in range(5):
        held = module.bank.features[c, : (labels == c).sum()]
        assert torch.equal(held, features[labels == c])


def test_memory_holds_features_before_they_are_reduced():
    features, labels = batch(10)
    module = remembering(reduce_dim=8)
    module(features, labels)
    c = int(labels[0])
    torch.testing.assert_close(module.bank.features[c, 0], features[0])


@MEASURES
def test_memory_is_neither_filled_nor_used_in_evaluation(measure):
    features, labels = batch()
    module = remembering(measure=measure)
    module(*batch(seed=1))
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = module(features, labels)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert found == same_without_memory(module, measure=measure).eval()(features, labels)


@pytest.mark.parametrize(("measure", "penalty"), PENALTIES)
def test_memory_changes_nothing_in_the_first_batch(measure, penalty):
    features, labels = batch()
    module = remembering(measure=measure, penalty=penalty).double()
    other = same_without_memory(module, measure=measure, penalty=penalty)
    found, want = (gradient_of(each, features.double(), labels, slot_noise=draw().double()) for each in (module, other))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


@MEASURES
def test_memory_lets_a_class_with_one_sample_count(measure):
    features, labels = batch(5)[0], torch.arange(5)
    module = remembering(measure=measure)
    assert module(features, labels)[0].item() == 0
    loss, gradient = gradient_of(module, batch(5, seed=1)[0], labels)
    assert loss.item() > 0
    assert bool(gradient.any(dim=1).all())


def test_memory_measures_the_batch_together_with_what_came_before():
    (old, old_labels), (new, new_labels) = batch(15, seed=1), batch(15, seed=2)
    module = remembering(15, measure="slots")
    module(old, old_labels)
    found = module(new, new_labels, slot_noise=draw())
    together = slots_by_hand(module, torch.cat((new, old))[:, None], torch.cat((new_labels, old_labels)), noise=draw())
    share = new_labels.bincount(minlength=5) / 15  # those of the batch alone
    want = (share * together.class_penalty).sum(), (share * together.class_mse).sum()
    torch.testing.assert_close(found, want)


@MEASURES
def test_memory_of_classes_that_are_not_in_the_batch_changes_nothing(measure):
    features, labels = batch()
    module = remembering(measure=measure).double()
    other = same_without_memory(module, measure=measure)
    old, old_labels = batch(30, seed=3)
    module.bank.remember(100 * old.double(), old_labels)
    module.bank.written[:3] = 0  # only classes 3 and 4 are remembered, and only the others come
    features, labels = features[labels < 3].double(), labels[labels < 3]
    found, want = (gradient_of(each, features, labels, slot_noise=draw().double()) for each in (module, other))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(("measure", "penalty"), PENALTIES)
def test_memory_weakens_no_gradient(measure, copies, penalty):
    """Where it holds copies of the batch: the gradient is that of a batch in which all of these are alive."""
    features, labels = batch(10)[0].double(), torch.arange(10) % 5
    noise = draw().double()
    module = remembering(2 * copies, measure=measure, penalty=penalty).double()
    for _ in range(copies + 2):  # the oldest are overwritten
        module.bank.remember(features, labels)
    x = features.clone().requires_grad_()
    alive = same_without_memory(module, measure=measure, penalty=penalty)
    want = alive(x.repeat(copies + 1, 1), labels.repeat(copies + 1), slot_noise=noise)[0]
    loss, gradient = gradient_of(module, features, labels, slot_noise=noise)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, x)[0])
    assert bool(gradient.any())


def test_gradients_of_a_sample_do_not_depend_on_the_size_of_the_memory():
    """Of one sample among any number of remembered ones: ``2 (x − μ) / v`` a column, over the batch."""
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for size in (20, 2000):
        module = remembering(size, measure="slots", num_slots=1, hinge="identity", num_classes=1)
        module.bank.remember(torch.randn(size, 16, generator=generator), torch.zeros(size, dtype=torch.int64))
        gradient = gradient_of(module, torch.full((1, 16), 3.0), torch.zeros(1, dtype=torch.int64))[1]
        sizes.append(gradient.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.5)
    assert sizes[1] == pytest.approx(2 * 3 / 16 * math.sqrt(16), rel=0.2)


@MEASURES
def test_memory_passes_over_an_infinite_sample_alone_in_its_class(measure):
    features, labels = batch()
    labels = labels.clamp(max=3)
    labels[0] = 4
    module = remembering(measure=measure)
    other = same_without_memory(module, measure=measure)
    poisoned = features.clone()
    poisoned[0] = math.inf
    torch.testing.assert_close(module(poisoned, labels, slot_noise=draw()), other(features, labels, slot_noise=draw()))
    assert module.bank.written[4] == 0
    assert bool(module.bank.features.isfinite().all())
    assert all(loss.isfinite() for loss in module(features, labels))


def test_an_infinite_sample_alone_in_its_class_gets_no_gradient_and_spoils_no_other():
    features, labels = batch()
    labels = labels.clamp(max=3)
    labels[0] = 4
    module = remembering(measure="slots")
    want = gradient_of(module, features, labels, slot_noise=draw())[1]
    features[0] = math.inf
    found = gradient_of(remembering(measure="slots"), features, labels, slot_noise=draw())[1]
    torch.testing.assert_close(found, want)


@MEASURES
def test_memory_continues_exactly_from_a_state_dict(measure):
    module, other = remembering(measure=measure), remembering(measure=measure)
    for seed in (1, 2):
        module(*batch(seed=seed))
    other.load_state_dict(module.state_dict(), strict=True)
    for seed in (3, 4):
        found, want = (each(*batch(seed=seed), slot_noise=draw()) for each in (other, module))
        assert found == want
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in other.state_dict().items())


@MEASURES
def test_memory_of_spatial_tokens_holds_maps(measure):
    (old, old_labels), (new, new_labels) = batch(12, seed=1), batch(12, seed=2)
    kwargs = {"measure": measure, "tokens": "spatial", "feature_shape": (4, 2, 2)}
    module = remembering(12, **kwargs)
    module(old.view(12, 4, 2, 2), old_labels)
    assert module.bank.features.shape == (5, 12, 16)
    module.slot_attention.eval()  # one draw for all classes
    found = module(new.view(12, 4, 2, 2), new_labels)
    other = remembering(12, **kwargs)
    other.slot_attention.eval()
    other(old, old_labels)
    assert found == other(new, new_labels)
    assert all(loss > 0 for loss in found)


def test_memory_of_spatial_tokens_of_one_position_is_that_of_flat_ones():
    for measure in ("enhanced", "slots"):
        flat = remembering(measure=measure)
        spatial = remembering(measure=measure, tokens="spatial", feature_shape=(16, 1, 1))
        for seed in (1, 2):
            found, want = (each(*batch(seed=seed), slot_noise=draw()) for each in (spatial, flat))
            assert found == want


@MEASURES
def test_memory_sees_the_chosen_classes_only(measure):
    features, labels = batch()
    module, other = remembering(measure=measure), remembering(measure=measure)
    chosen = (labels == 1) | (labels == 3)
    for _ in range(2):
        found = module(features, labels, torch.tensor([1, 3]), slot_noise=draw())
        assert found == other(features[chosen], labels[chosen], slot_noise=draw())
    assert (module.bank.written > 0).tolist() == [False, True, False, True, False]


@MEASURES
def test_memory_fits_beside_a_static_bound_of_the_batch(measure):
    features, labels = batch(12)[0], torch.zeros(12, dtype=torch.int64)
    bounded, free = remembering(measure=measure, max_class_size=12), remembering(measure=measure)
    for _ in range(2):
        found, want = (each(features, labels, slot_noise=draw()) for each in (bounded, free))
        torch.testing.assert_close(found, want)


@MEASURES
def test_memory_of_eager_is_that_of_reference(measure):
    results = []
    for backend in ("eager", "reference"):
        module = remembering(measure=measure, backend=backend).double()
        for seed in (1, 2):
            features, labels = batch(seed=seed)
            found = gradient_of(module, features.double(), labels, slot_noise=draw().double())
        results.append(found)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@MEASURES
def test_memory_of_an_empty_batch_gives_an_attached_zero(measure):
    module = remembering(measure=measure)
    module(*batch())
    features = torch.zeros(0, 16, requires_grad=True)
    rob_loss, _ = module(features, torch.zeros(0, dtype=torch.int64))
    assert rob_loss.item() == 0
    rob_loss.backward()


@MEASURES
def test_memory_serves_a_training_step(measure):
    module = remembering(measure=measure, objective="likelihood")
    for seed in range(3):
        penalty = penalty_of(module, *batch(seed=seed))
        assert penalty.finite
    assert module.bank.written.sum() == 3 * 24


def test_own_loss_neither_uses_nor_fills_the_memory():
    features, labels = batch()
    module = remembering(objective="likelihood")
    module.slot_attention.eval()
    before = module.own_loss(features, labels)
    assert not module.bank.written.any()
    module(*batch(seed=1))
    assert module.own_loss(features, labels) == before


def test_slot_noise_of_wrong_shape_is_refused_in_the_callers_terms():
    with pytest.raises(ValueError, match=r"slot_noise must have shape \[K, S, D\] = \[5, 4, 16\], got \[3, 4, 16\]"):
        remembering()(*batch(), slot_noise=torch.randn(3, 4, 16))


# built from options


@pytest.mark.parametrize(
    ("option", "value", "where"),
    [
        ("measure", "slots", lambda module: module.measure),
        ("penalty", "entropy", lambda module: module.penalty),
        ("hinge", "softplus", lambda module: module.hinge),
        ("threshold", "quantile", lambda module: module.threshold.policy),
        ("threshold_value", 0.25, lambda module: module.threshold.value),
        ("threshold_quantile", 0.75, lambda module: module.threshold.quantile),
        ("eps_var", 1e-3, lambda module: module.eps_var),
        ("gamma", 0.01, lambda module: module.gamma),
        ("objective", "likelihood", lambda module: module.objective),
        ("memory_bank", 3, lambda module: module.bank.size),
        ("num_slots", 3, lambda module: module.slot_attention.num_slots),
        ("tokens", "spatial", lambda module: "spatial" if module.slot_attention.slot_dim == 8 else "flat"),
        ("reduce_dim", 5, lambda module: module.reduction.out_features),
        ("backend", "reference", lambda module: module.slot_attention.backend),
    ],
)
def test_build_hands_an_option_through(option, value, where):
    module = build_surrogate("attention", feature_shape=(8, 2, 2), **COMMON, **(ORIGINAL | {option: value}))
    assert where(module) == value


def test_build_hands_an_anchor_through():
    options = {"measure": "slots", "num_slots": 1, "anchor": 0.9}
    assert (
        build_surrogate("attention", feature_shape=(8, 2, 2), **COMMON, **(ORIGINAL | options)).anchors.momentum == 0.9
    )


def test_build_hands_conv1x1_through():
    options = {"reduce": "conv1x1", "reduce_dim": 6, "tokens": "spatial"}
    module = build_surrogate("attention", feature_shape=(8, 2, 2), **COMMON, **(ORIGINAL | options))
    assert module.reduction.weight.shape == (6, 8, 1, 1)
    assert module.slot_attention.slot_dim == 6


@pytest.mark.parametrize(
    ("option", "value", "plain"),
    [
        ("threshold", "fixed", 0.025),
        ("threshold_value", 0.25, 0.05),
    ],
)
def test_build_makes_a_threshold_that_is_used(option, value, plain):
    chosen = {"threshold": "fixed", "threshold_value": 0.05, **{option: value}}
    assert build_surrogate("attention", feature_shape=(8,), **COMMON, **(ORIGINAL | chosen)).threshold() != plain


def test_build_without_options_is_what_is_recommended():
    module = build_surrogate("attention", feature_shape=(16,), **COMMON)
    assert (module.measure, module.gamma, module.eps_var, module.anchors.momentum) == ("slots", 0.01, 1e-8, 0.99)
    assert list(module.parameters()) == []


def test_build_can_make_the_original():
    plain = build_surrogate("attention", feature_shape=(16,), **COMMON, **ORIGINAL)
    assert set(plain.state_dict()) == set(cem.SlotCrossAttentionCEM(16, reg_strength=0.5).state_dict())
    plain.load_state_dict(cem.SlotCrossAttentionCEM(16, reg_strength=0.5).state_dict(), strict=True)
    assert plain.threshold() == pytest.approx(0.025)
    assert plain.own_loss(*batch()) is None


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({"tokens": "spatial"}, 2),  # 6 channels
        ({"reduce": "conv1x1", "reduce_dim": 3}, 4),  # 3 channels at 4 positions
        ({"reduce": "conv1x1", "reduce_dim": 3, "tokens": "spatial"}, 1),
    ],
)
def test_build_takes_as_many_heads_as_a_token_allows(options, heads):
    module = build_surrogate("attention", feature_shape=(6, 2, 2), **COMMON, **(ORIGINAL | options))
    assert module.cross_attention.num_heads == heads


def test_build_reduces_no_spatial_tokens_of_its_own_accord():
    module = build_surrogate("attention", feature_shape=(16, 8, 8), **COMMON, **ORIGINAL, tokens="spatial")
    assert module.reduction is None


def test_build_refuses_spatial_tokens_of_flat_features():
    with pytest.raises(ValueError, match=r"spatial tokens need features of shape \(C, H, W\), got \(64,\)"):
        build_surrogate("attention", feature_shape=(64,), **COMMON, **ORIGINAL, tokens="spatial")


def test_build_refuses_to_reduce_spatial_tokens_linearly():
    with pytest.raises(ValueError, match=r"tokens='spatial' .* reduces with reduce='conv1x1' if at all"):
        build_surrogate("attention", feature_shape=(8, 2, 2), **COMMON, **ORIGINAL, tokens="spatial", reduce_dim=4)


@pytest.mark.parametrize(
    "options", [{"feature_shape": (8, 2, 2)}, {"feature_shape": (32,), "reduce_dim": 4}], ids=["to what", "of what"]
)
def test_build_refuses_conv1x1_without_channels(options):
    with pytest.raises(ValueError, match=r"reduce='conv1x1' needs reduce_dim and feature_shape=\(C, H, W\)"):
        build_surrogate("attention", **options, **COMMON, **ORIGINAL, reduce="conv1x1")


@pytest.mark.parametrize("option", ["measure", "penalty", "hinge", "threshold", "objective", "tokens", "reduce"])
def test_build_refuses_an_unknown_name(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'other'"):
        build_surrogate("attention", feature_shape=(8, 2, 2), **COMMON, **(ORIGINAL | {option: "other"}))
