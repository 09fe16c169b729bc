"""What the attention surrogate makes a penalty of, and what trains its parameters."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_surrogates import MEASURES, batch, gradient_of, surrogate

import cem
import cem_kernels
from cem.training.injection import penalty_of
from cem_kernels import BackendUnavailableError, ClassGroups

OBJECTIVES = pytest.mark.parametrize("objective", ["likelihood", "reconstruction"])


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
def test_entropy_is_refused_without_noise_and_with_what_it_does_not_have(kwargs):
    message = (
        "needs reg_strength above 0, and has neither a threshold nor a hinge: with them give penalty='hinge'; got reg"
    )
    with pytest.raises(ValueError, match=message):
        surrogate(measure="slots", penalty="entropy", **kwargs)


def test_one_slot_is_the_class_and_has_no_parameters():
    features, labels = batch()
    module = surrogate(measure="slots", num_slots=1)
    groups = ClassGroups.from_labels(labels, 5)
    want = cem_kernels.class_variance(features, groups, threshold=module.threshold())
    assert list(module.parameters()) == []
    torch.testing.assert_close(module(features, labels), (want.rob_loss, want.intra_mse))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"measure": "slot"}, "measure must be one of enhanced, slots, got 'slot'"),
        ({"penalty": "log"}, "penalty must be one of hinge, entropy, got 'log'"),
        ({"objective": "ml"}, "objective must be one of penalty, likelihood, reconstruction, got 'ml'"),
    ],
)
def test_unknown_name_is_refused_with_the_choices(kwargs, message):
    with pytest.raises(ValueError, match=message):
        surrogate(**kwargs)


def test_one_slot_refuses_an_unknown_backend_when_it_is_built():
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cuda'"):
        surrogate(measure="slots", num_slots=1, backend="cuda")


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
def test_likelihood_is_that_of_slots_as_centers_of_unit_gaussians(kwargs):
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
