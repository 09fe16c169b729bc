"""What is left to do: nothing that is finished is done again, nothing foreign is touched."""

import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from fake_runs import fake_attack, fake_training

from cem.attacks import DEFAULT, Attack
from cem.attacks.config import AttackConfig
from cem.attacks.decoder import Decoder
from cem.comparison.config import Comparison
from cem.comparison.grid import GridOptions, Run, Setting
from cem.comparison.plan import check_options, check_out, remaining_steps
from cem.errors import CheckpointError, UsageError
from cem.surrogates import GaussianMixtureCEM
from cem.training.config import TrainConfig

RUN = Run(Setting("mixture", 16.0, 0.1), 0)


@pytest.fixture
def comparison(tmp_path):
    return Comparison(train=TrainConfig(epochs=3, device="cpu"), out=tmp_path / "out")


@pytest.fixture
def interrupted(comparison):
    """Its directory of a run that was interrupted in training."""
    run_dir = fake_training(comparison, RUN)
    (run_dir / "summary.json").unlink()
    return run_dir


@pytest.fixture
def finished(comparison):
    """Its directory of a run that was trained and attacked."""
    run_dir = fake_training(comparison, RUN)
    fake_attack(comparison, RUN)
    return run_dir


def test_run_that_is_not_there_is_trained_and_attacked_with_files_of_its_options(comparison):
    training, attack = (step.command for step in remaining_steps(comparison, RUN))
    run_dir, options = comparison.run_dir(RUN), comparison.out / "options"
    mine, shared = options / f"{RUN.name}.yaml", options / "attack.yaml"
    assert training == (sys.executable, "-m", "cem.train", "--config", str(mine), "--out", str(run_dir))
    assert attack == (sys.executable, "-m", "cem.attack", str(run_dir), "--config", str(shared))
    assert TrainConfig.from_yaml(mine).to_dict() == comparison.train_config(RUN).to_dict()
    assert AttackConfig.from_yaml(shared).to_dict() == comparison.attack_config().to_dict()


def test_finished_run_is_left_alone_also_from_another_device(comparison, finished):
    elsewhere = replace(comparison, train=replace(comparison.train, device="cuda:99", data_root=Path("moved")))
    for each in (comparison, elsewhere):
        check_options(each, RUN)
        assert remaining_steps(each, RUN) == []


def test_interrupted_training_is_resumed_where_the_command_says(comparison, interrupted):
    resume = ("cem.train", "--resume", str(interrupted))
    elsewhere = replace(comparison, train=replace(comparison.train, device="cuda", download=True, num_workers=2))
    for each, flags in ((comparison, ()), (elsewhere, ("--device", "cuda", "--download", "--num-workers", "2"))):
        check_options(each, RUN)
        assert remaining_steps(each, RUN)[0].command[2:] == resume + flags


def test_directory_with_something_else_is_refused_and_kept(comparison):
    foreign = comparison.run_dir(RUN) / "thesis.tex"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    with pytest.raises(UsageError, match=r"is in the way of a run: it holds thesis.tex"):
        check_options(comparison, RUN)
    assert foreign.exists()


@pytest.mark.parametrize("made", ["finished", "interrupted"])
def test_run_of_other_options_is_refused_by_name(comparison, made, request):
    options = request.getfixturevalue(made) / "config.yaml"
    other = replace(comparison, train=replace(comparison.train, lr=0.1))
    with pytest.raises(UsageError, match=r"trained under other options: --lr \(was 0.05, got 0.1\)"):
        check_options(other, RUN)
    grid = GridOptions(members={"mixture": GaussianMixtureCEM.Options(clusters=3)})
    with pytest.raises(UsageError, match=r"trained under other options: --mixture.clusters \(was None, got 3\)"):
        check_options(replace(comparison, grid=grid), RUN)
    options.write_text(options.read_text().replace("format: 2\n", ""))
    with pytest.raises(CheckpointError, match="was made by another version"):
        check_options(comparison, RUN)


def test_attack_of_other_options_is_refused_by_name(comparison, finished):
    with pytest.raises(UsageError, match=r"attacked under other options: --attack.aux-size \(was None, got 9\)"):
        check_options(replace(comparison, attack=AttackConfig(aux_size=9)), RUN)


class Another(Attack):
    name = "another"


@pytest.mark.parametrize(
    "more",
    [
        {"queries": 10},
        {"knowledge": ("auxiliary", "training")},
        {"attacks": (*DEFAULT, f"{__name__}:Another")},
        {"members": {"decoder": Decoder.Options(max_cycles=9)}},
    ],
    ids=str,
)
def test_run_that_was_attacked_with_less_is_attacked_again_and_then_left_alone(comparison, finished, more):
    more = replace(comparison, attack=AttackConfig(**more))
    check_options(more, RUN)
    (step,) = remaining_steps(more, RUN)
    assert step.kind == "attack"
    shutil.rmtree(finished / "attack")
    fake_attack(more, RUN)
    assert remaining_steps(more, RUN) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": []}', '{"config": {"attacks": ["x"]}}'])
def test_attack_of_which_the_result_is_damaged_is_not_finished(comparison, finished, content):
    (finished / "attack" / "attack.json").write_text(content)
    assert [step.kind for step in remaining_steps(comparison, RUN)] == ["attack"]


@pytest.mark.parametrize(
    ("made", "refusal"),
    [
        ("", "--out .*out: it exists and is no directory"),
        ("/thesis.tex", "--out .*out holds thesis.tex, but no comparison; choose another one"),
        ("/.lock", ""),
        ("/.compare.yaml.0123456789abcdef.tmp", ""),
        ("/compare.yaml", ""),
    ],
)
def test_folder_with_something_else_than_a_comparison_is_refused(tmp_path, made, refusal):
    path = Path(f"{tmp_path}/out{made}")
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(UsageError, match=refusal) if refusal else nullcontext():
        check_out(tmp_path / "out")
