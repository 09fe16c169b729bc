"""What is not finite: a step goes without its penalty, a run that diverges ends, and the log says so."""

import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from small_runs import STEPS, fitted, in_each_step, log, rows, weights
from small_terms import GAIN, Broken, Scale, Size, Watched, surrogate

from cem.errors import DivergedError
from cem.training import Trainer, read_summary, train
from cem.training import checkpoint as checkpoints
from cem.training import trainer as trainer_module


def test_steps_with_broken_penalty_train_exactly_as_without_one_and_are_counted_and_warned_about_once(make):
    trainer, none = fitted(make("broken", surrogate=surrogate(Broken))), train(make("none", surrogate="none"))
    assert all(map(torch.equal, weights(trainer.run_dir), weights(none)))
    assert trainer.finished["skipped_steps"] == 3 * STEPS
    assert log(trainer.run_dir).count("scale or its gradient was not finite in 3 steps of epoch 1") == 1
    assert log(trainer.run_dir).count("not finite") == 1
    assert all(row["rob_loss"] == 0 for row in rows(trainer.run_dir))
    for summary in (trainer.finished, read_summary(none)):
        assert summary["rob_loss"] is summary["intra_mse"] is None


def test_steps_without_the_loss_of_a_defense_hide_nothing_of_the_surrogate(make, monkeypatch):
    monkeypatch.setattr(Size, "measure", Broken.measure)
    trainer = fitted(make(surrogate=surrogate(Scale), defenses=(GAIN,)))
    assert trainer.finished["skipped_steps"] == 3 * STEPS
    assert trainer.finished["rob_loss"] > 0
    assert log(trainer.run_dir).count("gain or its gradient was not finite in 3 steps of epoch 1") == 1


@pytest.mark.parametrize(
    ("broken", "value"), [("cross-entropy", 0), ("weight", torch.inf), ("weight", -2e6), ("running_var", torch.inf)]
)
def test_run_that_diverges_in_an_epoch_says_so_and_keeps_the_one_before(make, broken, value):
    """Whether in its cross-entropy, or in its last step, after a cross-entropy that is finite."""
    trainer = Trainer(make(surrogate="none"))
    state = trainer.state.model.state_dict()
    name = next((name for name in state if name.endswith(broken)), None)

    def blow_up(number, measured):
        if number == 2 * STEPS - 1 and name is not None:
            state[name].fill_(value)
        elif number == 2 * STEPS - 1:
            return replace(measured, cross_entropy=measured.cross_entropy * torch.nan)
        return measured

    what = r"has a weight of 2e\+06, beyond 1e\+06" if value == -2e6 else "is not finite"
    message = rf"after epoch 2 the model's {name} {what}" if name else "the cross-entropy of epoch 2 is nan"
    with (
        in_each_step(blow_up),
        pytest.raises(DivergedError, match=rf"{message}: training diverged; lower --lr") as error,
    ):
        trainer.fit()
    assert len(checkpoints.load(trainer.run_dir / "last.pt")["history"]) == 1
    assert checkpoints.load(trainer.run_dir / "best.pt")["best_epoch"] == 1
    assert f"ERROR {error.value}\n" in log(trainer.run_dir)
    assert "Traceback" not in log(trainer.run_dir)


@pytest.mark.parametrize("cross_entropy", [2.2, 2.4])
def test_a_model_that_has_learned_nothing_is_told_in_the_log(make, cross_entropy):
    with in_each_step(lambda number, measured: replace(measured, cross_entropy=torch.tensor(cross_entropy))):
        run_dir = train(make(surrogate="none"))
    assert ("the model is no better than guessing" in log(run_dir)) == (cross_entropy > 2.303)


@pytest.mark.parametrize(("bad", "kept"), [((2, 3), 1), ((3, 4), 2), ((2, 4), None), ((1, 3), None), ((4,), None)])
def test_two_epochs_running_far_above_guessing_end_a_run_which_keeps_what_was_before_them(make, bad, kept):
    """The first, in which the rate rises, does not count; one alone may recover, and is not the best."""
    trainer = Trainer(make(surrogate="none", epochs=4))

    def worse(number, measured):
        return replace(measured, cross_entropy=torch.tensor(3.5)) if number // STEPS + 1 in bad else measured

    with in_each_step(worse), pytest.raises(DivergedError) if kept else nullcontext() as error:
        summary = trainer.fit()
    if kept:
        assert f"of epochs {bad[0]} and {bad[1]} is 3.5 and 3.5, where guessing has 2.3: training" in str(error.value)
        assert len(checkpoints.load(trainer.run_dir / "last.pt")["history"]) == kept
        assert checkpoints.load(trainer.run_dir / "best.pt")["best_epoch"] <= kept
    else:
        assert summary["best_epoch"] not in bad or bad == (1, 3)


def test_features_that_are_not_finite_never_reach_a_refit(make, monkeypatch):
    infinite = torch.full((90, 2), torch.inf), torch.zeros(90, dtype=torch.int64)
    monkeypatch.setattr(trainer_module, "collect_features", lambda *_, **__: infinite)
    trainer = Trainer(make(surrogate=surrogate(Watched), epochs=1))
    with pytest.raises(DivergedError, match="after epoch 1 features are not finite"):
        trainer.fit()
    assert trainer.state.parts()["surrogate"].refits == []


def test_other_errors_leave_their_traceback_in_the_log(make):
    def fail(*_):
        raise RuntimeError("a bug")

    config = make(surrogate="none", epochs=1)
    with in_each_step(fail), pytest.raises(RuntimeError, match="a bug"):
        train(config)
    assert "Traceback" in log(config.run_dir)
    assert "RuntimeError: a bug" in log(config.run_dir)


def test_warning_raised_while_building_reaches_the_log_and_nothing_stays_captured(make, monkeypatch):
    before = warnings.showwarning

    def build(*_):
        warnings.warn("the threshold is swamped", UserWarning, stacklevel=1)
        return Scale()

    monkeypatch.setattr(Scale, "build", build)
    run_dir = train(make(surrogate=surrogate(Scale), epochs=1))
    assert log(run_dir).count("WARNING UserWarning: the threshold is swamped") == 1
    assert warnings.showwarning is before
