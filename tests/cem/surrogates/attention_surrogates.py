"""Small attention surrogates, and batches and slots' draws for them."""

import torch

import cem


def surrogate(feature_dim=16, **kwargs):
    kwargs = {"num_slots": 4, "reg_strength": 0.5, "num_classes": 5, **kwargs}
    torch.manual_seed(0)
    return cem.SlotCrossAttentionCEM(feature_dim, **kwargs)


def batch(num_samples=24, width=16, num_classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, width, generator=generator)
    return features, torch.randint(0, num_classes, (num_samples,), generator=generator)


def draw(width=16, num_classes=5, num_slots=4, seed=7):
    """The slots' noise, for calls in training that are compared."""
    return torch.randn(num_classes, num_slots, width, generator=torch.Generator().manual_seed(seed))


def measured(module, features, labels, slot_noise):
    """What a call gives, with slots that are drawn so."""
    loss, monitors, _ = module.measure(cem.Batch(None, labels, features, features), slot_noise=slot_noise)
    return loss, monitors["intra_mse"]


def gradient_of(module, features, labels):
    """``rob_loss``, and its gradient to the features."""
    x = features.detach().clone().requires_grad_()
    loss = module(x, labels)[0]
    return loss.detach(), torch.autograd.grad(loss, x)[0]
