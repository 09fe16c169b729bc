"""``python -m benchmarks.fidelity``: from runs that were attacked to rank correlations."""

import json
import shutil

import pytest

from benchmarks import fidelity
from cem.attacks.config import AttackConfig
from cem.attacks.run import Attack
from cem.errors import CheckpointError
from cem.training.config import TrainConfig
from cem.training.trainer import train

ATTACK = AttackConfig(
    attackers=("deconvC4",),
    aux_size=200,
    score_size=50,
    cycle_epochs=1,
    max_epochs=1,
    white_box_images=4,
    white_box_steps=1,
    device="cpu",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run that was attacked, and copies under three other noises: the more noise, the larger the error."""
    folder = tmp_path_factory.mktemp("runs")
    first = folder / "noise0"
    config = TrainConfig(
        train_size=200, epochs=1, surrogate="none", cut_layer=2, noise_std=0.1, device="cpu", out=first
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cem.training.trainer.draw_tsne", lambda *_, **__: None)
        train(config)
    Attack(first, ATTACK).run()
    for i, noise_std in enumerate((0.2, 0.4, 0.8), start=1):
        copy = folder / f"noise{i}"
        shutil.copytree(first, copy)
        options = (copy / "config.yaml").read_text()
        assert "noise_std: 0.1\n" in options
        (copy / "config.yaml").write_text(options.replace("noise_std: 0.1\n", f"noise_std: {noise_std}\n"))
        attack = json.loads((copy / "attack" / "attack.json").read_text())
        attack["test_target"]["mse"] += i
        del attack["information"]["values"]["centroid"]  # as if attacked before there was one
        (copy / "attack" / "attack.json").write_text(json.dumps(attack))
    return [folder / f"noise{i}" for i in range(4)]


@pytest.mark.parametrize("missing", ["", "best.pt", "attack"], ids=["all there", "no weights", "a value missing"])
def test_values_are_those_that_the_attack_has_written_or_would_write(runs, tmp_path, missing):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run, ignore=shutil.ignore_patterns("best.pt") if missing == "best.pt" else None)
    if missing == "attack":
        content = json.loads((run / "attack" / "attack.json").read_text())
        del content["information"]["within_variance"]
        (run / "attack" / "attack.json").write_text(json.dumps(content))
    row = fidelity.values_of(run, None)
    attack = json.loads((runs[0] / "attack" / "attack.json").read_text())
    assert row["values"] == pytest.approx(attack["information"]["values"])
    for name in ("within_variance", "between_variance"):
        assert row[name] == pytest.approx(attack["information"][name])
    assert row["test_mse"] == attack["test_target"]["mse"]
    assert row["options"]["cut_layer"] == 2
    assert "out" not in row["options"]


def test_command_writes_and_prints_how_well_each_value_ranks_the_errors(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "fidelity.json"
    monkeypatch.setattr("sys.argv", ["fidelity", *map(str, runs), "--out", str(out)])
    fidelity.main()
    content = json.loads(out.read_text())
    assert [row["run"] for row in content["runs"]] == ["noise0", "noise1", "noise2", "noise3"]
    # The same features in more noise say less, by the nats that cross it.
    assert content["spearman"]["log_det"] == {"rho": -1.0, "low": -1.0, "high": -1.0, "runs": 4, "note": ""}
    assert content["of_recommended"]["log_det"] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert "centroid" not in content["of_recommended"]
    assert "log_det              -1.000  [-1.000, -1.000]  4 runs; centroid +0.000" in capsys.readouterr().out


def test_a_folder_stands_for_the_runs_in_it(runs, tmp_path):
    assert fidelity.runs_of(runs[2]) == [runs[2]]
    assert fidelity.runs_of(runs[0].parent) == runs
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="is no run and holds none"):
        fidelity.runs_of(tmp_path)


def test_command_refuses_a_folder_without_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fidelity", str(tmp_path)])
    with pytest.raises(SystemExit):
        fidelity.main()
    assert f"{tmp_path} is no run and holds none" in capsys.readouterr().err


def test_a_run_without_a_value_and_its_weights_is_refused(runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(runs[1], copy, ignore=shutil.ignore_patterns("*.pt"))
    with pytest.raises(CheckpointError, match=r"best\.pt"):
        fidelity.values_of(copy, None)


def test_a_run_that_was_not_attacked_is_refused(runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(runs[0], copy, ignore=shutil.ignore_patterns("attack"))
    with pytest.raises(FileNotFoundError, match=r"attack\.json"):
        fidelity.values_of(copy, None)
