"""The trainer: weights and rates, what it learns, and which epoch it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_runs import Scale, rows, surrogate, weights
from torch import nn

from cem.errors import CheckpointError
from cem.models import SplitModel
from cem.surrogates import SURROGATES
from cem.training import TrainConfig, Trainer, read_config, read_summary, train
from cem.training import checkpoint as checkpoints
from cem.training import trainer as trainer_module
from cem.training.evaluation import accuracy, collect_features

MakeConfig = Callable[..., TrainConfig]


def test_a_rising_weight_follows_the_learning_rate(make_config: MakeConfig) -> None:
    run_dir = train(make_config(lambd=16.0, lambd_schedule="rising", penalty_from=2))
    assert [row["lambda_eff"] / 16 for row in rows(run_dir)] == pytest.approx([0.0, 0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    ("surrogate", "own"),
    [("centroid", [0.0, 0.5]), ("mixture", [0.0, 8.0]), ("attention", [0.0, 8.0]), ("none", [0.0, 0.0])],
)
def test_every_surrogate_has_a_weight_and_a_schedule_of_its_own(
    surrogate: str, own: list[float], make_config: MakeConfig
) -> None:
    config = make_config(surrogate=surrogate, epochs=2, penalty_from=2)
    train(config)
    assert [row["lambda_eff"] for row in rows(config.run_dir)] == own
    assert read_config(config.run_dir).checked() == replace(config.checked().resolved(), out=None)


def test_a_constant_weight_is_there_in_every_epoch_with_a_penalty(make_config: MakeConfig) -> None:
    run_dir = train(make_config(epochs=5, lambd=3.0, lambd_schedule="constant", penalty_from=2))
    assert [row["lambda_eff"] for row in rows(run_dir)] == [0.0, 3.0, 3.0, 3.0, 3.0]


def test_penalty_begins_in_the_epoch_it_is_asked_for(make_config: MakeConfig) -> None:
    late = rows(train(make_config("late", surrogate=surrogate(Scale), penalty_from=3)))
    plain = rows(train(make_config("plain", surrogate="none")))
    assert [row["lambda_eff"] > 0 for row in late] == [False, False, True, True]
    assert [row["rob_loss"] > 0 for row in late] == [False, False, True, True]
    assert [row["cross_entropy"] for row in late[:2]] == [row["cross_entropy"] for row in plain[:2]]


def test_best_epoch_has_the_best_validation_accuracy_among_equally_penalized(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", epochs=8)
    train(config)
    late = [row for row in rows(config.run_dir) if row["epoch"] > 6]
    summary = read_summary(config.run_dir)
    assert summary is not None
    assert summary["best_epoch"] == max(late, key=lambda row: row["val_accuracy"])["epoch"]


def test_the_best_epoch_is_a_late_one_under_a_constant_weight_too(make_config: MakeConfig) -> None:
    config = make_config(epochs=8, lambd=0.1, lambd_schedule="constant")
    summary = Trainer(config).fit()
    late = rows(config.run_dir)[6:]
    assert summary["best_epoch"] == max(late, key=lambda row: row["val_accuracy"])["epoch"]


def test_every_surrogate_chooses_its_best_epoch_among_the_penalized_ones(make_config: MakeConfig) -> None:
    # One epoch has the penalty, so it is chosen, however well the ones before it did.
    summary = Trainer(make_config(surrogate="none", penalty_from=4)).fit()
    assert summary["best_epoch"] == 4


def test_training_learns(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", epochs=8, train_size=400)
    train(config)
    summary = read_summary(config.run_dir)
    assert summary is not None
    assert summary["test_accuracy"] > 0.8


def test_training_under_amp_learns_and_its_weights_are_fp32(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", epochs=8, train_size=400, amp=True)
    train(config)
    summary = read_summary(config.run_dir)
    assert summary is not None
    assert summary["test_accuracy"] > 0.8
    assert not any(weight.dtype == torch.bfloat16 for weight in weights(config.run_dir, "encoder", "server"))


def test_same_seed_gives_the_same_numbers(make_config: MakeConfig) -> None:
    for name in ("a", "b"):
        train(make_config(name, surrogate="none", epochs=2))
    a, b = (make_config(name).run_dir for name in ("a", "b"))
    assert all(map(torch.equal, weights(a, "encoder", "server"), weights(b, "encoder", "server")))


def test_another_seed_gives_other_numbers(make_config: MakeConfig) -> None:
    for seed in (0, 1):
        train(make_config(str(seed), surrogate="none", epochs=1, seed=seed))
    a, b = (make_config(name).run_dir for name in ("0", "1"))
    assert not torch.equal(weights(a, "encoder")[-1], weights(b, "encoder")[-1])


def test_constructing_another_trainer_in_between_changes_nothing(make_config: MakeConfig) -> None:
    train(make_config("a", surrogate="none", epochs=1))
    trainer = Trainer(make_config("b", surrogate="none", epochs=1))
    Trainer(make_config("c", surrogate="none", seed=5))
    trainer.fit()
    a, b = (make_config(name).run_dir for name in ("a", "b"))
    assert all(map(torch.equal, weights(a, "encoder"), weights(b, "encoder")))


def test_training_without_evaluation_gives_the_same_weights(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config("a", surrogate="none", epochs=2))

    monkeypatch.setattr(trainer_module, "accuracy", lambda *_, **__: 0.5)
    train(make_config("b", surrogate="none", epochs=2))
    a, b = (make_config(name).run_dir for name in ("a", "b"))
    assert all(map(torch.equal, weights(a, "encoder", "server"), weights(b, "encoder", "server")))


def test_surrogates_begin_from_the_same_weights_and_random_numbers(make_config: MakeConfig) -> None:
    none, *others = (Trainer(make_config(name, surrogate=name)).state for name in SURROGATES)
    for other in others:
        for name, tensor in none.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[name], tensor, rtol=0, atol=0)
        assert torch.equal(other.random["torch"], none.random["torch"])


def test_evaluation_leaves_the_mode_and_sees_the_same_noise_again(make_config: MakeConfig) -> None:
    state = Trainer(make_config(surrogate="none")).state
    state.model.train()
    first, _ = collect_features(state.model, state.val, state.device, 0, noisy=True)
    again, _ = collect_features(state.model, state.val, state.device, 0, noisy=True)
    clean, _ = collect_features(state.model, state.val, state.device, 0, noisy=False)
    assert torch.equal(first, again)
    assert (first - clean).std().item() == pytest.approx(0.1, rel=0.05)
    assert state.model.training


@pytest.mark.parametrize(("amp", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_accuracy_is_computed_in_bfloat16_where_asked(amp: bool, dtype: torch.dtype) -> None:
    model = SplitModel(nn.Flatten(), nn.Linear(16, 3), image_shape=(1, 4, 4))
    seen: list[torch.dtype] = []
    model.server.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    assert 0 <= accuracy(model, [(torch.rand(5, 1, 4, 4), torch.arange(5) % 3)], torch.device("cpu"), 0, amp=amp) <= 1
    assert seen == [dtype]


def test_two_pass_trains_as_combined_does(make_config: MakeConfig) -> None:
    for injection in ("combined", "two_pass"):
        train(make_config(injection, surrogate=surrogate(Scale), epochs=1, injection=injection))
    a, b = (rows(make_config(name).run_dir)[0] for name in ("combined", "two_pass"))
    for name in ("cross_entropy", "rob_loss", "intra_mse"):
        assert a[name] == pytest.approx(b[name], rel=1e-4)


def test_warm_start_takes_the_weights_and_the_full_penalty(make_config: MakeConfig) -> None:
    first = make_config("first", surrogate="none", epochs=2)
    train(first)
    second = Trainer(make_config("second", surrogate="attention", epochs=1, init_from=first.run_dir))
    best = checkpoints.load(first.run_dir / "best.pt")["encoder"]
    assert all(torch.equal(second.state.model.encoder.state_dict()[name], best[name]) for name in best)
    second.fit()
    assert rows(second.run_dir)[0]["lambda_eff"] == 16.0


def test_warm_start_from_another_architecture_is_refused_before_anything_is_written(
    make_config: MakeConfig,
) -> None:
    first = make_config("first", surrogate="none", epochs=1)
    train(first)
    other = make_config("other", surrogate="none", arch="vgg11", image_size=32, init_from=first.run_dir)
    with pytest.raises(CheckpointError, match=r"best\.pt does not fit this run's encoder"):
        train(other)
    assert not other.run_dir.exists()


def test_centralized_model_trains(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config(surrogate="none", epochs=1, centralized=True))
    assert trainer.state.model.feature_shape == (64,)
    trainer.fit()


def test_batch_that_does_not_divide_the_data_counts_every_sample(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", epochs=1, train_size=70)
    train(config)
    assert rows(config.run_dir)[0]["train_accuracy"] * 70 == pytest.approx(
        round(rows(config.run_dir)[0]["train_accuracy"] * 70)
    )


def test_lone_last_sample_does_not_stop_batch_normalization(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", arch="vgg11_bn", train_size=5, batch_size=4, epochs=1)
    train(config)  # its maps shrink to one pixel
    assert read_summary(config.run_dir) is not None
