"""The trainer: weights and rates, what it learns, which epoch it keeps, and what its numbers depend on."""

import pytest
import torch
from small_runs import fitted, rows, weights
from small_terms import Scale, surrogate
from torch import nn

from cem.errors import CheckpointError
from cem.models import SplitModel
from cem.surrogates import SURROGATES
from cem.training import Trainer, train
from cem.training import checkpoint as checkpoints
from cem.training import trainer as trainer_module
from cem.training.evaluation import accuracy, collect_features

CPU = torch.device("cpu")


def same(a, b):
    return all(map(torch.equal, weights(a), weights(b)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lambd": 16.0, "lambd_schedule": "rising", "epochs": 4}, [0.0, 1.6, 8.0, 16.0]),
        ({"surrogate": "centroid", "epochs": 2}, [0.0, 0.5]),
        ({"surrogate": "none", "epochs": 2}, [0.0, 0.0]),
    ],
    ids=["rising", "centroid's own", "none"],
)
def test_weight_follows_its_schedule(make, options, expected):
    run_dir = train(make(penalty_from=2, **options))
    assert [row["lambda_eff"] for row in rows(run_dir)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "best"),
    [
        ({"surrogate": "none"}, 7),
        ({"surrogate": surrogate(Scale), "lambd_schedule": "constant"}, 7),
        ({"surrogate": "none", "penalty_from": 8}, 8),
    ],
    ids=["no penalty", "constant weight", "one epoch with the penalty"],
)
def test_best_epoch_is_the_first_of_the_most_accurate_under_the_strongest_penalty(make, monkeypatch, options, best):
    """The rule is that of a rising weight, whatever the run has: the last quarter of the epochs has the most of it."""
    found = iter([0.9, 0.8, 0.7, 0.6, 0.5, 0.9, 0.4, 0.4, 0.123])  # the last on the test set
    sets = []

    def scripted(_, batches, *__, **___):
        sets.append(sum(len(labels) for _, labels in batches))
        return next(found)

    monkeypatch.setattr(trainer_module, "accuracy", scripted)
    trainer = fitted(make(epochs=8, **options))
    assert sets == [len(trainer.state.data.val)] * 8 + [len(trainer.state.data.test)]
    assert trainer.finished["best_epoch"] == best
    assert trainer.finished["test_accuracy"] == 0.123
    kept = checkpoints.load(trainer.run_dir / "best.pt")["server"]
    assert len(checkpoints.load(trainer.run_dir / "best.pt")["history"]) == best
    assert all(torch.equal(tensor, kept[name]) for name, tensor in trainer.state.model.server.state_dict().items())


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bfloat16"])
def test_training_learns_and_its_weights_are_fp32(make, amp):
    trainer = fitted(make(surrogate="none", epochs=8, train_size=400, amp=amp))
    assert trainer.finished["test_accuracy"] > 0.8
    assert not any(weight.dtype == torch.bfloat16 for weight in weights(trainer.run_dir))


def test_same_seed_gives_the_same_numbers_whatever_is_constructed_in_between(make):
    first = train(make("first", surrogate="none", epochs=1))
    again, other = Trainer(make("again", surrogate="none", epochs=1)), make("other", surrogate="none", epochs=1, seed=5)
    Trainer(other)
    again.fit()
    assert same(first, again.run_dir)
    assert not same(first, train(other))


def test_training_without_evaluation_gives_the_same_weights(make, monkeypatch):
    with_evaluation = train(make("a", surrogate="none", epochs=2))
    monkeypatch.setattr(trainer_module, "accuracy", lambda *_, **__: 0.5)
    assert same(with_evaluation, train(make("b", surrogate="none", epochs=2)))


def test_surrogates_begin_from_the_same_weights_and_random_numbers(make):
    none, *others = (Trainer(make(name, surrogate=name)).state for name in SURROGATES)
    for other in others:
        for name, tensor in none.model.state_dict().items():
            assert torch.equal(other.model.state_dict()[name], tensor)
        assert torch.equal(other.random["torch"], none.random["torch"])


def test_evaluation_leaves_the_mode_and_sees_the_same_noise_again(make):
    state = Trainer(make(surrogate="none")).state
    state.model.train()
    first, again, clean = (
        collect_features(state.model, state.val, state.device, 0, noisy=noisy)[0] for noisy in (True, True, False)
    )
    assert torch.equal(first, again)
    assert (first - clean).std().item() == pytest.approx(0.1, rel=0.05)
    assert state.model.training


@pytest.mark.parametrize(("amp", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_accuracy_is_computed_in_bfloat16_where_asked(amp, dtype):
    model = SplitModel(nn.Flatten(), nn.Linear(16, 3), image_shape=(1, 4, 4))
    seen = []
    model.server.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    assert 0 <= accuracy(model, [(torch.rand(5, 1, 4, 4), torch.arange(5) % 3)], CPU, 0, amp=amp) <= 1
    assert seen == [dtype]
    with pytest.raises(ValueError, match="no samples"):
        accuracy(model, [], CPU, 0)


def test_warm_start_takes_the_weights_and_the_full_penalty(make):
    first = train(make("first", surrogate="none", epochs=2))
    options = {"surrogate": surrogate(Scale), "lambd": 16.0, "lambd_schedule": "rising", "epochs": 1}
    second = Trainer(make("second", init_from=first, **options))
    best = checkpoints.load(first / "best.pt")["encoder"]
    assert all(torch.equal(second.state.model.encoder.state_dict()[name], best[name]) for name in best)
    second.fit()
    assert rows(second.run_dir)[0]["lambda_eff"] == 16.0


def test_warm_start_from_another_architecture_is_refused_before_anything_is_written(make):
    first = train(make("first", surrogate="none", epochs=1))
    other = make("other", surrogate="none", arch="resnet20", init_from=first / "best.pt")
    with pytest.raises(CheckpointError, match=r"best\.pt does not fit: .* encoder"):
        train(other)
    assert not other.run_dir.exists()


def test_every_sample_counts_where_the_batch_does_not_divide_them(make):
    correct = rows(train(make(surrogate="none", epochs=1, train_size=70)))[0]["train_accuracy"] * 70
    assert correct == pytest.approx(round(correct))
