"""``python -m cem.attack``: options in, exit code, table and directory out."""

import json
from pathlib import Path

import pytest

from cem import attack as command
from cem.attacks.config import AttackConfig

FAST = ["--attackers=deconvC4", "--cycle-epochs=1", "--max-epochs=1", "--aux-size=64", "--score-size=20"]
FAST += ["--white-box-images=0"]


@pytest.fixture(scope="module")
def attacked(trained, run, tmp_path_factory):
    return run(command, [str(trained.path), *FAST, "--device=cpu"], tmp_path_factory.mktemp("command") / "attack")


def test_attack_says_what_it_does_what_was_found_and_what_comes_next(trained, attacked):
    result = json.loads((attacked.path / "attack.json").read_text())
    assert attacked.err.startswith(f"attack on {trained.path}: 64 images to train decoders on, ")
    assert "; deconvC4, at most 1 epochs each; white box on 0 images; queries an image: 1; cpu\n" in attacked.err
    assert "decoders take about 0 s, less where they converge early\n" in attacked.err
    assert "strongest decoder, deconvC4" in attacked.out
    assert f"{result['test_target']['mse']:.5f}" in attacked.out
    assert f"{result['controls']['class_mean']['train_target']['mse']:.5f}" in attacked.out
    assert "white box" not in attacked.out
    assert f"\nresults   {attacked.path}: attack.json" in attacked.out
    assert attacked.out.splitlines()[-1].startswith("next      python -m cem.compare --quick ")
    assert result["converged"] is result["attackers"][0]["converged"] is False
    assert "not converged: deconvC4; --max-epochs 3 would give it another cycle" in attacked.out
    assert "deconvC4 had not converged" in attacked.err


def test_the_same_command_again_changes_nothing(trained, attacked, run):
    before = {path: path.stat().st_mtime_ns for path in attacked.path.iterdir()}
    again = run(command, [str(trained.path), *FAST], attacked.path)
    assert again.out == f"The attack in {attacked.path} was finished already; nothing was changed.\n{attacked.out}"
    assert {path: path.stat().st_mtime_ns for path in attacked.path.iterdir()} == before


def test_options_of_another_attack_can_be_taken_over(tmp_path):
    AttackConfig(attackers=("deconvC8:l1",), queries=3).to_yaml(tmp_path / "mine.yaml")
    path, config, out = command.parse(["RUN", "--config", str(tmp_path / "mine.yaml"), "--queries", "2"])
    assert (path, config.attackers, config.queries, out) == (Path("RUN"), ("deconvC8:l1",), 2, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("RUN --attackers resnet", "decoders are named like res_normN8C64"),
        ("RUN --aux-size 1000000", "--aux-size must be in 1.."),
        ("RUN --score-size 65", "--score-size must be in 1..64 for this run, got 65"),
        ("RUN --control nowhere", "--control nowhere has no finished attack"),
        ("nowhere", "nowhere holds no finished run"),
        ("", "which run? python -m cem.attack RUN [options]; RUN comes first"),
    ],
)
def test_bad_options_end_with_2_and_one_line(trained, run, tmp_path, line, message):
    said = run(command, line.replace("RUN", str(trained.path)).split(), tmp_path / "attack")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert message in said.err
    assert not said.path.exists()
