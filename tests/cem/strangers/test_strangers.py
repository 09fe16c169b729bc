"""Surrogates, defenses and attacks from outside the package live in every command, under their own names."""

import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml

from cem import attack, compare, train

HERE = Path(__file__).parent
SURROGATE, DEFENSE = "strangers.brightness:Brightness", "strangers.rival:Rival"
CHOSEN = ["--surrogate", SURROGATE, "--brightness.decay", "0.8", "--defenses", DEFENSE, "--rival.weight", "0.5"]
SMALL = ["--train-size", "300", "--epochs", "3", "--arch", "resnet20", "--cut-layer", "1", "--device", "cpu"]
QUICK = ["attacks=decoder", "decoder.networks=preactN1C8", "decoder.cycle-epochs=1", "decoder.max-cycles=1"]


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE.parent))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE.parents[2])]))  # of compare's processes
        yield


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, run):
    return run(train, [*CHOSEN, *SMALL], tmp_path_factory.mktemp("strangers") / "run").path


def test_their_monitors_are_columns_and_their_state_is_kept(theirs):
    with open(theirs / "metrics.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    assert float(last["brightness.strongest"]) > 0
    assert float(last["rival.loss"]) == pytest.approx(-float(last["rival.error"]))
    content = torch.load(theirs / "last.pt", weights_only=True)
    assert content["surrogate"]["mean"] > 0
    assert content["optimizers"]["defenses.rival.adam"]["state"][0]["step"] == 2 * 3 * 3  # steps, batches, epochs


def test_the_run_is_attacked_with_the_defense_on(theirs, run):
    assert run(attack, [str(theirs), *(f"--{option}" for option in QUICK)]).code == 0
    result = json.loads((theirs / "attack" / "attack.json").read_text())
    assert result["run"]["surrogate"] == SURROGATE
    assert result["run"]["defenses"] == [DEFENSE]
    assert result["worst"]["mse"]["value"] > 0


def test_an_attack_of_theirs_stands_beside_ours_with_options_under_its_own_name(theirs, run, tmp_path, monkeypatch):
    page = (HERE.parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```python\n(# ridge\.py\n.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "ridge.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    line = [*QUICK[1:], "ridge.penalty=0.1", "aux-size=300", "score-size=50"]
    said = run(
        attack, [str(theirs), "--attacks", "decoder", "ridge:Ridge", *(f"--{each}" for each in line)], tmp_path / "out"
    )
    assert said.code == 0
    result = json.loads((tmp_path / "out" / "attack.json").read_text())
    assert [*result["attacks"]] == ["decoder", "ridge"]
    assert result["config"]["ridge"] == {"penalty": 0.1}
    assert result["attacks"]["ridge"]["metrics"]["mse"] < result["controls"]["mean_image"]["metrics"]["mse"]


@pytest.mark.slow
def test_they_are_compared_under_their_own_name(tmp_path, run):
    grid = ["--surrogates", SURROGATE, "--seeds", "0", "--brightness.decay", "0.8", "--defenses", DEFENSE]
    grid += [*SMALL, *(f"--attack.{option}" for option in QUICK)]
    assert run(compare, grid, tmp_path / "out").code == 0
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        assert [(row["method"], row["status"]) for row in csv.DictReader(file)] == [("brightness", "finished")]
    config = yaml.safe_load((tmp_path / "out" / "brightness-lambd0.5-cut1-noise0.3-seed0" / "config.yaml").read_text())
    assert config["brightness"] == {"decay": 0.8}
