"""What a run leaves in its directory, which directory that is, and how a run is got back out of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Scale, board, log, rows, surrogate

from cem.errors import CheckpointError, UsageError
from cem.training import TrainConfig, Trainer, load_run, read_config, read_summary, train
from cem.training import checkpoint as checkpoints
from cem.training import trainer as trainer_module
from cem.training.evaluation import accuracy
from cem.training.runlog import COLUMNS
from cem.training.runs import new_run_dir, peak_memory

MakeConfig = Callable[..., TrainConfig]
OPTIONS: dict[str, Any] = {
    "surrogate": surrogate(Scale),
    "train_size": 200,
    "batch_size": 32,
    "epochs": 4,
    "lambd": 0.5,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, pictures and all."""
    return train(TrainConfig(**OPTIONS, out=tmp_path_factory.mktemp("runs") / "a"))


def summary(run_dir: Path) -> dict[str, Any]:
    found = read_summary(run_dir)
    assert found is not None
    return found


def test_run_directory_holds_every_file(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert names == {
        "config.yaml",
        "metrics.csv",
        "summary.json",
        "curves.png",
        "tsne.png",
        "train.log",
        "last.pt",
        "best.pt",
    }
    assert len(list(run_dir.glob("events.out.tfevents.*"))) == 1


def test_config_is_accepted_back_and_does_not_claim_the_directory_again(run_dir: Path) -> None:
    assert read_config(run_dir).checked() == TrainConfig(**OPTIONS).checked().resolved()


def test_metrics_have_a_row_per_epoch_the_named_columns_and_those_of_monitors(run_dir: Path) -> None:
    table = rows(run_dir)
    assert [row["epoch"] for row in table] == [1, 2, 3, 4]
    assert tuple(table[-1]) == (*COLUMNS, "scale.weight_now")


def test_train_loss_is_the_weighted_sum_of_its_terms(run_dir: Path) -> None:
    for row in rows(run_dir):
        expected = row["cross_entropy"] + row["lambda_eff"] * row["rob_loss"]
        assert row["train_loss"] == pytest.approx(expected, rel=1e-12)


def test_metrics_follow_the_schedules(run_dir: Path) -> None:
    table = rows(run_dir)
    assert [row["lr"] for row in table] == pytest.approx([0.05, 0.01, 0.002, 0.0004])
    assert [row["lambda_eff"] for row in table] == [0.0, 0.5, 0.5, 0.5]  # from epoch 2


def test_surrogate_time_is_part_of_the_time(run_dir: Path) -> None:
    others = rows(run_dir)[1:]
    assert all(0 < row["surrogate_seconds"] < row["seconds"] for row in others)


def test_summary_has_exactly_the_named_keys(run_dir: Path) -> None:
    found = json.loads((run_dir / "summary.json").read_text())
    assert set(found) == {
        "test_accuracy",
        "best_epoch",
        "epochs",
        "train_seconds",
        "surrogate_seconds",
        "rob_loss",
        "intra_mse",
        "parameters",
        "skipped_steps",
        "peak_memory_bytes",
        "device",
        "versions",
    }
    assert {"encoder", "server", "surrogate"} <= set(found["parameters"])
    assert {"python", "torch", "triton", "numpy", "cem"} <= set(found["versions"])


def test_summary_agrees_with_the_metrics(run_dir: Path) -> None:
    found, table = summary(run_dir), rows(run_dir)
    best = table[found["best_epoch"] - 1]
    assert (found["rob_loss"], found["intra_mse"]) == (best["rob_loss"], best["intra_mse"])
    assert found["train_seconds"] == pytest.approx(sum(row["seconds"] for row in table))
    assert (found["epochs"], found["device"], found["skipped_steps"]) == (4, "cpu", 0)


def test_best_is_chosen_under_the_strongest_penalty(run_dir: Path) -> None:
    assert checkpoints.load(run_dir / "best.pt")["best_epoch"] == 4


def test_loaded_model_has_the_accuracy_of_the_summary(run_dir: Path, tmp_path: Path) -> None:
    config, model = load_run(run_dir, device="cpu")
    test = Trainer(TrainConfig(**OPTIONS, out=tmp_path / "another")).state.test
    assert accuracy(model, test, torch.device("cpu"), config.seed) == summary(run_dir)["test_accuracy"]
    assert not model.training


def test_tensorboard_has_every_column(run_dir: Path) -> None:
    assert set(board(run_dir)) == {*COLUMNS, "scale.weight_now"} - {"epoch"}


@pytest.mark.parametrize("found", ["", "format: 1\n", "format: 3\n"])
def test_run_of_another_version_is_refused(tmp_path: Path, found: str) -> None:
    (tmp_path / "config.yaml").write_text(f"{found}surrogate: none\nthreshold: ramp\n")
    message = f"was made by another version: its format is {found[8:-1] or None}, this one reads 2$"
    for read in (read_config, load_run):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path)


def test_directory_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read options from .*config\.yaml"):
        load_run(tmp_path)
    assert read_summary(tmp_path) is None


def test_run_directory_that_is_not_empty_is_refused(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none")
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="exists and is not empty: choose another --out"):
        Trainer(config)
    assert [path.name for path in config.run_dir.iterdir()] == ["thesis.tex"]


def test_automatic_run_directory_takes_the_first_free_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig()
    assert new_run_dir(config) == config.run_dir
    for taken in ("", "-2", "-4"):
        path = config.run_dir.with_name(config.run_dir.name + taken)
        path.mkdir(parents=True)
        (path / "last.pt").touch()
    assert new_run_dir(config) == config.run_dir.with_name(f"{config.run_dir.name}-3")


def test_automatic_run_directory_that_is_empty_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TrainConfig().run_dir.mkdir(parents=True)
    assert new_run_dir(TrainConfig()) == TrainConfig().run_dir


def test_wrong_options_leave_no_directory_behind(make_config: MakeConfig) -> None:
    config = make_config(arch="resnet21")
    with pytest.raises(UsageError, match="resnet21"):
        train(config)
    assert not config.run_dir.exists()


def test_failed_picture_is_logged_with_its_traceback_and_costs_nothing_else(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(trainer_module, "draw_curves", fail)
    run_dir = train(make_config(surrogate="none", epochs=1))
    assert "cannot draw curves.png" in log(run_dir)
    assert "RuntimeError: no fonts" in log(run_dir)
    assert read_summary(run_dir) is not None


def test_peak_memory_counts_what_was_allocated() -> None:
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(2**27)  # 512 MiB, more than the process can have freed and kept
    after = peak_memory(torch.device("cpu"))
    assert before is not None
    assert after is not None
    assert after >= before
    assert after >= block.nbytes
