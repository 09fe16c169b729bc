"""Means and times of an epoch."""

from __future__ import annotations

import time

import pytest
import torch

from cem.training.injection import Step
from cem.training.meter import EpochMeter
from cem.training.stopwatch import Stopwatch
from cem.training.weighted import Answer

CPU = torch.device("cpu")


def step(cross_entropy: float, loss: float, correct: int, *, finite: bool = True) -> Step:
    answer = Answer(torch.tensor(loss), {"intra_mse": torch.tensor(2 * loss)}, torch.tensor(finite), None, None, [])
    return Step(torch.tensor(cross_entropy), torch.tensor(correct), {"surrogate": answer})


def test_means_weigh_steps_by_their_samples() -> None:
    meter = EpochMeter(CPU)
    meter.add(step(1.0, 4.0, correct=3), samples=30)
    meter.add(step(2.0, 8.0, correct=7), samples=10)
    means, terms = meter.read()
    assert means == pytest.approx({"cross_entropy": 1.25, "train_accuracy": 0.25})
    assert terms["surrogate"] == pytest.approx({"loss": 5.0, "intra_mse": 10.0, "skipped": 0})


def test_steps_in_which_a_term_is_not_finite_count_for_the_others_only() -> None:
    meter = EpochMeter(CPU)
    for finite in (True, False):
        both = step(2.0, 4.0, correct=4)
        both.answers["other"] = step(0.0, 4.0 if finite else float("nan"), 0, finite=finite).answers["surrogate"]
        meter.add(both, samples=8)
    means, terms = meter.read()
    assert means == pytest.approx({"cross_entropy": 2.0, "train_accuracy": 0.5})
    assert terms["surrogate"] == pytest.approx({"loss": 4.0, "intra_mse": 8.0, "skipped": 0})
    assert terms["other"] == pytest.approx({"loss": 4.0, "intra_mse": 8.0, "skipped": 1})


def test_epoch_in_which_a_term_never_is_finite_has_a_loss_of_zero() -> None:
    meter = EpochMeter(CPU)
    meter.add(step(1.0, float("inf"), correct=0, finite=False), samples=8)
    assert meter.read()[1]["surrogate"] == {"loss": 0.0, "intra_mse": 0.0, "skipped": 1}


def test_monitors_that_change_between_steps_are_refused() -> None:
    meter = EpochMeter(CPU)
    meter.add(step(1.0, 4.0, correct=3), samples=30)
    other = step(1.0, 4.0, correct=3)
    other.answers["surrogate"].monitors["more"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match="must be the same in every step"):
        meter.add(other, samples=30)


@pytest.mark.parametrize("name", ["loss", "weight", "seconds", "skipped"])
def test_monitors_with_a_name_of_the_trainers_are_refused(name: str) -> None:
    wrong = step(1.0, 4.0, correct=3)
    wrong.answers["surrogate"].monitors[name] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=f"must not be called {name}"):
        EpochMeter(CPU).add(wrong, samples=30)


def test_epoch_without_a_step_or_a_term_can_be_read() -> None:
    meter = EpochMeter(CPU)
    assert meter.read() == ({"cross_entropy": 0.0, "train_accuracy": 0.0}, {})
    meter.add(Step(torch.tensor(1.0), torch.tensor(2)), samples=4)
    assert meter.read() == ({"cross_entropy": 1.0, "train_accuracy": 0.5}, {})


def test_stopwatch_adds_up_its_blocks_and_starts_again_when_read() -> None:
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch:
            time.sleep(0.01)
    assert watch.read() >= 0.02
    assert watch.read() == 0


def test_stopwatch_does_not_count_what_lies_between_its_blocks() -> None:
    watch = Stopwatch(CPU)
    start = time.perf_counter()
    with watch:
        pass
    time.sleep(0.01)
    with watch:
        pass
    assert watch.read() <= time.perf_counter() - start - 0.01
