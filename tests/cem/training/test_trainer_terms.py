"""What terms and defenses are told and asked while a run trains, and where what they say ends up."""

import pytest
import torch
from small_runs import STEPS, board, fitted, log, rows, small, weights
from small_terms import GAIN, Gain, Ignores, OwnScale, Scale, SharedScale, Watched, surrogate

from cem.training import Trainer, load_run, read_config, train
from cem.training import checkpoint as checkpoints
from cem.training.evaluation import collect_features


def surrogate_of(trainer):
    return trainer.state.parts()["surrogate"]


@pytest.mark.parametrize("options", [{"surrogate": "none"}, {"surrogate": surrogate(Watched), "lambd": 0.0}])
def test_run_without_penalty_builds_no_surrogate_and_may_end_before_a_penalty_would_begin(make, options):
    trainer = fitted(make(epochs=1, penalty_from=2, **options))
    assert trainer.state.terms == []
    assert rows(trainer.run_dir)[0]["surrogate_seconds"] == 0


@pytest.mark.parametrize(("kind", "learns"), [(Scale, False), (OwnScale, True), (SharedScale, True)])
def test_surrogate_learns_with_its_own_optimizer_or_the_networks(make, kind, learns):
    run_dir = train(make(surrogate=surrogate(kind), epochs=1))
    assert (weights(run_dir, "surrogate")[0].item() != 1.0) is learns


def test_surrogate_without_a_weight_yet_does_not_learn(make):
    trainer = fitted(make(surrogate=surrogate(OwnScale), penalty_from=3))
    assert surrogate_of(trainer).weight.item() != 1.0
    steps = trainer.state.optimizers["surrogate.adam"].state_dict()["state"][0]["step"]
    assert steps == STEPS  # of the one epoch in which it has a weight


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of two epochs, the second with the penalty, under a surrogate that kept what it was told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cem.training.trainer.draw_or_log", lambda *_: None)
        return fitted(
            small(tmp_path_factory.mktemp("runs") / "a", surrogate=surrogate(Watched), epochs=2, penalty_from=2)
        )


def test_term_is_told_the_epochs_from_the_first_with_a_weight_on(watched):
    assert surrogate_of(watched).epochs == [(-1, 1), (0, 1)]


def test_term_may_train_an_adversary_in_every_step_whatever_its_weight(watched):
    steps = surrogate_of(watched).steps
    assert [len(batch.labels) for batch, _ in steps] == [32, 32, 26] * 2
    assert all(training for _, training in steps)


def test_refit_sees_the_whole_training_set_clean_after_every_epoch(watched):
    state, refits = watched.state, surrogate_of(watched).refits
    assert [features.shape for features, _ in refits] == [(90, *state.model.feature_shape)] * 2
    assert torch.equal(refits[0][1], state.data.train.labels)
    # The last epoch is the best here, so the trained model is the one that was refitted on.
    clean, _ = collect_features(state.model, state.plain_train, torch.device("cpu"), 0, noisy=False)
    assert state.best_epoch == 2
    assert torch.equal(refits[1][0], clean)


def test_monitors_and_what_a_refit_says_are_columns(watched):
    table, steps = rows(watched.run_dir), board(watched.run_dir)
    assert [row["scale.information_nats"] for row in table] == [123.4, 123.4]
    assert [row.get("scale.weight_now") for row in table] == [None, 1.0]  # nothing was measured in the first
    assert (steps["scale.information_nats"], steps["scale.weight_now"]) == ([1, 2], [2])


def test_outliers_that_a_term_ignores_are_a_column_and_said_once(make):
    run_dir = train(make(surrogate=surrogate(Ignores), penalty_from=2))
    assert [row.get("scale.outliers") for row in rows(run_dir)] == [None, 2.0, 2.0]
    assert log(run_dir).count("scale found outliers") == log(run_dir).count("outliers in epoch 2") == 1


def test_refit_leaves_the_runs_random_numbers_alone(make):
    a, b = (train(make(kind.__name__, surrogate=surrogate(kind), epochs=2)) for kind in (Scale, Watched))
    assert all(map(torch.equal, weights(a), weights(b)))


def test_surrogate_and_the_term_of_a_defense_train_together(make):
    options = {"surrogate": surrogate(OwnScale), "defenses": (GAIN,), "epochs": 2, "lambd": 3.0, "penalty_from": 2}
    trainer = fitted(make(**options))
    table = rows(trainer.run_dir)
    assert {"gain.loss", "gain.guess", "gain.weight", "gain.seconds"} <= table[1].keys()
    assert [(row["lambda_eff"], row["gain.weight"]) for row in table] == [(0.0, 0.0), (3.0, 0.25)]
    assert table[0]["train_loss"] == table[0]["cross_entropy"]
    expected = table[1]["cross_entropy"] + 3 * table[1]["rob_loss"] + 0.25 * table[1]["gain.loss"]
    assert table[1]["train_loss"] == pytest.approx(expected, rel=1e-12)
    assert table[1]["rob_loss"] > 0
    assert table[1]["gain.seconds"] > 0
    assert list(trainer.state.optimizers) == ["sgd", "surrogate.adam", "defenses.gain.sgd"]
    content = checkpoints.load(trainer.run_dir / "last.pt")
    assert content["surrogate"]["weight"] != 1
    assert content["defenses.gain"]["guess"] > 0  # it learned the size of what is sent


def test_what_an_attacker_in_training_remembers_is_there_to_resume_and_not_in_the_model(make):
    trainer = fitted(make(surrogate="none", defenses=("inversion",)))
    assert checkpoints.load(trainer.run_dir / "last.pt")["defenses.inversion"]["pixels"].any()
    best = checkpoints.load(trainer.run_dir / "best.pt")
    assert best["defense"] == {}
    assert not [name for name in best if "inversion" in name]
    assert not load_run(trainer.run_dir, device="cpu")[1].defense.state_dict()


def test_defense_with_its_options_is_part_of_the_model_in_training_and_in_use(make):
    given = {"gain": Gain.Options(weight=0.0, factor=3.0)}
    trainer = fitted(make(surrogate="none", defenses=(GAIN,), members=given, noise_std=0.0))
    assert trainer.state.terms[0].weight(0) == 0.0
    gain = trainer.state.model.defense.members()["gain"]
    assert isinstance(gain, Gain)
    assert gain.prepared == [0, 1, 2]
    config, model = load_run(trainer.run_dir, device="cpu")
    z = torch.randn(4, *model.feature_shape)
    assert torch.equal(model.defense(z), 3 * z)
    assert config == read_config(trainer.run_dir)


def test_noise_comes_first_unless_it_is_named(make):
    def order(*defenses):
        return list(Trainer(make(surrogate="none", defenses=defenses)).state.model.defense.members())

    assert order() == ["noise"]
    assert order(GAIN) == ["noise", "gain"]
    assert order(GAIN, "noise") == ["gain", "noise"]
