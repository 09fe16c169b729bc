"""``python -m cem.attack``: options in, exit code, table and directory out."""

from __future__ import annotations

import json
import signal
from dataclasses import fields
from pathlib import Path

import pytest

from cem import attack as command
from cem import train
from cem.attacks.config import AttackConfig

FAST = ["--attackers", "deconvC4", "--cycle-epochs", "1", "--max-epochs", "1", "--aux-size", "64", "--score-size", "20"]
FAST += ["--white-box-images", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _own_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr("cem.training.trainer.draw_tsne", lambda *_, **__: None)
        options = [
            "--surrogate=none",
            "--train-size=64",
            "--epochs=1",
            "--cut-layer=2",
            "--device=cpu",
            f"--out={path}",
        ]
        assert train.main(options) == 0
    return path


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    for field in fields(AttackConfig):
        assert f"--{field.name.replace('_', '-')}" in text


def test_table_says_what_was_found(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(run_dir), *FAST, "--out", str(tmp_path / "attack")]) == 0
    result = json.loads((tmp_path / "attack" / "attack.json").read_text())
    out = capsys.readouterr().out
    assert "strongest decoder, deconvC4" in out
    assert f"{result['test_target']['mse']:.5f}" in out
    assert f"{result['controls']['class_mean']['train_target']['mse']:.5f}" in out
    assert "white box" not in out


def test_an_under_trained_decoder_is_flagged(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(run_dir), *FAST, "--out", str(tmp_path / "attack")]) == 0
    result = json.loads((tmp_path / "attack" / "attack.json").read_text())
    assert result["converged"] is False
    assert result["attackers"][0]["converged"] is False
    captured = capsys.readouterr()
    assert "not converged: deconvC4; --max-epochs 3 would give it another cycle" in captured.out
    assert "deconvC4 had not converged" in captured.err


def test_the_same_command_again_changes_nothing(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(run_dir), *FAST, "--out", str(tmp_path / "attack")]
    assert command.main(line) == 0
    first = capsys.readouterr().out
    assert command.main(line) == 0
    again = capsys.readouterr().out
    assert "was finished already; nothing was changed." in again
    assert again.endswith(first)


def test_options_of_another_attack_can_be_taken_over(run_dir: Path, tmp_path: Path) -> None:
    AttackConfig(attackers=("deconvC8:l1",), queries=3).to_yaml(tmp_path / "mine.yaml")
    run, config, out = command.parse([str(run_dir), "--config", str(tmp_path / "mine.yaml"), "--queries", "2"])
    assert (run, config.attackers, config.queries, out) == (run_dir, ("deconvC8:l1",), 2, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["RUN", "--attackers", "resnet"], "decoders are named like res_normN8C64"),
        (["RUN", "--querys", "2"], "there is no option --querys; did you mean --queries?"),
        (["RUN", "--queries", "many"], "--queries takes a whole number, got 'many'"),
        (["RUN", "--aux-size", "1000000"], "--aux-size must be in 1.."),
        (["RUN", "--control", "nowhere"], "--control nowhere has no finished attack"),
        (["nowhere"], "nowhere holds no finished run"),
        ([], "which run? python -m cem.attack RUN [options]; RUN comes first"),
    ],
)
def test_bad_options_end_with_2_and_one_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = ["--out", str(tmp_path / "attack")]
    assert command.main([str(run_dir) if option == "RUN" else option for option in options] + out) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "attack").exists()


def test_interruption_ends_with_130(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cem.attacks.run.fit_decoder", interrupt)
    assert command.main([str(run_dir), *FAST, "--out", str(tmp_path / "attack")]) == 130


def test_divergence_ends_with_1_and_says_why(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [str(run_dir), *FAST, "--lr", "1e30", "--batch-size", "8", "--out", str(tmp_path / "attack")]
    assert command.main(line) == 1
    assert "lower --lr" in capsys.readouterr().err
