import math

import pytest
import torch
from torch.distributions import Normal

import cem
from cem.defenses import DEFENSES, GaussianNoise


@pytest.mark.parametrize("training", [True, False])
def test_std_is_a_standard_deviation_in_training_and_evaluation(training: bool) -> None:
    torch.manual_seed(0)
    z = torch.full((64, 1024), 3.0)
    added = GaussianNoise(0.25).train(training)(z) - z
    assert added.mean().abs() < 5 * 0.25 / math.sqrt(z.numel())
    assert added.std().item() == pytest.approx(0.25, rel=0.02)


def test_each_call_draws_new_noise() -> None:
    z = torch.zeros(4, 8)
    noise = GaussianNoise(1.0).eval()
    assert not torch.equal(noise(z), noise(z))


def test_zero_std_returns_the_features_themselves() -> None:
    z = torch.randn(4, 8)
    assert GaussianNoise(0.0)(z) is z


def test_gradient_passes_unchanged() -> None:
    z = torch.randn(4, 8, requires_grad=True)
    GaussianNoise(0.5)(z).sum().backward()
    assert torch.equal(z.grad, torch.ones(4, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    assert GaussianNoise(0.1)(torch.zeros(2, 2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("std", [-0.1, math.nan, math.inf])
def test_unusable_std_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="std must be finite and at least 0"):
        GaussianNoise(std)


@pytest.mark.parametrize("std", [0.0, 0.25])
def test_sigma_is_the_std(std: float) -> None:
    assert GaussianNoise(std).sigma() == std


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 2, 4)], ids=str)
def test_log_likelihood_is_that_of_independent_normal_variables(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    z = torch.randn(*shape, dtype=torch.float64)
    sent = z + torch.randn_like(z)
    expected = Normal(z, 0.3).log_prob(sent).flatten(1).sum(1)
    torch.testing.assert_close(GaussianNoise(0.3).log_likelihood(sent, z), expected)


def test_log_likelihood_has_a_gradient() -> None:
    z = torch.zeros(2, 3, requires_grad=True)
    GaussianNoise(0.5).log_likelihood(torch.ones(2, 3), z).sum().backward()
    torch.testing.assert_close(z.grad, torch.full((2, 3), 1 / 0.25))


def test_without_noise_there_is_no_log_likelihood() -> None:
    z = torch.zeros(2, 3)
    assert GaussianNoise(0.0).log_likelihood(z, z) is None


def test_a_runs_noise_has_its_std() -> None:
    context = cem.Context(feature_shape=(4,), image_shape=(1, 8, 8), num_classes=2, noise_std=0.7)
    assert DEFENSES.build("noise", context).sigma() == 0.7


def test_repr_shows_std() -> None:
    assert repr(GaussianNoise(0.025)) == "GaussianNoise(std=0.025)"
