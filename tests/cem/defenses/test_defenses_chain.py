"""What a defense does unless it says otherwise, and several of them in a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from cem.defenses import Chain, Defense, GaussianNoise
from cem.terms import Batch, Measured, Term


class Double(Defense):
    def transform(self, z: Tensor) -> Tensor:
        return 2 * z


class AddOne(Defense):
    def transform(self, z: Tensor) -> Tensor:
        return z + 1


class Size(Term):
    def measure(self, batch: Batch) -> Measured:
        return Measured(batch.features.square().mean(), {})


class Penalized(Defense):
    """Changes training and no features; notes when it is asked to prepare."""

    def __init__(self, notes: list[tuple[int, int]], number: int = 0) -> None:
        super().__init__()
        self.notes, self.number = notes, number

    def term(self) -> Term:
        return Size()

    def prepare(self, model: nn.Module, epoch: int) -> None:
        self.notes.append((self.number, epoch))


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# Defaults.


def test_a_defense_that_overrides_nothing_does_nothing() -> None:
    z, model = features(3, 4), nn.Linear(2, 2)
    before = model.weight.detach().clone()
    defense = Defense()
    defense.prepare(model, 0)
    assert defense(z) is z
    assert defense.sigma() == 0.0
    assert defense.log_likelihood(z, z) is None
    assert defense.term() is None
    assert torch.equal(model.weight, before)


def test_a_call_is_the_transform() -> None:
    z = features(3, 4)
    assert torch.equal(Double()(z), 2 * z)


def test_a_transform_of_its_own_has_no_sigma_unless_it_says_so() -> None:
    assert Double().sigma() is None


def test_a_defense_without_options_weighs_its_term_by_one() -> None:
    assert Defense.Options().weight == 1.0


# Chains.


def test_features_pass_through_members_in_their_order() -> None:
    z = features(3, 4)
    assert torch.equal(Chain({"double": Double(), "add": AddOne()})(z), 2 * z + 1)
    assert torch.equal(Chain({"add": AddOne(), "double": Double()})(z), 2 * z + 2)


def test_members_keep_names_and_order() -> None:
    members = {"b": Double(), "a": GaussianNoise(0.1)}
    assert list(Chain(members).members().items()) == list(members.items())


@pytest.mark.parametrize("name", ["half", "sigma", "members", "package.module"])
def test_a_member_may_have_any_name(name: str) -> None:
    z, chain = features(3, 4), Chain({name: Double(), "noise": GaussianNoise(0.0)})
    assert torch.equal(chain(z), 2 * z)
    assert list(chain.members()) == [name, "noise"]


def test_a_defense_may_occur_twice() -> None:
    double, z = Double(), features(3, 4)
    assert torch.equal(Chain({"once": double, "again": double})(z), 4 * z)


def test_an_empty_chain_hands_features_through() -> None:
    z, chain = features(3, 4), Chain({})
    assert chain(z) is z
    assert chain.sigma() == 0.0
    assert chain.log_likelihood(z, z) is None


def test_variances_of_several_noises_add_up() -> None:
    chain = Chain({"one": GaussianNoise(0.3), "none": Penalized([]), "two": GaussianNoise(0.4)})
    assert chain.sigma() == pytest.approx(0.5)
    torch.manual_seed(0)
    assert chain(torch.zeros(256, 256)).std().item() == pytest.approx(0.5, rel=0.02)


def test_a_chain_that_does_more_than_noise_has_no_sigma() -> None:
    assert Chain({"noise": GaussianNoise(0.3), "double": Double()}).sigma() is None


def test_log_likelihood_is_that_of_the_one_member_that_changes_features() -> None:
    z, sent = features(2, 5, 3)
    chain = Chain({"off": GaussianNoise(0.0), "term": Penalized([]), "noise": GaussianNoise(0.3)})
    torch.testing.assert_close(chain.log_likelihood(sent, z), Normal(z, 0.3).log_prob(sent).sum(1))


@pytest.mark.parametrize("other", [Double(), GaussianNoise(0.1)], ids=["transform", "noise"])
def test_two_members_that_change_features_have_no_log_likelihood(other: Defense) -> None:
    z = features(3, 4)
    assert Chain({"noise": GaussianNoise(0.3), "other": other}).log_likelihood(z, z) is None


def test_members_keep_their_terms_and_the_chain_their_weights() -> None:
    chain = Chain({"noise": GaussianNoise(0.1), "small": Penalized([])}, {"noise": 1.0, "small": 0.25})
    assert chain.term() is None
    assert isinstance(chain.members()["small"].term(), Size)
    assert chain.weights == {"noise": 1.0, "small": 0.25}


def test_all_members_prepare_in_their_order() -> None:
    notes: list[tuple[int, int]] = []
    Chain({"b": Penalized(notes, 1), "a": Penalized(notes, 2)}).prepare(nn.Linear(2, 2), epoch=7)
    assert notes == [(1, 7), (2, 7)]


def test_parameters_of_members_are_the_chains() -> None:
    class Scaled(Defense):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    assert list(Chain({"scaled": Scaled()}).state_dict()) == ["scaled.scale"]
