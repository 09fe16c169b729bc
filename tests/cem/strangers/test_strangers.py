"""Surrogates and defenses from outside the package live in every command, under their own names."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from cem.attack import main as attack
from cem.compare import main as compare
from cem.train import main as train

HERE = Path(__file__).parent
SURROGATE, DEFENSE = "strangers.brightness:Brightness", "strangers.rival:Rival"
CHOSEN = ["--surrogate", SURROGATE, "--brightness.decay", "0.8", "--defenses", DEFENSE, "--rival.weight", "0.5"]
SMALL = ["--train-size", "300", "--epochs", "3", "--arch", "vgg11", "--cut-layer", "2", "--device", "cpu"]
DYING = """
import os, signal, sys
from strangers.brightness import Brightness
from cem.train import main

measure, calls = Brightness.measure, []

def dying(self, batch):
    calls.append(batch)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(self, batch)

Brightness.measure = dying
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE.parents[2])]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE.parent))
        run_dir = tmp_path_factory.mktemp("strangers") / "run"
        assert train([*CHOSEN, *SMALL, "--out", str(run_dir)]) == 0
    return run_dir


def rows(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


def test_their_options_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        train(["--surrogate", SURROGATE, "--defenses", DEFENSE, "--help"])
    shown = capsys.readouterr().out
    assert "--brightness.decay X" in shown
    assert "What is kept of the running mean in a step. (default: 0.9)" in " ".join(shown.split())
    assert "--rival.steps N" in shown


def test_their_options_are_in_the_run_and_its_name(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["surrogate"], config["defenses"]) == (SURROGATE, [DEFENSE])
    assert (config["brightness"], config["rival"]) == ({"decay": 0.8}, {"weight": 0.5, "steps": 2})
    assert config["lambd"] == 0.5


def test_their_monitors_are_columns_and_their_state_is_kept(run):
    last = rows(run)[-1]
    assert 0 < float(last["rob_loss"]) < 1
    assert float(last["brightness.strongest"]) > 0
    assert float(last["rival.error"]) > 0
    assert float(last["rival.loss"]) == pytest.approx(-float(last["rival.error"]))
    content = torch.load(run / "last.pt", weights_only=True)
    assert content["surrogate"]["epochs"] == 3
    assert content["surrogate"]["mean"] > 0
    assert content["optimizers"]["defenses.rival.adam"]["state"][0]["step"] == 2 * 3 * 3  # steps, batches, epochs


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(run, tmp_path):
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", DYING, *CHOSEN, *SMALL, "--out", str(killed)]
    # As many threads as here: another number may add up in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert len(rows(killed)) == 2
    assert train(["--resume", str(killed)]) == 0
    assert rows(killed) == rows(run)
    before, after = (torch.load(each / "last.pt", weights_only=True) for each in (run, killed))
    for part in ("encoder", "server", "surrogate", "defenses.rival"):
        assert all(torch.equal(before[part][name], after[part][name]) for name in before[part])


def test_the_run_is_attacked_with_the_defense_on(run):
    options = ["--attackers", "res_normN1C8", "--cycle-epochs", "1", "--max-epochs", "1", "--white-box-images", "0"]
    assert attack([str(run), *options]) == 0
    result = json.loads((run / "attack" / "attack.json").read_text())
    assert result["run"]["surrogate"] == SURROGATE
    assert result["run"]["defenses"] == [DEFENSE]
    assert result["test_target"]["mse"] > 0


@pytest.mark.slow
def test_they_are_compared_under_their_own_name(tmp_path):
    grid = ["--surrogates", SURROGATE, "--seeds", "0", "--brightness.decay", "0.8", "--defenses", DEFENSE]
    quick = ["--attack.attackers", "res_normN1C8", "--attack.cycle-epochs", "1", "--attack.max-epochs", "1"]
    quick += ["--attack.white-box-images", "0"]
    assert compare([*grid, *SMALL, *quick, "--out", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        assert [(row["method"], row["status"]) for row in csv.DictReader(file)] == [("brightness", "finished")]
    config = yaml.safe_load((tmp_path / "out" / "brightness-lambd0.5-noise0.1-seed0" / "config.yaml").read_text())
    assert config["brightness"] == {"decay": 0.8}
