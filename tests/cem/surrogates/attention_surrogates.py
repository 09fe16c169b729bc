"""Small attention surrogates, batches and noise for them, and their measure of slots put together by hand."""

import pytest
import torch
import torch.nn.functional as F

import cem
import cem_kernels
from cem_kernels import ClassGroups

MEASURES = pytest.mark.parametrize("measure", ["enhanced", "slots"])


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
