"""Terms, and the families that surrogates and defenses come from."""

import dataclasses
import sys
import types

import pytest
import torch

import cem
from cem.errors import BackendError, UsageError
from cem.terms import Family
from cem_kernels import Nats

CONTEXT = cem.Context(feature_shape=(4, 2, 2), image_shape=(3, 8, 8), num_classes=5, noise_std=0.5)


class Spread(cem.Surrogate):
    name = "spread"

    def measure(self, batch):
        loss = batch.features.var()
        return cem.Measured(loss, {"intra_mse": loss})


@pytest.fixture
def mine(monkeypatch):
    """A module of the user's."""
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def family(*members):
    made = Family("surrogate", cem.Surrogate, aliases={"narrow": "spread"})
    for each in members:
        made.register(each)
    return made


def test_the_surrogates_are_these():
    assert list(cem.SURROGATES) == ["none", "mixture", "attention", "centroid", "slots"]
    assert cem.SURROGATES["centroid"] is cem.SURROGATES["cem.surrogates:CentroidCEM"] is cem.CentroidCEM
    assert cem.SURROGATES["attention"] is cem.SlotCrossAttentionCEM
    assert cem.SURROGATES["mixture"] is cem.SURROGATES["gmm"] is cem.GaussianMixtureCEM


def test_a_member_is_had_by_its_name_and_by_an_alias_and_stands_in_what_the_family_says():
    assert family(Spread)["spread"] is family(Spread)["narrow"] is Spread
    assert repr(family(Spread, cem.CentroidCEM)) == "Family('surrogate': spread, centroid)"


def test_a_member_may_be_registered_twice_but_no_other_under_its_name():
    members = family(Spread)
    assert members.register(Spread) is Spread  # so that it decorates
    with pytest.raises(ValueError, match=r"surrogate 'spread' is <class .*Spread'> already"):
        members.register(type("Other", (Spread,), {}))


@pytest.mark.parametrize("name", ["centriod", "", ":Spread", ".mine:Spread"])
def test_an_unknown_name_is_refused_with_the_choices(name):
    message = f"--surrogate takes spread, or package.module:Class for one of yours, got '{name}'"
    with pytest.raises(UsageError, match=message):
        family(Spread)[name]


@pytest.mark.parametrize(("name", "message"), [("mine.deep:Spread", "mine"), ("mine:Spred", "Spred"), ("mine:", "''")])
def test_a_class_is_had_by_its_module_and_refused_where_it_is_not_there(name, message, mine):
    mine.Spread = Spread
    assert cem.SURROGATES["mine:Spread"] is Spread
    assert "spread" not in cem.SURROGATES
    with pytest.raises(UsageError, match=f"--surrogate {name}: .*{message}"):
        cem.SURROGATES[name]


NO_MEMBER = r"mine:Other must be a class derived from cem\.surrogates\.base\.Surrogate, with a name and Options, a"
TAKEN = type("Mine", (Spread,), {"name": "centroid"}), r"mine:Other is called 'centroid', as <class .*CentroidCEM'> is"


@pytest.mark.parametrize(
    ("other", "message"),
    [*((each, NO_MEMBER) for each in (cem.GaussianNoise, cem.Surrogate, Spread(), 3)), TAKEN],
)
def test_what_cannot_be_a_member_is_refused(other, message, mine):
    mine.Other = other
    with pytest.raises(UsageError, match=message):
        cem.SURROGATES["mine:Other"]


def test_build_makes_what_the_run_and_the_options_say_or_names_the_member_that_refuses():
    module = cem.SURROGATES.build("centroid", CONTEXT, cem.CentroidCEM.Options(momentum=0.9))
    assert (module.feature_dim, module.num_classes, module.penalty, module.momentum) == (16, 5, Nats(0.5), 0.9)
    assert cem.SURROGATES.build("centroid", CONTEXT).momentum == cem.CentroidCEM.Options().momentum == 0.97
    quiet = cem.Context(feature_shape=(8,), image_shape=(3, 8, 8), num_classes=5, noise_std=0.0)
    with pytest.raises(UsageError, match=r"--surrogate centroid: noise_std must be finite and positive, got 0\.0"):
        cem.SURROGATES.build("centroid", quiet)


def test_build_lets_errors_of_the_project_speak_for_themselves(monkeypatch):
    class Picky(Spread):
        @classmethod
        def build(cls, options, context):
            raise UsageError("no")

    with pytest.raises(UsageError, match=r"^no$"):
        family(Picky).build("spread", CONTEXT)
    monkeypatch.setattr("cem_kernels.backends.TRITON_INSTALLED", False)
    context = cem.Context((8,), (3, 8, 8), num_classes=5, noise_std=0.1, backend="triton")
    with pytest.raises(BackendError, match="backend='triton' needs the package triton"):
        cem.SURROGATES.build("centroid", context)


def test_a_term_does_nothing_but_what_it_overrides():
    term, z = cem.Term(), torch.randn(4, 3)
    batch = cem.Batch(None, torch.zeros(4, dtype=torch.long), z, z)
    assert (term.needs_images, term.capturable, term.needs_epoch_features) == (False, True, False)
    assert (term.optimizers(), term.shared_parameters(), term.after_epoch(z, batch.labels)) == ({}, [], {})
    assert term.before_epoch(0, 3) is term.before_step(batch) is term.assess(z, batch.labels) is None
    with pytest.raises(NotImplementedError, match="Term does not say what it measures"):
        term.measure(batch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"feature_shape": 64}, r"feature_shape must be \(C, H, W\) or \(D,\), .* got 64$"),
        ({"image_shape": (28, 28)}, r"image_shape must be \(C, H, W\), .* got \(28, 28\)$"),
        ({"noise_std": -1.0}, "^noise_std must be finite and not negative, got -1.0$"),
    ],
)
def test_a_context_refuses_what_no_run_has_by_its_name(given, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONTEXT, **given)
