"""What would end a run early is found before the first one begins."""

from dataclasses import replace
from pathlib import Path

import pytest
from fake_runs import finish

from cem.attacks import Attack
from cem.attacks.config import AttackConfig
from cem.comparison import runner
from cem.comparison.config import Comparison
from cem.comparison.grid import OF_CLIENT, GridOptions
from cem.comparison.runner import run_comparison
from cem.errors import CemError, UsageError
from cem.training.config import TrainConfig


class Fussy(Attack):
    """Refuses whatever it sees, in its own words."""

    name = "fussy"
    forecast = run = None

    def check(self, target, own, options):
        assert target.sent["val"].shape[1:] == target.model.feature_shape
        raise UsageError(f"--attacks fussy: {len(target.sent['val'])} of {len(own.val)} images")


ABSENT = {"data": "fashion-mnist", "data_root": Path("absent")}


@pytest.mark.parametrize(
    ("variant", "train", "attack", "message"),
    [
        ("", ABSENT, {}, "train-images-idx3-ubyte[.gz] is neither in absent nor in"),
        ("", {"train_size": 5000}, {}, "train_size must be in 1..1294 for digits, got 5000"),
        ("", {"arch": "resnet21"}, {}, "arch must be one of "),
        ("", {"init_from": Path("absent")}, {}, "absent"),
        ("", {"cut_layer": (4, 99)}, {}, "cut_layer must be in 1.."),
        ("s: {arch: resnet21}", {}, {}, "--variants: s: arch must be one of "),
        ("s: {train_size: 5000}", {}, {}, "--variants: s: train_size must be in"),
        ("", {}, {"aux_size": 5000}, "--attack.aux-size must be in 1.."),
        ("", {}, {"aux_size": 5000, "knowledge": ("auxiliary", "training")}, "--attack.aux-size must be in 1.."),
        ("", {}, {"attacks": (f"{__name__}:Fussy",)}, "--attack.attacks fussy: 28 of 28 images"),
    ],
)
def test_what_cannot_be_run_is_refused_in_the_words_of_the_comparison_and_nothing_is_written(
    tmp_path, monkeypatch, variant, train, attack, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run_queues", lambda *_, **__: pytest.fail("it is run"))
    client, train = ({name: train[name] for name in train if (name in OF_CLIENT) == of} for of in (True, False))
    variants = (variant,) if variant else ()
    grid = GridOptions(surrogates=("none", "s") if variant else ("none",), variants=variants, **client)
    comparison = Comparison(grid, TrainConfig(surrogate="none", **train), AttackConfig(**attack), Path("out")).checked()
    with pytest.raises(CemError) as refused:
        run_comparison(comparison, "command")
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_what_is_finished_needs_no_data(tmp_path):
    comparison = finish(Comparison(GridOptions(seeds=(0,)), TrainConfig(surrogate="none"), out=tmp_path / "out"))
    (tmp_path / "out" / "compare.yaml").touch()
    train = replace(comparison.train, data_root=Path("absent"))
    run_comparison(replace(comparison, train=train), "command")
    assert "data_root: absent" in (tmp_path / "out" / "compare.yaml").read_text()
