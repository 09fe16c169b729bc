"""Learning rate and penalty weight over a run."""

from __future__ import annotations

import pytest

from cem.training.schedule import epoch_lr, lambda_eff, lr_factor


def test_rate_falls_where_the_original_lets_it_fall() -> None:
    rates = [epoch_lr(0.05, epoch, 240) for epoch in range(240)]
    falls = [epoch for epoch in range(1, 240) if rates[epoch] != rates[epoch - 1]]
    assert falls == [60, 120, 180]
    assert [rates[epoch] for epoch in (0, *falls)] == pytest.approx([0.05, 0.01, 0.002, 0.0004])


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 7])
def test_rate_of_a_short_run_falls_at_most_once_an_epoch_quarter(epochs: int) -> None:
    rates = [epoch_lr(1.0, epoch, epochs) for epoch in range(epochs)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] >= 1 / 125


def test_warm_up_rises_linearly_step_by_step_and_never_from_zero() -> None:
    factor = lr_factor(epochs=8, steps_per_epoch=10, warmup_epochs=1.5)
    assert [factor(step) for step in range(15)] == pytest.approx([(step + 1) / 15 for step in range(15)])
    assert factor(15) == 1.0


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert lr_factor(epochs=4, steps_per_epoch=10, warmup_epochs=0.0)(0) == 1.0


def test_factor_follows_the_epochs_schedule_after_warm_up() -> None:
    factor = lr_factor(epochs=8, steps_per_epoch=10, warmup_epochs=1.0)
    assert [factor(10 * epoch + 9) for epoch in range(8)] == [epoch_lr(1.0, epoch, 8) for epoch in range(8)]


def test_factor_is_defined_for_the_step_after_the_last() -> None:
    factor = lr_factor(epochs=8, steps_per_epoch=10, warmup_epochs=0.0)
    assert factor(80) == factor(79)


@pytest.mark.parametrize(
    ("lr", "fraction"), [(0.05, 0.02), (0.01, 0.1), (0.002, 0.5), (0.0004, 1.0), (4.1e-4, 1e-3 / 4.1e-4)]
)
def test_penalty_grows_as_the_rate_falls(lr: float, fraction: float) -> None:
    assert lambda_eff(16.0, lr, warm_start=False) == pytest.approx(16.0 * fraction)


def test_warm_start_has_the_full_penalty_at_every_rate() -> None:
    assert lambda_eff(16.0, 0.05, warm_start=True) == 16.0
