"""Means and times of an epoch."""

from __future__ import annotations

import time

import pytest
import torch

from cem.training.injection import Step
from cem.training.meter import EpochMeter, Stopwatch

CPU = torch.device("cpu")


def step(cross_entropy: float, rob_loss: float, correct: int, *, skipped: bool = False) -> Step:
    return Step(
        cross_entropy=torch.tensor(cross_entropy),
        rob_loss=torch.tensor(rob_loss),
        intra_mse=torch.tensor(2 * rob_loss),
        correct=torch.tensor(correct),
        skipped=torch.tensor(skipped),
    )


def test_means_weigh_steps_by_their_samples() -> None:
    meter = EpochMeter(CPU)
    meter.add(step(1.0, 4.0, correct=3), samples=30)
    meter.add(step(2.0, 8.0, correct=7), samples=10)
    assert meter.read() == pytest.approx(
        {"cross_entropy": 1.25, "rob_loss": 5.0, "intra_mse": 10.0, "train_accuracy": 0.25, "skipped": 0}
    )


def test_skipped_steps_count_for_classification_only() -> None:
    meter = EpochMeter(CPU)
    meter.add(step(1.0, 4.0, correct=8), samples=8)
    meter.add(step(3.0, 0.0, correct=0, skipped=True), samples=8)
    assert meter.read() == pytest.approx(
        {"cross_entropy": 2.0, "rob_loss": 4.0, "intra_mse": 8.0, "train_accuracy": 0.5, "skipped": 1}
    )


def test_epoch_of_skipped_steps_has_a_penalty_of_zero() -> None:
    meter = EpochMeter(CPU)
    meter.add(step(1.0, 0.0, correct=0, skipped=True), samples=8)
    assert meter.read()["rob_loss"] == 0


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
