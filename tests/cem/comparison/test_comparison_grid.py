"""Which runs a comparison consists of, and what they are called."""

from __future__ import annotations

from typing import Any

import pytest

from cem.comparison.grid import GridOptions, Run, Setting
from cem.errors import UsageError
from cem.surrogates import CentroidCEM, SlotCrossAttentionCEM


def test_the_control_is_run_once_whatever_the_weights() -> None:
    grid = GridOptions(surrogates=("none", "mixture"), lambds=(4.0, 16.0), noise_stds=(0.1, 0.2), seeds=(0,))
    assert grid.settings() == [
        Setting("none", 0.0, 0.1),
        Setting("mixture", 4.0, 0.1),
        Setting("mixture", 16.0, 0.1),
        Setting("none", 0.0, 0.2),
        Setting("mixture", 4.0, 0.2),
        Setting("mixture", 16.0, 0.2),
    ]


def test_first_seed_is_run_in_every_setting_before_the_second() -> None:
    grid = GridOptions(surrogates=("none", "mixture"), seeds=(7, 8))
    assert [(run.setting.method, run.seed) for run in grid.runs()] == [
        ("none", 7),
        ("mixture", 7),
        ("none", 8),
        ("mixture", 8),
    ]


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (Run(Setting("none", 0.0, 0.025), 0), "none-noise0.025-seed0"),
        (Run(Setting("mixture", 16.0, 0.025), 3), "mixture-lambd16-noise0.025-seed3"),
        (Run(Setting("attention", 0.5, 1e-5), 0), "attention-lambd0.5-noise1e-05-seed0"),
    ],
)
def test_run_is_named_after_what_varies(run: Run, name: str) -> None:
    assert run.name == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "--seeds needs at least one value"),
        ({"lambds": (16.0, 0.0)}, "--lambds must be finite and above 0, got 0; without a penalty is --surrogates none"),
        ({"lambds": (float("inf"),)}, "--lambds must be finite"),
        ({"surrogates": ("s",), "variants": ("s: {lambd: 0}",)}, "lambd of s must be finite and above 0, got 0"),
        ({"surrogates": ("s",), "variants": ("s: {lambd: much}",)}, "lambd of s takes a number or a list of them"),
        ({"jobs": 0}, "--jobs must be at least 1, got 0"),
        ({"seeds": (1, 1)}, "two runs would be called none-noise0.1-seed1"),
        ({"noise_stds": (0.1, 0.10000001)}, "two runs would be called none-noise0.1-seed0"),
        ({"surrogates": ("kmeans",)}, "--surrogate takes none, mixture, attention, centroid, or package.module:Class"),
        ({"surrogates": ("gmm", "mixture")}, "two runs would be called mixture"),
        ({"surrogates": ("s",), "variants": ("s",)}, "--variants takes a name and its options"),
        ({"surrogates": ("s",), "variants": ("s: [1]",)}, "--variants takes a name and its options"),
        ({"surrogates": ("s",), "variants": ("{",)}, "--variants takes YAML such as"),
        ({"surrogates": ("a/b",), "variants": ("a/b: {}",)}, "--variants: a name has letters, digits"),
        ({"variants": ("mixture: {}",)}, "is none of none, mixture, attention, centroid; got 'mixture'"),
        ({"surrogates": ("s",), "variants": ("s: {seed: 3}",)}, "--variants: s cannot set 'seed'"),
        (
            {"surrogates": ("s",), "variants": ("s: {lamdb: 3}",)},
            "s cannot set 'lamdb'; did you mean lambd?",
        ),
        ({"surrogates": ("s",), "variants": ("s: {surrogate: kmeans}",)}, "got 'kmeans'"),
        ({"members": {"centroid": CentroidCEM.Options(momentum=1.0)}}, "--centroid.momentum must be"),
    ],
)
def test_grid_that_cannot_be_run_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        GridOptions(**options).checked()
    assert message in str(caught.value)


def test_another_name_of_a_surrogate_stands_for_its_own() -> None:
    assert GridOptions(surrogates=("none", "gmm")).checked().surrogates == ("none", "mixture")


def test_a_variant_is_of_the_recommended_surrogate_unless_it_names_one() -> None:
    grid = GridOptions(surrogates=("s", "other"), variants=("s: {epochs: 3}", "other: {surrogate: mixture}"))
    assert grid.training_of("s") == {"surrogate": "centroid", "epochs": 3}
    assert grid.training_of("other") == {"surrogate": "mixture"}
    assert [setting.lambd for setting in grid.settings()] == [0.5, 16.0]


def test_a_variant_has_the_options_of_its_surrogate_but_for_those_that_it_sets() -> None:
    shared = {"attention": SlotCrossAttentionCEM.Options(num_slots=4, gamma=1e-3)}
    grid = GridOptions(
        surrogates=("attention", "s"),
        variants=("s: {surrogate: attention, attention: {gamma: 0.1}}",),
        members=shared,
    ).checked()
    plain, variant = (grid.training_of(method)["attention"] for method in ("attention", "s"))
    assert (plain["num_slots"], plain["gamma"]) == (4, 1e-3)
    assert variant == plain | {"gamma": 0.1}


def test_a_variant_with_weights_of_its_own_is_run_with_those_alone() -> None:
    variants = ("s: {lambd: 3}", "curve: {lambd: [4, 5e-1]}")
    grid = GridOptions(surrogates=("s", "curve", "mixture"), variants=variants, lambds=(1.0, 2.0))
    assert [(setting.method, setting.lambd) for setting in grid.settings()] == [
        *(("s", 3.0), ("curve", 4.0), ("curve", 0.5)),
        *(("mixture", 1.0), ("mixture", 2.0)),
    ]


def test_a_variant_without_a_penalty_has_no_weight() -> None:
    grid = GridOptions(surrogates=("none", "narrow"), variants=("narrow: {surrogate: none, bottleneck: C4S1}",))
    grid = grid.checked()
    assert [setting.lambd for setting in grid.settings()] == [0.0, 0.0]
    assert [run.name for run in grid.runs()][:2] == ["none-noise0.1-seed0", "narrow-noise0.1-seed0"]
    assert not grid.settings()[1].is_control


@pytest.mark.parametrize(
    "options",
    [
        {"surrogates": ("a",), "variants": ("a: {lambd: 1}", "a: {lambd: 2}")},
        {"surrogates": ("centroid", "cem.surrogates:CentroidCEM")},
        {"surrogates": ("a",), "variants": ("a: {lambd: []}",)},
        {"surrogates": ("a",), "variants": ("a: {surrogate: 5}",)},
    ],
    ids=["two variants of one name", "two surrogates of one name", "no weight", "no name"],
)
def test_no_method_is_lost_without_a_word(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        GridOptions(**options).checked()
