"""The options of a comparison, and what becomes of them in its runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from cem.attacks.config import AttackConfig
from cem.comparison.config import Comparison, command_of
from cem.comparison.grid import GridOptions, Run, Setting
from cem.defenses import Defense
from cem.errors import UsageError
from cem.options import option
from cem.surrogates import CentroidCEM
from cem.training.config import TrainConfig


def test_training_has_the_grids_values_and_the_shared_options() -> None:
    comparison = Comparison(train=TrainConfig(epochs=3, surrogate="none", seed=9, out=Path("elsewhere")))
    config = comparison.train_config(Run(Setting("mixture", 4.0, 0.3), seed=2))
    wanted = TrainConfig(epochs=3, surrogate="mixture", lambd=4.0, noise_std=0.3, seed=2)
    assert config.checked() == wanted.resolved().checked()


def test_training_of_a_variant_has_its_options_over_the_shared_ones() -> None:
    grid = GridOptions(surrogates=("s", "centroid"), variants=("s: {epochs: 5, lambd_schedule: rising}",))
    comparison = Comparison(grid=grid, train=TrainConfig(epochs=3, lr=0.2, lambd_schedule="constant"))
    variant = comparison.train_config(Run(Setting("s", 4.0, 0.3), seed=2))
    assert (variant.surrogate, variant.lambd, variant.noise_std, variant.seed) == ("centroid", 4.0, 0.3, 2)
    assert (variant.epochs, variant.lambd_schedule, variant.lr) == (5, "rising", 0.2)
    plain = comparison.train_config(Run(Setting("centroid", 4.0, 0.3), seed=2))
    assert (plain.epochs, plain.lambd_schedule, plain.lr) == (3, "constant", 0.2)


def test_training_has_the_options_of_its_surrogate() -> None:
    grid = GridOptions(
        surrogates=("none", "mixture", "centroid", "slow", "wide"),
        variants=("slow: {centroid: {momentum: 0.999}}", "wide: {surrogate: attention, attention: {num_slots: 3}}"),
        members={"centroid": CentroidCEM.Options(momentum=0.97)},
    )
    comparison = Comparison(grid=grid).checked()
    trainings = {run.setting.method: comparison.train_config(run) for run in comparison.grid.runs() if run.seed == 0}
    assert [each.surrogate for each in trainings.values()] == ["none", "mixture", "centroid", "centroid", "attention"]
    assert trainings["centroid"].options_of("centroid").momentum == 0.97
    assert trainings["slow"].options_of("centroid").momentum == 0.999
    assert trainings["wide"].options_of("attention").num_slots == 3


class Rounded(Defense):
    """A defense with options, of this module."""

    name = "rounded"

    @dataclass(frozen=True)
    class Options(Defense.Options):
        """Of the defense.

        Attributes:
            digits: that are left.
            base: of the digits.
        """

        digits: int = option(3)
        base: int = option(10)


def test_training_of_a_variant_has_defenses_of_its_own() -> None:
    grid = GridOptions(
        surrogates=("none", "bare", "coarse"),
        variants=("bare: {defenses: []}", "coarse: {rounded: {digits: 1}}"),
        seeds=(0,),
    )
    train = TrainConfig(defenses=(f"{__name__}:Rounded",), members={"rounded": Rounded.Options(base=2)})
    comparison = Comparison(grid=grid, train=train).checked()
    none, bare, coarse = map(comparison.train_config, comparison.grid.runs())
    assert (none.options_of("rounded"), bare.defenses) == (Rounded.Options(base=2), ())
    assert coarse.options_of("rounded") == Rounded.Options(digits=1, base=2)


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
            surrogates=("none", "s", "centroid"),
            variants=("s: {surrogate: mixture, mixture: {clusters: 3}}",),
            seeds=(3,),
            lambds=(1.0, 2.0),
            noise_stds=(0.5,),
            jobs=2,
            members={"centroid": CentroidCEM.Options(momentum=0.97)},
        ),
        train=TrainConfig(data="mnist", data_root=Path("x"), epochs=4),
        attack=AttackConfig(max_epochs=5),
    )
    before.to_yaml(tmp_path / "compare.yaml", "python -m cem.compare --out 'a b'")
    after = Comparison.from_yaml(tmp_path / "compare.yaml")
    assert after.to_dict() == before.to_dict()
    assert after.grid.runs() == before.grid.runs()
    assert list(map(after.train_config, after.grid.runs())) == list(map(before.train_config, before.grid.runs()))
    assert after.attack_config() == before.attack_config()
    assert command_of(tmp_path / "compare.yaml") == "python -m cem.compare --out 'a b'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lambd: 16", "lambd: a comparison takes a list, lambds"),
        ("epoch: 3", "there is no option epoch"),
        ("attack: {epoch: 3}", "there is no option attack.epoch"),
        ("attack: 3", "attack must hold a mapping"),
        ("seeds: 3", "--seeds takes a list of: a whole number, got 3"),
        ("[", "cannot read options"),
        ("- 1", "must hold a mapping"),
    ],
)
def test_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"{path}.*") as caught:
        Comparison.from_yaml(path)
    assert message in str(caught.value)


def test_options_of_every_run_are_checked() -> None:
    comparison = Comparison(train=TrainConfig(epochs=1))
    with pytest.raises(UsageError, match="--penalty-from must be at most --epochs 1"):
        comparison.checked()


def test_options_of_the_attack_are_checked() -> None:
    with pytest.raises(UsageError, match=r"--attack\.queries must be at least 1"):
        Comparison(attack=AttackConfig(queries=0)).checked()
