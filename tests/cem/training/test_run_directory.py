"""What a run leaves in its directory, which directory that is, and how a run is got back out of it."""

import pytest
import torch
from small_runs import board, log, rows, small
from small_terms import Scale, surrogate

from cem.data import load_data, make_loader
from cem.errors import UsageError
from cem.models import CLIENT_COSTS, client_budget
from cem.training import TrainConfig, Trainer, load_run, read_summary, train
from cem.training import checkpoint as checkpoints
from cem.training import trainer as trainer_module
from cem.training.evaluation import accuracy
from cem.training.runlog import COLUMNS
from cem.training.runs import new_run, peak_memory

CPU = torch.device("cpu")
OPTIONS = {"surrogate": surrogate(Scale), "epochs": 4, "lambd": 0.5, "penalty_from": 2}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run, pictures and all, which the tests only read."""
    return train(small(tmp_path_factory.mktemp("runs") / "a", **OPTIONS))


def test_run_directory_holds_every_file(run_dir):
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith("events.out.tfevents")}
    pictures, tables = {"curves.png", "tsne.png"}, {"config.yaml", "metrics.csv", "summary.json"}
    assert names == {*pictures, *tables, "train.log", "last.pt", "best.pt"}
    assert len(list(run_dir.glob("events.out.tfevents.*"))) == 1


def test_metrics_have_a_row_per_epoch_the_named_columns_and_those_of_monitors(run_dir):
    table = rows(run_dir)
    assert [row["epoch"] for row in table] == [1, 2, 3, 4]
    assert tuple(table[-1]) == (*COLUMNS, "scale.weight_now")
    assert set(board(run_dir)) == {*COLUMNS, "scale.weight_now"} - {"epoch"}


def test_metrics_follow_the_schedule_of_the_rate_and_time_the_surrogate(run_dir):
    table = rows(run_dir)
    assert [row["lr"] for row in table] == pytest.approx([0.05, 0.01, 0.002, 0.0004])
    assert all(0 < row["surrogate_seconds"] < row["seconds"] for row in table[1:])


def test_summary_has_exactly_the_named_keys(run_dir):
    summary = read_summary(run_dir)
    figures = {"test_accuracy", "best_epoch", "epochs", "train_seconds", "surrogate_seconds", "rob_loss", "intra_mse"}
    of_machine = {"peak_memory_bytes", "device", "threads", "versions"}
    assert set(summary) == figures | of_machine | {"parameters", "skipped_steps", *CLIENT_COSTS}
    assert {"python", "torch", "triton", "numpy", "scikit-learn", "cem"} == set(summary["versions"])


def test_summary_agrees_with_metrics_and_checkpoints(run_dir):
    summary, table, content = read_summary(run_dir), rows(run_dir), checkpoints.load(run_dir / "best.pt")
    best = table[summary["best_epoch"] - 1]
    assert (summary["rob_loss"], summary["intra_mse"]) == (best["rob_loss"], best["intra_mse"])
    for ours, theirs in (("train_seconds", "seconds"), ("surrogate_seconds", "surrogate_seconds")):
        assert summary[ours] == pytest.approx(sum(row[theirs] for row in table))
    assert (summary["epochs"], summary["device"], summary["skipped_steps"]) == (4, "cpu", 0)
    assert summary["parameters"]["surrogate"] == 1
    model, shape = load_run(run_dir, device="cpu")[1], content["data_facts"]["image_shape"]
    assert {name: summary[name] for name in CLIENT_COSTS} == client_budget(model, shape)
    assert content["best_epoch"] == summary["best_epoch"] == 4  # under the strongest penalty


def test_loaded_model_has_the_accuracy_of_the_summary_on_the_test_images(run_dir):
    config, model = load_run(run_dir, device="cpu")
    test = make_loader(load_data("digits").test, config.batch_size, shuffle=False)
    assert accuracy(model, test, CPU, config.seed) == read_summary(run_dir)["test_accuracy"]
    assert not model.training


@pytest.mark.parametrize(
    ("found", "hint"),
    [
        ("thesis.tex", "choose another --out"),
        ("last.pt", "to continue the run that lies there: python -m cem.train --resume"),
        ("summary.json", "a finished run lies there; choose another --out, or another --seed"),
    ],
)
def test_run_directory_that_is_not_empty_is_refused_with_what_to_do(make, found, hint):
    config = make(surrogate="none")
    config.run_dir.mkdir()
    (config.run_dir / found).write_text("years of work")
    with pytest.raises(UsageError, match=f"exists and is not empty: {hint}"):
        Trainer(config)
    assert [path.name for path in config.run_dir.iterdir()] == [found]


def test_automatic_run_directory_takes_the_first_free_number_and_is_complete_when_it_appears(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = TrainConfig().run_dir
    names = [first.name, *(f"{first.name}-{number}" for number in range(2, 6))]
    (first.parent / names[1]).mkdir(parents=True)
    (first.parent / names[1] / "notes").touch()
    (first.parent / names[2]).symlink_to("nowhere")
    (first.parent / names[3]).touch()
    for name in (names[0], names[4]):
        run_dir, lock = new_run(TrainConfig(), lambda folder: (folder / "last.pt").touch())
        assert run_dir == first.parent / name
        assert {path.name for path in run_dir.iterdir()} == {"last.pt", ".lock"}
        lock.release()
    assert {path.name for path in first.parent.iterdir()} == set(names)


def test_failed_picture_is_logged_with_its_traceback_and_costs_nothing_else(make, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(trainer_module, "draw_curves", fail)
    run_dir = train(make(surrogate="none", epochs=1))
    assert "cannot draw curves.png" in log(run_dir)
    assert "RuntimeError: no fonts" in log(run_dir)
    assert read_summary(run_dir) is not None


def test_peak_memory_counts_what_was_allocated():
    before = peak_memory(CPU)
    block = torch.ones(2**27)  # 512 MiB, more than the process can have freed and kept
    assert peak_memory(CPU) >= max(before, block.nbytes)
