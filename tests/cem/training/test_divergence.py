"""What is not finite: a step goes without its penalty, a run that diverges ends, and the log says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_runs import Broken, Refitted, Scale, log, rows, surrogate, weights

from cem.errors import DivergedError
from cem.training import TrainConfig, Trainer, read_summary, train
from cem.training import checkpoint as checkpoints
from cem.training import trainer as trainer_module

MakeConfig = Callable[..., TrainConfig]


def test_steps_with_broken_penalty_train_exactly_as_without_one(make_config: MakeConfig) -> None:
    broken = train(make_config("broken", surrogate=surrogate(Broken), epochs=2))
    none = train(make_config("none", surrogate="none", epochs=2))
    parts = ("encoder", "server")
    assert all(map(torch.equal, weights(broken, *parts), weights(none, *parts)))


def test_steps_with_broken_penalty_are_counted_and_warned_about_once(make_config: MakeConfig) -> None:
    run_dir = train(make_config(surrogate=surrogate(Broken), epochs=3))
    summary = read_summary(run_dir)
    assert summary is not None
    assert summary["skipped_steps"] == 9
    assert log(run_dir).count("scale or its gradient was not finite in 3 steps of epoch 1") == 1
    assert log(run_dir).count("not finite") == 1
    assert all(row["rob_loss"] == 0 for row in rows(run_dir))


def test_diverged_training_says_so_and_keeps_the_last_good_epoch(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_config(surrogate="none", epochs=2))
    combined = trainer_module.INJECTIONS["combined"]

    def diverge(*args: Any, **options: Any) -> Any:
        step = combined(*args, **options)
        return replace(step, cross_entropy=step.cross_entropy * torch.nan) if trainer.state.history else step

    monkeypatch.setitem(trainer_module.INJECTIONS, "combined", diverge)
    with pytest.raises(DivergedError, match=r"cross-entropy of epoch 2 is nan.*--lr"):
        trainer.fit()
    assert len(checkpoints.load(trainer.run_dir / "last.pt")["history"]) == 1


@pytest.mark.parametrize("broken", ["weight", "running_var"])
def test_model_that_blew_up_in_its_last_step_is_not_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    trainer = Trainer(make_config(surrogate="none", epochs=2))
    combined = trainer_module.INJECTIONS["combined"]
    name, tensor = next(item for item in trainer.state.model.state_dict().items() if item[0].endswith(broken))
    steps: list[int] = []

    def blow_up(*args: Any, **options: Any) -> Any:
        step = combined(*args, **options)
        steps.append(1)
        if len(steps) == 6:  # the last of epoch 2, whose cross-entropy is finite
            tensor.fill_(torch.inf)
        return step

    monkeypatch.setitem(trainer_module.INJECTIONS, "combined", blow_up)
    with pytest.raises(DivergedError, match=rf"after epoch 2 the model's {name} is not finite.*--lr"):
        trainer.fit()
    assert len(checkpoints.load(trainer.run_dir / "last.pt")["history"]) == 1
    assert checkpoints.load(trainer.run_dir / "best.pt")["best_epoch"] == 1


def test_features_that_are_not_finite_never_reach_a_refit(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    infinite = torch.full((96, 2), torch.inf), torch.zeros(96, dtype=torch.int64)
    monkeypatch.setattr(trainer_module, "collect_features", lambda *_, **__: infinite)
    trainer = Trainer(make_config(surrogate=surrogate(Refitted), epochs=1))
    with pytest.raises(DivergedError, match="after epoch 1 features are not finite"):
        trainer.fit()
    assert trainer.state.parts()["surrogate"].refits == []


def test_divergence_is_an_error_line_of_the_log(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", epochs=1, lr=1e30, warmup_epochs=0)
    with pytest.raises(DivergedError) as error:
        train(config)
    assert f"ERROR {error.value}\n" in log(config.run_dir)
    assert "Traceback" not in log(config.run_dir)


def test_other_errors_leave_their_traceback_in_the_log(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(trainer_module.INJECTIONS, "combined", fail)
    config = make_config(surrogate="none", epochs=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config)
    assert "Traceback" in log(config.run_dir)
    assert "RuntimeError: out of memory" in log(config.run_dir)


def test_warning_raised_while_building_reaches_the_log(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: Any) -> Scale:
        warnings.warn("the threshold is swamped", UserWarning, stacklevel=1)
        return Scale()

    monkeypatch.setattr(Scale, "build", build)
    run_dir = train(make_config(surrogate=surrogate(Scale), epochs=1))
    assert log(run_dir).count("the threshold is swamped") == 1
