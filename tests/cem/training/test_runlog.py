"""The log and the tables of a run."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import pytest

from cem.training.runlog import COLUMNS, run_log, write_metrics


def test_log_lines_go_to_the_file_and_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_log(tmp_path) as log:
        log.info("epoch 1")
    assert "INFO epoch 1" in (tmp_path / "train.log").read_text()
    assert capsys.readouterr().err == "epoch 1\n"


def test_opening_the_log_twice_does_not_double_its_lines(tmp_path: Path) -> None:
    with run_log(tmp_path) as log, run_log(tmp_path) as again:
        again.info("once")
    assert again is log
    assert (tmp_path / "train.log").read_text().count("once") == 1


def test_reopening_the_log_appends(tmp_path: Path) -> None:
    for line in ("first", "second"):
        with run_log(tmp_path) as log:
            log.info(line)
    text = (tmp_path / "train.log").read_text()
    assert (text.count("first"), text.count("second")) == (1, 1)


def test_handlers_are_closed_even_after_an_error(tmp_path: Path) -> None:
    try:
        with run_log(tmp_path) as log:
            file = log.handlers[0]
            raise RuntimeError
    except RuntimeError:
        pass
    assert log.handlers == []
    assert file.stream is None  # type: ignore[attr-defined]


def test_logs_of_two_runs_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with run_log(tmp_path / "a") as a, run_log(tmp_path / "b"):
        a.info("only in a")
    assert "only in a" not in (tmp_path / "b" / "train.log").read_text()


def test_warnings_reach_the_log_and_nothing_stays_captured(tmp_path: Path) -> None:
    before = warnings.showwarning
    with run_log(tmp_path):
        warnings.simplefilter("always")
        warnings.warn("the threshold is swamped", UserWarning, stacklevel=1)
    assert "WARNING UserWarning: the threshold is swamped" in (tmp_path / "train.log").read_text()
    assert warnings.showwarning is before


def test_metrics_table_replaces_the_one_before(tmp_path: Path) -> None:
    rows = [dict.fromkeys(COLUMNS, epoch) for epoch in (1, 2)]
    write_metrics(tmp_path / "metrics.csv", rows)
    write_metrics(tmp_path / "metrics.csv", rows[:1])
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["epoch"] for row in table] == ["1"]
    assert tuple(table[0]) == COLUMNS


def test_metrics_table_has_a_column_for_what_only_some_epochs_have(tmp_path: Path) -> None:
    early = dict.fromkeys(COLUMNS, 1)
    write_metrics(tmp_path / "metrics.csv", [early, early | {"mixture.information_nats": 2}])
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == (*COLUMNS, "mixture.information_nats")
    assert [row["mixture.information_nats"] for row in table] == ["", "2"]
