"""Which runs a comparison consists of, and what they are called."""

import pytest

from cem.comparison.grid import Client, GridOptions, Setting
from cem.errors import UsageError
from cem.surrogates import SlotCrossAttentionCEM


def test_the_control_is_run_once_whatever_the_weights_and_every_setting_before_the_second_seed():
    grid = GridOptions(surrogates=("none", "gmm"), lambds=(4.0, 16.0), noise_stds=(0.1, 0.2), seeds=(7, 8))
    methods = (("none", 0.0), ("mixture", 4.0), ("mixture", 16.0))
    assert grid.settings() == [Setting(*method, noise_std) for noise_std in (0.1, 0.2) for method in methods]
    assert [run.seed for run in grid.runs()] == [7] * 6 + [8] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "--seeds needs at least one value"),
        ({"lambds": (16.0, 0.0)}, "--lambds must be finite and above 0, got 0; without a penalty is --surrogates none"),
        ({"surrogates": ("s",), "variants": ("s",)}, "--variants takes a name and its options"),
        ({"surrogates": ("s",), "variants": ("s: {lambd: []}",)}, "lambd of s must be finite and above 0, got nan"),
        ({"surrogates": ("s",), "variants": ("s: {lambd: much}",)}, "lambd of s takes a number or a list of them"),
        ({"seeds": (1, 1)}, "two runs would be called none-noise0.3-seed1"),
        ({"surrogates": ("centroid", "cem.surrogates:CentroidCEM")}, "two runs would be called centroid"),
        ({"surrogates": ("s",), "variants": ("{",)}, "--variants takes YAML such as"),
        ({"variants": ("mixture: {}",)}, "is none of none, mixture, attention, centroid, slots; got 'mixture'"),
        ({"surrogates": ("s",), "variants": ("s: {surrogate: 5}",)}, "surrogate of s must be a name, got 5"),
        ({"surrogates": ("s",), "variants": ("s: {seed: 3}",)}, "--variants: s cannot set 'seed'"),
        ({"surrogates": ("s",), "variants": ("s: {adapter: 3}",)}, "--variants: s cannot set 'adapter'"),
        ({"surrogates": ("w",), "variants": ("w: {num_slots: 8}",)}, "so write slots: {num_slots: 8}"),
        ({"surrogates": ("wdie",), "variants": ("wide: {}",)}, "got 'wdie'; did you mean wide?"),
        ({"bottleneck": ("none", "C0S1")}, "bottleneck 'C0S1': "),
        ({"adapter": ()}, "--adapter needs at least one value"),
        ({"variants": ("s: {epochs: 3}",)}, "--variants: no run has s; give it to --surrogates"),
    ],
)
def test_grid_that_cannot_be_run_is_refused(options, message):
    with pytest.raises(UsageError) as caught:
        GridOptions(**options).checked()
    assert message in str(caught.value)


def test_a_variant_has_the_options_of_its_surrogate_which_is_the_recommended_one_unless_it_names_one():
    grid = GridOptions(
        surrogates=("attention", "own", "other"),
        variants=("own: {surrogate: attention, attention: {gamma: 0.1}}", "other: {epochs: 3}"),
        members={"attention": SlotCrossAttentionCEM.Options(num_slots=4, gamma=1e-3)},
    ).checked()
    plain, own = (grid.training_of(method)["attention"] for method in ("attention", "own"))
    assert (plain["num_slots"], plain["gamma"]) == (4, 1e-3)
    assert own == plain | {"gamma": 0.1}
    other = grid.training_of("other")
    assert (other["surrogate"], other["epochs"]) == ("slots", 3)


def test_a_variant_with_weights_of_its_own_is_run_with_those_alone_and_one_without_a_penalty_with_none():
    variants = ("s: {lambd: 3}", "curve: {lambd: [4, 5e-1]}", "plain: {surrogate: none, epochs: 3}")
    grid = GridOptions(surrogates=("s", "curve", "plain", "mixture"), variants=variants, lambds=(1.0, 2.0)).checked()
    weights = [("s", 3.0), ("curve", 4.0), ("curve", 0.5), ("plain", 0.0), ("mixture", 1.0), ("mixture", 2.0)]
    assert [(setting.method, setting.lambd) for setting in grid.settings()] == weights
    assert grid.runs()[3].name == "plain-noise0.3-seed0"
    assert not grid.settings()[3].is_control


def test_every_client_is_run_at_every_noise_and_is_named_by_what_is_not_its_default():
    given = {"surrogates": ["none"], "noise_stds": [0.1, 0.2], "seeds": [0], "cut_layer": [4, 2], "bottleneck": "none"}
    grid = GridOptions.from_dict(given).checked()
    clients = [Client(cut, 0, "none") for cut in (4, 4, 2, 2)]
    assert [setting.client for setting in grid.settings()] == clients
    assert [setting.noise_std for setting in grid.settings()] == [0.1, 0.2, 0.1, 0.2]
    assert [grid.runs()[i].name for i in (0, 2)] == [
        f"none{cut}-bottlenecknone-noise0.1-seed0" for cut in ("", "-cut2")
    ]
    assert str(Setting("none", 0.0, 0.3, Client(adapter=1))) == "none, σ 0.3, adapter 1"
