"""What a defense does unless it says otherwise, and several of them in a row."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from cem.defenses import Chain, Defense, GaussianNoise
from cem.terms import Measured, Term


class Double(Defense):
    def transform(self, z):
        return 2 * z


class AddOne(Defense):
    def transform(self, z):
        return z + 1


class Size(Term):
    def measure(self, batch):
        return Measured(batch.features.square().mean(), {})


class Penalized(Defense):
    """Changes training and no features."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def term(self):
        return Size()


Z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_defense_that_overrides_nothing_does_nothing():
    defense, model = Defense(), nn.Linear(2, 2)
    before = model.weight.detach().clone()
    defense.prepare(model, 0)
    assert defense(Z) is Z
    assert defense.sigma() == 0.0
    assert defense.log_likelihood(Z, Z) is None
    assert defense.term() is None
    assert defense.Options().weight == 1.0
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, Z),
        ({"double": Double(), "add": AddOne()}, 2 * Z + 1),
        ({"add": AddOne(), "double": Double()}, 2 * Z + 2),
        (dict.fromkeys(("once", "again"), Double()), 4 * Z),  # the same one twice
        *(({name: Double(), "noise": GaussianNoise(0.0)}, 2 * Z) for name in ("half", "members", "package.module")),
    ],
    ids=["nothing", "double and add", "add and double", "one twice", "half", "members", "package.module"],
)
def test_features_pass_through_members_of_any_name_in_their_order(members, expected):
    chain = Chain(members)
    assert torch.equal(chain(Z), expected)
    assert list(chain.members().items()) == list(members.items())


@pytest.mark.parametrize(
    ("members", "sigma"),
    [
        ({}, 0.0),
        ({"one": GaussianNoise(0.3), "none": Penalized(), "two": GaussianNoise(0.4)}, 0.5),
        ({"noise": GaussianNoise(0.3), "double": Double()}, None),
    ],
    ids=["nothing", "noises", "more than noise"],
)
def test_variances_of_noises_add_up_and_a_chain_that_does_more_has_no_sigma(members, sigma):
    assert Chain(members).sigma() == (None if sigma is None else pytest.approx(sigma))
    if sigma:
        torch.manual_seed(0)
        assert Chain(members)(torch.zeros(256, 256)).std().item() == pytest.approx(sigma, rel=0.02)


def test_log_likelihood_is_that_of_the_one_member_that_changes_features():
    chain = Chain({"off": GaussianNoise(0.0), "term": Penalized(), "noise": GaussianNoise(0.3)})
    torch.testing.assert_close(chain.log_likelihood(Z + 0.1, Z), Normal(Z, 0.3).log_prob(Z + 0.1).sum(1))


@pytest.mark.parametrize("others", [[], [GaussianNoise(0.3), Double()], [GaussianNoise(0.3), GaussianNoise(0.1)]])
def test_nothing_and_two_members_that_change_features_have_no_log_likelihood(others):
    assert Chain({str(number): each for number, each in enumerate(others)}).log_likelihood(Z, Z) is None


def test_members_keep_their_terms_and_parameters_and_the_chain_their_weights():
    chain = Chain({"noise": GaussianNoise(0.1), "small": Penalized()}, {"noise": 1.0, "small": 0.25})
    assert chain.term() is None
    assert isinstance(chain.terms["small"], Size)
    assert chain.weights == {"noise": 1.0, "small": 0.25}
    assert list(chain.state_dict()) == ["small.scale"]
