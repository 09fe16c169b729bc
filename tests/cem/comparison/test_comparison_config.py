"""The options of a comparison, and what becomes of them in its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cem.attacks.config import AttackConfig
from cem.comparison import Comparison, GridOptions, Run, Setting
from cem.comparison.config import command_of
from cem.options import ConfigError
from cem.training.config import TrainConfig


def test_training_has_the_grids_values_and_the_shared_options() -> None:
    comparison = Comparison(train=TrainConfig(epochs=3, surrogate="none", seed=9, out=Path("elsewhere")))
    config = comparison.train_config(Run(Setting("gmm", 4.0, 0.3), seed=2))
    assert config == TrainConfig(epochs=3, surrogate="gmm", lambd=4.0, noise_std=0.3, seed=2).resolved()


def test_training_of_a_variant_has_its_options_over_the_shared_ones() -> None:
    grid = GridOptions(surrogates=("s", "seed"), variants=("s: {measure: slots, eps_var: 1e-6, epochs: 5}",))
    comparison = Comparison(grid=grid, train=TrainConfig(epochs=3, measure="enhanced", tokens="spatial"))
    variant = comparison.train_config(Run(Setting("s", 4.0, 0.3), seed=2))
    assert (variant.surrogate, variant.measure, variant.eps_var, variant.epochs, variant.lambd) == (
        "attention",
        "slots",
        1e-6,
        5,
        4.0,
    )
    assert variant.tokens == "spatial"
    assert comparison.train_config(Run(Setting("seed", 16.0, 0.3), seed=2)).tokens == "flat"


def test_training_without_a_penalty_has_weight_0() -> None:
    comparison = Comparison(grid=GridOptions(surrogates=("none",)))
    assert [comparison.train_config(run).lambd for run in comparison.grid.runs()] == [0.0, 0.0, 0.0]


def test_attack_computes_where_the_trainings_do() -> None:
    comparison = Comparison(train=TrainConfig(device="cpu", data_root=Path("data")))
    assert comparison.attack_config() == AttackConfig(device="cpu", data_root=Path("data"))


def test_device_of_the_attack_itself_holds() -> None:
    comparison = Comparison(train=TrainConfig(device="cuda"), attack=AttackConfig(device="cpu"))
    assert comparison.attack_config().device == "cpu"


def test_file_gives_back_the_options_and_the_command(tmp_path: Path) -> None:
    before = Comparison(
        grid=GridOptions(
            surrogates=("s",),
            variants=("s: {surrogate: gmm}",),
            seeds=(3,),
            lambds=(1.0, 2.0),
            noise_stds=(0.5,),
            jobs=2,
        ),
        train=TrainConfig(data="mnist", data_root=Path("x"), epochs=4),
        attack=AttackConfig(max_epochs=5),
    )
    before.to_yaml(tmp_path / "compare.yaml", "python -m cem.compare --out 'a b'")
    after = Comparison.from_yaml(tmp_path / "compare.yaml")
    assert (after.grid, after.attack) == (before.grid, before.attack)
    run = before.grid.runs()[0]
    assert after.train_config(run) == before.train_config(run)
    assert command_of(tmp_path / "compare.yaml") == "python -m cem.compare --out 'a b'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lambd: 16", "lambd: a comparison takes a list, lambds"),
        ("epoch: 3", "unknown option epoch"),
        ("attack: {epoch: 3}", "unknown option epoch"),
        ("attack: 3", "attack must hold a mapping"),
        ("seeds: 3", "--seeds takes a list of: a whole number, got 3"),
        ("[", "cannot read options"),
        ("- 1", "must hold a mapping"),
    ],
)
def test_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{path}.*") as caught:
        Comparison.from_yaml(path)
    assert message in str(caught.value)


def test_options_of_every_run_are_checked() -> None:
    comparison = Comparison(train=TrainConfig(epochs=1))
    with pytest.raises(ConfigError, match="--penalty-from must be at most --epochs 1"):
        comparison.validate()


def test_options_of_the_attack_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"--attack\.queries must be at least 1"):
        Comparison(attack=AttackConfig(queries=0)).validate()
