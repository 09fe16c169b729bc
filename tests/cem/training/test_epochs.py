"""Epochs of a run: their rates and weights, means and times, their log and their table."""

import time
from contextlib import suppress

import pytest
import torch

from cem.training.injection import Step
from cem.training.meter import EpochMeter
from cem.training.runlog import COLUMNS, epoch_line, run_log
from cem.training.schedule import epoch_lr, lambda_eff, lr_factor
from cem.training.stopwatch import Stopwatch
from cem.training.weighted import Answer

CPU = torch.device("cpu")


def step(cross_entropy, loss, correct, *more, finite=True):
    monitors = {"intra_mse": torch.tensor(2 * loss)} | dict.fromkeys(more, torch.ones(()))
    answer = Answer(torch.tensor(loss), monitors, torch.tensor(finite), None, None, [])
    return Step(torch.tensor(cross_entropy), torch.tensor(correct), {"surrogate": answer})


def measured(*steps):
    """What a meter reads after steps over that many samples."""
    meter = EpochMeter(CPU)
    for each, samples in steps:
        meter.add(each, samples)
    return meter.read()


def test_rate_falls_where_the_original_lets_it_fall():
    rates = [epoch_lr(0.05, epoch, 240) for epoch in range(240)]
    falls = [epoch for epoch in range(1, 240) if rates[epoch] != rates[epoch - 1]]
    assert falls == [60, 120, 180]
    assert [rates[epoch] for epoch in (0, *falls)] == pytest.approx([0.05, 0.01, 0.002, 0.0004])
    assert [epoch_lr(1.0, epoch, 3) for epoch in range(3)] == pytest.approx([1.0, 0.2, 0.04])  # two falls at once


def test_rate_falls_evenly_to_nothing_along_a_cosine():
    factor = lr_factor(epochs=4, steps_per_epoch=10, warmup_epochs=0.0, shape="cosine")
    assert [factor(step) for step in (0, 10, 20, 30, 40)] == pytest.approx([1.0, 0.85355339, 0.5, 0.14644661, 0.0])
    assert epoch_lr(0.05, 1, 4, "cosine") == pytest.approx(0.05 * 0.85355339)


def test_warm_up_rises_step_by_step_never_from_zero_and_then_the_schedule_rules():
    factor = lr_factor(epochs=8, steps_per_epoch=10, warmup_epochs=1.5)
    assert [factor(number) for number in range(15)] == pytest.approx([(number + 1) / 15 for number in range(15)])
    assert [factor(10 * epoch + 9) for epoch in range(2, 8)] == [epoch_lr(1.0, epoch, 8) for epoch in range(2, 8)]
    assert factor(80) == factor(79)  # which is asked for after the last step
    assert lr_factor(epochs=4, steps_per_epoch=10, warmup_epochs=0.0)(0) == 1.0


@pytest.mark.parametrize(("lr", "share"), [(0.05, 0.02), (0.01, 0.1), (0.002, 0.5), (4.1e-4, 1 / 0.41), (0.0004, 1.0)])
def test_penalty_grows_as_the_rate_falls_and_is_full_after_a_warm_start(lr, share):
    assert lambda_eff(16.0, lr, warm_start=False) == pytest.approx(16.0 * share)
    assert lambda_eff(16.0, lr, warm_start=True) == 16.0


def test_means_weigh_steps_by_their_samples():
    means, terms = measured((step(1.0, 4.0, correct=3), 30), (step(2.0, 8.0, correct=7), 10))
    assert means == pytest.approx({"cross_entropy": 1.25, "train_accuracy": 0.25})
    assert terms["surrogate"] == pytest.approx({"loss": 5.0, "intra_mse": 10.0, "skipped": 0})


def test_steps_in_which_a_term_is_not_finite_count_for_the_others_only():
    whole, broken = step(2.0, 4.0, 4), step(2.0, 4.0, 4)
    whole.answers["other"] = step(0.0, 4.0, 0).answers["surrogate"]
    broken.answers["other"] = step(0.0, float("nan"), 0, finite=False).answers["surrogate"]
    means, terms = measured((whole, 8), (broken, 8))
    assert means == pytest.approx({"cross_entropy": 2.0, "train_accuracy": 0.5})
    assert terms["surrogate"] == pytest.approx({"loss": 4.0, "intra_mse": 8.0, "skipped": 0})
    assert terms["other"] == pytest.approx({"loss": 4.0, "intra_mse": 8.0, "skipped": 1})


def test_epochs_without_a_step_a_term_or_a_finite_one_can_be_read():
    assert measured() == ({"cross_entropy": 0.0, "train_accuracy": 0.0}, {})
    without_term = Step(torch.tensor(1.0), torch.tensor(2))
    assert measured((without_term, 4)) == ({"cross_entropy": 1.0, "train_accuracy": 0.5}, {})
    _, terms = measured((step(1.0, float("inf"), correct=0, finite=False), 8))
    assert terms["surrogate"] == {"loss": 0.0, "intra_mse": 0.0, "skipped": 1}


@pytest.mark.parametrize("name", ["loss", "weight", "seconds", "skipped"])
def test_monitors_with_a_name_of_the_trainers_and_monitors_that_change_are_refused(name):
    with pytest.raises(ValueError, match=f"must not be called {name}"):
        measured((step(1.0, 4.0, 3, name), 30))
    with pytest.raises(ValueError, match="must be the same in every step"):
        measured((step(1.0, 4.0, 3), 30), (step(1.0, 4.0, 3, "more"), 30))


def test_stopwatch_adds_up_its_blocks_alone_and_starts_again_when_read(monkeypatch):
    clock = iter([10.0, 12.0, 100.0, 100.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch:
            pass
    assert (watch.read(), watch.read()) == (2.5, 0)


def test_log_goes_to_the_file_and_to_stderr_once_however_often_it_is_opened(tmp_path, capsys):
    with run_log(tmp_path) as log, run_log(tmp_path) as again:
        again.info("first")
    assert again is log
    with run_log(tmp_path) as log:
        log.info("second")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.partition(" INFO ")[2] for line in lines] == ["first", "second"]
    assert capsys.readouterr().err == "first\nsecond\n"


def test_logs_of_two_runs_stay_apart_and_are_closed_after_an_error(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with suppress(RuntimeError), run_log(tmp_path / "a") as a, run_log(tmp_path / "b"):
        a.info("only in a")
        file = a.handlers[0]
        raise RuntimeError
    assert "only in a" not in (tmp_path / "b" / "train.log").read_text()
    assert (a.handlers, file.stream) == ([], None)


def test_line_of_an_epoch_names_what_other_terms_add():
    row = dict.fromkeys(COLUMNS, 0.0) | {"epoch": 3, "cross_entropy": 1.0, "lambda_eff": 0.5, "rob_loss": 2.0}
    assert "epoch  3/10  lr 0  λ 0.5  loss 2.000 = ce 1.000 + λ·rob 2.000  train" in epoch_line(
        row | {"train_loss": 2.0}, 10
    )
    assert "+ λ·rob 2.000 + others 0.250  train" in epoch_line(row | {"train_loss": 2.25}, 10)
