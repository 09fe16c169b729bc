import math

import pytest
import torch
from torch.distributions import Normal

import cem
from cem.defenses import DEFENSES, GaussianNoise


@pytest.mark.parametrize("training", [True, False])
def test_std_is_a_standard_deviation_in_training_and_evaluation(training):
    torch.manual_seed(0)
    z, noise = torch.full((64, 1024), 3.0), GaussianNoise(0.25).train(training)
    added = noise(z) - z
    assert added.mean().abs() < 5 * 0.25 / math.sqrt(z.numel())
    assert added.std().item() == pytest.approx(0.25, rel=0.02)
    assert not torch.equal(noise(z) - z, added)  # each call draws anew


def test_zero_std_returns_the_features_themselves_and_has_no_log_likelihood():
    z, noise = torch.randn(4, 8), GaussianNoise(0.0)
    assert noise(z) is z
    assert noise.log_likelihood(z, z) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_the_gradient_passes_unchanged(dtype):
    z = torch.zeros(2, 2, dtype=dtype, requires_grad=True)
    sent = GaussianNoise(0.1)(z)
    sent.sum().backward()
    assert sent.dtype == dtype
    assert torch.equal(z.grad, torch.ones_like(z))


@pytest.mark.parametrize("std", [-0.1, math.nan, math.inf])
def test_unusable_std_is_refused(std):
    with pytest.raises(ValueError, match="std must be finite and at least 0"):
        GaussianNoise(std)


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 2, 4)], ids=str)
def test_log_likelihood_is_that_of_independent_normal_variables_with_its_gradient(shape):
    torch.manual_seed(0)
    z = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    sent = torch.randn_like(z)
    found = GaussianNoise(0.3).log_likelihood(sent, z)
    torch.testing.assert_close(found, Normal(z, 0.3).log_prob(sent).flatten(1).sum(1))
    found.sum().backward()
    torch.testing.assert_close(z.grad, (sent - z.detach()) / 0.3**2)


def test_a_runs_noise_has_its_std_as_sigma_and_shows_it():
    context = cem.Context(feature_shape=(4,), image_shape=(1, 8, 8), num_classes=2, noise_std=0.7)
    noise = DEFENSES.build("noise", context)
    assert noise.sigma() == 0.7
    assert repr(noise) == "GaussianNoise(std=0.7)"
