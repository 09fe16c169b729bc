"""The options of a comparison, and what becomes of them in its runs."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from cem.attacks.config import AttackConfig
from cem.attacks.decoder import Decoder
from cem.comparison.config import Comparison, command_of
from cem.comparison.grid import GridOptions
from cem.defenses import Defense
from cem.errors import UsageError
from cem.options import option
from cem.surrogates import CentroidCEM
from cem.training.config import TrainConfig


class Rounded(Defense):
    """A defense with options, of this module."""

    name = "rounded"

    @dataclass(frozen=True)
    class Options(Defense.Options):
        digits: int = option(3)
        base: int = option(10)


def test_training_of_a_variant_has_options_and_defenses_of_its_own_over_the_shared_ones():
    variants = ("bare: {defenses: [], epochs: 5}", "coarse: {rounded: {digits: 1}}")
    grid = GridOptions(surrogates=("none", "bare", "coarse"), variants=variants, seeds=(2,))
    train = TrainConfig(defenses=(f"{__name__}:Rounded",), members={"rounded": Rounded.Options(base=2)}, epochs=3)
    comparison = Comparison(grid=grid, train=train).checked()
    none, bare, coarse = map(comparison.train_config, comparison.grid.runs())
    assert [each.epochs for each in (none, bare, coarse)] == [3, 5, 3]
    assert (bare.surrogate, bare.lambd, bare.noise_std, bare.seed, bare.defenses) == ("slots", 0.5, 0.3, 2, ())
    assert none.options_of("rounded") == Rounded.Options(base=2)
    assert coarse.options_of("rounded") == Rounded.Options(digits=1, base=2)


def test_attack_computes_where_the_trainings_do_unless_it_says_otherwise():
    train = TrainConfig(device="cuda", data_root=Path("data"))
    assert Comparison(train=train).attack_config() == AttackConfig(device="cuda", data_root=Path("data"))
    assert Comparison(train=train, attack=AttackConfig(device="cpu")).attack_config().device == "cpu"


def test_file_gives_back_the_options_and_the_command(tmp_path):
    variants = ("s: {surrogate: mixture, mixture: {clusters: 3}}",)
    grid = GridOptions(("none", "s", "centroid"), variants, seeds=(3,), lambds=(1.0, 2.0), adapter=(0, 2), jobs=2)
    grid = GridOptions.from_dict(grid.to_dict() | {"centroid": CentroidCEM.Options(momentum=0.9).to_dict()})
    train = TrainConfig(data="mnist", data_root=Path("x"), epochs=4)
    before = Comparison(grid, train, AttackConfig(aux_size=5, members={"decoder": Decoder.Options(max_cycles=3)}))
    before.to_yaml(tmp_path / "compare.yaml", "python -m cem.compare --out 'a b'")
    after = Comparison.from_yaml(tmp_path / "compare.yaml")
    assert after.to_dict() == before.to_dict()
    assert list(map(after.train_config, after.grid.runs())) == list(map(before.train_config, before.grid.runs()))
    assert after.attack_config().checked() == before.attack_config().checked()
    assert command_of(tmp_path / "compare.yaml") == "python -m cem.compare --out 'a b'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lambd: 16", "lambd: a comparison takes a list, lambds"),
        ("attack: {epoch: 3}", "attack: there is no option epoch"),
        ("attack: 3", "attack must hold a mapping"),
        ("seeds: 3", "--seeds takes a list of: a whole number, got 3"),
        ("[", "cannot read options"),
    ],
)
def test_file_that_cannot_be_used_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"{path}.*") as caught:
        Comparison.from_yaml(path)
    assert message in str(caught.value)


def test_options_of_every_run_and_of_the_attack_are_checked():
    with pytest.raises(UsageError, match="--penalty-from must be at most --epochs 1"):
        Comparison(train=TrainConfig(epochs=1, penalty_from=2)).checked()
    with pytest.raises(UsageError, match=r"--attack\.queries must be at least 1"):
        Comparison(attack=AttackConfig(queries=0)).checked()
    own = {"decoder": Decoder.Options(max_cycles=0)}
    with pytest.raises(UsageError, match=r"--attack\.decoder\.max-cycles must be at least 1"):
        Comparison(attack=AttackConfig(members=own)).checked()
    grid = GridOptions(surrogates=("none", "s"), variants=("s: {warmup_epochs: 99}",))
    with pytest.raises(UsageError, match="--variants: s: --warmup-epochs must be at most --epochs 20, got 99"):
        Comparison(grid).checked()
