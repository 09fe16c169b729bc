"""Which runs a comparison consists of, and what they are called."""

from __future__ import annotations

from typing import Any

import pytest

from cem.comparison import GridOptions, Run, Setting
from cem.options import ConfigError
from cem.training.presets import PRESETS


def test_surrogate_none_is_run_once_whatever_the_weights() -> None:
    grid = GridOptions(surrogates=("none", "gmm"), lambds=(4.0, 16.0), noise_stds=(0.1, 0.2), seeds=(0,))
    assert grid.settings() == [
        Setting("none", 0.0, 0.1),
        Setting("gmm", 4.0, 0.1),
        Setting("gmm", 16.0, 0.1),
        Setting("none", 0.0, 0.2),
        Setting("gmm", 4.0, 0.2),
        Setting("gmm", 16.0, 0.2),
    ]


def test_first_seed_is_run_in_every_setting_before_the_second() -> None:
    grid = GridOptions(surrogates=("none", "gmm"), seeds=(7, 8))
    assert [(run.setting.surrogate, run.seed) for run in grid.runs()] == [
        ("none", 7),
        ("gmm", 7),
        ("none", 8),
        ("gmm", 8),
    ]


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (Run(Setting("none", 0.0, 0.025), 0), "none-noise0.025-seed0"),
        (Run(Setting("gmm", 16.0, 0.025), 3), "gmm-lambd16-noise0.025-seed3"),
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
        ({"surrogates": ("kmeans",)}, "--surrogates takes none, gmm, attention, seed, got 'kmeans'"),
        ({"surrogates": ("s",), "variants": ("s",)}, "--variants takes a name and its options"),
        ({"surrogates": ("s",), "variants": ("s: [1]",)}, "--variants takes a name and its options"),
        ({"surrogates": ("s",), "variants": ("{",)}, "--variants takes YAML such as"),
        ({"surrogates": ("a/b",), "variants": ("a/b: {}",)}, "--variants: a name has letters, digits"),
        ({"surrogates": ("gmm",), "variants": ("gmm: {}",)}, "is none of attention, gmm, none; got 'gmm'"),
        ({"surrogates": ("s",), "variants": ("s: {seed: 3}",)}, "--variants: s cannot set 'seed'"),
        ({"surrogates": ("s",), "variants": ("s: {mesure: slots}",)}, "--variants: s cannot set 'mesure'"),
        (
            {"surrogates": ("s",), "variants": ("s: {preset: sed}",)},
            "--variants: preset of s must be one of attention, seed, gmm, got 'sed'",
        ),
    ],
)
def test_grid_that_cannot_be_run_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GridOptions(**options).validate()
    assert message in str(caught.value)


def test_a_variant_sets_options_of_the_attention_surrogate() -> None:
    grid = GridOptions(
        surrogates=("s",), variants=("s: {measure: slots}", "other: {surrogate: gmm}"), lambds=(1.0, 2.0)
    )
    assert grid.options_of("s") == {"surrogate": "attention", "measure": "slots"}
    assert grid.options_of("other") == {"surrogate": "gmm"}
    assert [setting.lambd for setting in grid.settings()] == [1.0, 2.0]


def test_a_variant_of_a_preset_has_its_options_but_for_those_that_it_sets() -> None:
    grid = GridOptions(
        surrogates=("wide", "mix"), variants=("wide: {preset: seed, lambd: [2, 4]}", "mix: {preset: gmm}")
    )
    grid.validate()
    assert grid.options_of("wide") == PRESETS["seed"] | {"lambd": [2, 4]}
    assert grid.options_of("mix") == PRESETS["gmm"]
    assert [setting.lambd for setting in grid.settings()] == [2.0, 4.0, 16.0]


def test_a_variant_or_a_preset_with_weights_of_its_own_is_run_with_those_alone() -> None:
    variants = ("s: {lambd: 3}", "curve: {lambd: [4, 5e-1]}")
    grid = GridOptions(surrogates=("s", "curve", "seed"), variants=variants, lambds=(1.0, 2.0))
    assert [(setting.surrogate, setting.lambd) for setting in grid.settings()] == [
        *(("s", 3.0), ("curve", 4.0), ("curve", 0.5)),
        ("seed", 16.0),
    ]
