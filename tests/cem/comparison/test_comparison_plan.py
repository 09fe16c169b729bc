"""What is left to do: nothing that is finished is done again, nothing foreign is touched."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_runs import fake_attack, fake_training

from cem.attacks.config import AttackConfig
from cem.comparison.config import Comparison
from cem.comparison.grid import GridOptions, Run, Setting
from cem.comparison.plan import check_options, remaining_steps
from cem.errors import CheckpointError, UsageError
from cem.surrogates import GaussianMixtureCEM
from cem.training.config import TrainConfig

RUN = Run(Setting("mixture", 16.0, 0.1), 0)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return Comparison(train=TrainConfig(epochs=3, device="cpu"), out=tmp_path / "out")


def interrupted(comparison: Comparison) -> Path:
    run_dir = fake_training(comparison, RUN)
    (run_dir / "summary.json").unlink()
    return run_dir


def test_run_that_is_not_there_is_trained_and_attacked(comparison: Comparison) -> None:
    training, attack = remaining_steps(comparison, RUN)
    run_dir, options = comparison.run_dir(RUN), comparison.out / "options"
    assert training.command == (
        *(sys.executable, "-m", "cem.train", "--config", str(options / f"{RUN.name}.yaml"), "--out", str(run_dir)),
    )
    assert attack.command == (
        *(sys.executable, "-m", "cem.attack", str(run_dir), "--config", str(options / "attack.yaml")),
        *("--out", str(run_dir / "attack")),
    )


def test_option_files_are_those_that_the_commands_read(comparison: Comparison) -> None:
    remaining_steps(comparison, RUN)
    options = comparison.out / "options"
    assert TrainConfig.from_yaml(options / f"{RUN.name}.yaml").to_dict() == comparison.train_config(RUN).to_dict()
    assert AttackConfig.from_yaml(options / "attack.yaml") == comparison.attack_config()


def test_option_file_of_a_variant_has_the_options_of_its_surrogate(comparison: Comparison) -> None:
    grid = GridOptions(surrogates=("slow",), variants=("slow: {centroid: {momentum: 0.999}}",))
    run = grid.runs()[0]
    remaining_steps(replace(comparison, grid=grid), run)
    written = TrainConfig.from_yaml(comparison.out / "options" / f"{run.name}.yaml")
    assert (written.surrogate, written.options_of("centroid").momentum) == ("centroid", 0.999)


def test_finished_training_is_only_attacked(comparison: Comparison) -> None:
    fake_training(comparison, RUN)
    check_options(comparison, RUN)
    assert [step.kind for step in remaining_steps(comparison, RUN)] == ["attack"]


def test_finished_run_is_left_alone(comparison: Comparison) -> None:
    fake_training(comparison, RUN)
    fake_attack(comparison, RUN)
    check_options(comparison, RUN)
    assert remaining_steps(comparison, RUN) == []


def test_attack_with_more_queries_lies_beside_the_other(comparison: Comparison) -> None:
    fake_training(comparison, RUN)
    fake_attack(comparison, RUN)
    more = replace(comparison, attack=AttackConfig(queries=10))
    check_options(more, RUN)
    (step,) = remaining_steps(more, RUN)
    assert step.command[-1] == str(comparison.run_dir(RUN) / "attack-queries10")


def test_interrupted_training_is_resumed(comparison: Comparison) -> None:
    run_dir = interrupted(comparison)
    check_options(comparison, RUN)
    assert remaining_steps(comparison, RUN)[0].command[2:] == ("cem.train", "--resume", str(run_dir))


def test_interrupted_training_is_resumed_where_the_command_says(comparison: Comparison) -> None:
    interrupted(comparison)
    elsewhere = replace(comparison, train=replace(comparison.train, device="cuda", download=True, num_workers=2))
    check_options(elsewhere, RUN)
    assert remaining_steps(elsewhere, RUN)[0].command[5:] == (
        *("--device", "cuda", "--download", "--num-workers", "2"),
    )


def test_training_that_stopped_before_its_first_checkpoint_begins_anew(comparison: Comparison) -> None:
    run_dir = interrupted(comparison)
    for path in run_dir.iterdir():
        if path.name != "config.yaml":
            path.unlink()
    (run_dir / "train.log").touch()
    (run_dir / ".last.pt.123.tmp").touch()
    check_options(comparison, RUN)
    assert "--config" in remaining_steps(comparison, RUN)[0].command
    assert not run_dir.exists()


def test_directory_with_something_else_is_refused_and_kept(comparison: Comparison) -> None:
    run_dir = comparison.run_dir(RUN)
    run_dir.mkdir(parents=True)
    (run_dir / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"is in the way of a run: it holds thesis.tex"):
        check_options(comparison, RUN)
    assert (run_dir / "thesis.tex").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_run_of_other_options_is_refused_by_name(comparison: Comparison, finished: bool) -> None:
    if finished:
        fake_training(comparison, RUN)
    else:
        interrupted(comparison)
    other = replace(comparison, train=replace(comparison.train, lr=0.1))
    with pytest.raises(UsageError, match=r"trained under other options: --lr \(was 0.05, got 0.1\)"):
        check_options(other, RUN)


def test_run_of_other_options_of_its_surrogate_is_refused_by_name(comparison: Comparison) -> None:
    fake_training(comparison, RUN)
    grid = GridOptions(members={"mixture": GaussianMixtureCEM.Options(clusters=3)})
    with pytest.raises(UsageError, match=r"trained under other options: --mixture.clusters \(was None, got 3\)"):
        check_options(replace(comparison, grid=grid), RUN)


def test_run_of_another_version_is_refused(comparison: Comparison) -> None:
    options = fake_training(comparison, RUN) / "config.yaml"
    options.write_text(options.read_text().replace("format: 2\n", ""))
    with pytest.raises(CheckpointError, match="was made by another version"):
        check_options(comparison, RUN)


def test_attack_of_other_options_is_refused_by_name(comparison: Comparison) -> None:
    fake_training(comparison, RUN)
    fake_attack(comparison, RUN)
    other = replace(comparison, attack=AttackConfig(max_epochs=9))
    with pytest.raises(UsageError, match=r"attacked under other options: --attack.max-epochs \(was 75, got 9\)"):
        check_options(other, RUN)


def test_run_made_on_another_device_is_accepted(comparison: Comparison) -> None:
    fake_training(comparison, RUN)
    fake_attack(comparison, RUN)
    elsewhere = replace(comparison, train=replace(comparison.train, device="cuda:99", data_root=Path("moved")))
    check_options(elsewhere, RUN)
    assert remaining_steps(elsewhere, RUN) == []
