"""Training and scoring of a decoder: what it sees, when it stops, and that it repeats."""

import logging
from dataclasses import replace

import pytest
import torch

from cem.attacks import fit
from cem.attacks.base import Own, Progress
from cem.attacks.fit import Fitted, Schedule
from cem.attacks.losses import LOSSES
from cem.attacks.networks import Average, build_network
from cem.attacks.observe import clean_features, defended, observe
from cem.attacks.splits import attack_splits, identities
from cem.data import ImageSet, load_data
from cem.defenses import Chain, Defense, GaussianNoise
from cem.errors import DivergedError
from cem.models import build_split_model


@pytest.fixture(scope="module")
def own():
    whole = attack_splits(load_data("digits", train_size=700), load_data("digits"))
    return Own(whole.attacker_train.subset(range(64)), whole.attacker_val.subset(range(64)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_split_model("resnet20", num_classes=10, image_shape=(1, 8, 8), cut_layer=2)
    model.defense = Chain({"noise": GaussianNoise(0.1)})
    return model.eval()


@pytest.fixture
def fitted(model, own, tmp_path):
    """Fits a small network in three epochs, unless a call says more."""
    torch.manual_seed(2)
    sent = observe(model, own.val.images.float() / 255)

    def call(loss="mse", *, key=1, report=lambda epoch: None, **options):
        torch.manual_seed(1)
        network = build_network("deconvC8", model.feature_shape, (1, 8, 8))
        schedule = Schedule(**{"cycle_epochs": 1, "max_cycles": 2, "batch_size": 32, "lr": 1e-3, **options})
        progress = Progress(logging.getLogger("fit"), tmp_path, {"key": key})
        return fit.fit_network(
            model, network, loss, own, sent, schedule, queries=1, seed=0, progress=progress, name="one", report=report
        )

    return call


def with_validation_errors(monkeypatch, errors):
    """Let the network's validation MSE be ``errors``, epoch by epoch."""
    left = iter(errors)
    monkeypatch.setattr(fit, "mse", lambda *_: next(left))


@pytest.mark.parametrize(("loss", "amp"), [*((loss, False) for loss in LOSSES), ("mse", True)])
def test_every_loss_trains_also_in_mixed_precision_and_scores_in_single(fitted, model, own, loss, amp):
    found = fitted(loss, max_cycles=3, lr=1e-2, amp=amp)
    assert found.curve[-1]["train_loss"] < found.curve[0]["train_loss"]
    assert found.curve[-1]["val_mse"] < 0.95 * found.curve[0]["val_mse"]
    assert fit.decode(found.network, observe(model, own.val.images.float() / 255)).dtype == torch.float32


@pytest.mark.parametrize(
    ("errors", "bound", "restarts", "converged"),
    [
        ([0.5], 1, [], False),
        ([0.5, 0.4, 0.3], 2, [1], False),
        ([0.5, 0.4, 0.3, 0.3, 0.3, 0.3, 0.2], 3, [1, 3], False),
        ([0.5, 0.49, 0.486], 9, [1], True),
        ([0.5, 0.49, 0.484, 0.484, 0.484, 0.484, 0.48], 9, [1, 3], True),
    ],
)
def test_cycles_double_until_the_bound_or_until_one_gains_less_than_the_tolerance(
    fitted, monkeypatch, errors, bound, restarts, converged
):
    with_validation_errors(monkeypatch, errors)
    found = fitted(max_cycles=bound, tolerance=0.03)
    assert (len(found.curve), found.converged) == (len(errors), converged)
    rates = [row["lr"] for row in found.curve]
    assert [epoch for epoch in range(1, len(rates)) if rates[epoch] > rates[epoch - 1]] == restarts


def test_weights_of_the_best_epoch_are_kept(fitted, monkeypatch):
    seen, errors = [], iter([0.5, 0.1, 0.3])

    def spy(network, *_):
        seen.append(next(network.parameters()).detach().clone())
        return next(errors)

    monkeypatch.setattr(fit, "mse", spy)
    found = fitted()
    assert found.best_epoch == 2
    torch.testing.assert_close(next(found.network.parameters()), seen[1], rtol=0, atol=0)
    assert not torch.equal(seen[1], seen[2])
    assert not found.network.training


class Gray(torch.nn.Module):
    """Answers one gray level for all pixels."""

    def __init__(self, level):
        super().__init__()
        self.level = torch.nn.Parameter(torch.tensor(level))

    def forward(self, z):
        return self.level.expand(len(z), 1, 8, 8)


@pytest.mark.parametrize(("levels", "averaged"), [([0.6, 0.4, 0.9], 2), ([0.5, 0.3, 0.1], 1), ([0.7, 0.7, 0.1], 3)])
def test_answers_of_as_many_snapshots_are_averaged_as_do_best_on_validation_images(own, levels, averaged):
    images = replace(own.val, images=torch.full_like(own.val.images, 128))
    states = [Gray(level).state_dict() for level in levels]
    average, mse = fit._average(Gray(0.0), states, torch.zeros(64, 2), images, "mse")
    assert len(average.members) == averaged
    mean = sum(levels[:averaged]) / averaged
    torch.testing.assert_close(average(torch.zeros(3, 2)), torch.full((3, 1, 8, 8), mean))
    assert mse == pytest.approx((mean - 128 / 255) ** 2, abs=1e-8)


def test_only_the_attackers_own_images_are_read(fitted, own, monkeypatch):
    read = set()
    original = ImageSet.__getitems__

    def spy(self, positions):
        read.update((self.origin, index) for index in self.indices[positions].tolist())
        return original(self, positions)

    monkeypatch.setattr(ImageSet, "__getitems__", spy)
    fitted()
    assert read == identities(own.train)


def test_the_defense_draws_anew_in_every_epoch(fitted, monkeypatch):
    views = []
    monkeypatch.setattr(fit, "mse", lambda *_: 1.0)

    def spy(model, z, queries):
        noise = defended(model, z, queries) - z
        views.append((noise, noise[z.flatten(1).sum(1).argsort()]))  # as it was drawn, and image by image
        return noise

    monkeypatch.setattr(fit, "defended", spy)
    fitted(batch_size=64)
    first, second, _ = views  # one batch an epoch
    assert first[0].std().item() == pytest.approx(0.1, rel=0.05)
    assert not any(torch.allclose(one, other, atol=1e-3) for one, other in zip(first, second, strict=True))


def test_fitting_repeats_and_changes_neither_the_target_nor_the_callers_random_numbers(fitted, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    build_network("deconvC8", model.feature_shape, (1, 8, 8))
    state = torch.get_rng_state()
    curves = [fitted("l1", key=key).curve for key in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert curves[0] == curves[1]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["cut off", "bounded"])
def test_training_goes_on_after_its_last_whole_cycle_to_the_numbers_of_one_that_was_never_stopped(fitted, how):
    whole = fitted(max_cycles=3, tolerance=1e-9, key="whole")
    again = []

    def stop(epoch):
        if epoch == 5:
            raise KeyboardInterrupt

    if how == "cut off":
        with pytest.raises(KeyboardInterrupt):
            fitted(max_cycles=3, tolerance=1e-9, report=stop)
    else:
        assert len(fitted(max_cycles=2, tolerance=1e-9).curve) == 3
    resumed = fitted(max_cycles=3, tolerance=1e-9, report=again.append)
    assert again == [4, 5, 6, 7]
    assert (resumed.curve, resumed.cycles) == (whole.curve, whole.cycles)
    weights = (each.network.state_dict().values() for each in (resumed, whole))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_what_was_kept_of_another_attack_or_is_damaged_is_trained_again(fitted, tmp_path):
    first, again = fitted(), []
    fitted(key=2, report=again.append)
    (tmp_path / "one.pt").write_bytes(b"half a file")
    assert fitted(key=2, report=again.append).curve == first.curve
    assert again == [1, 2, 3, 1, 2, 3]


def test_the_published_schedule_is_one_cosine_of_fifty_epochs_after_which_nobody_can_say_whether_it_converged(
    fitted, monkeypatch
):
    assert (fit.PUBLISHED.epochs(), fit.PUBLISHED.batch_size, fit.PUBLISHED.weight_decay) == (50, 256, 1e-4)
    monkeypatch.setattr(fit, "mse", lambda *_: 1.0)
    found = fitted(**{**vars(fit.PUBLISHED), "cycle_epochs": 4, "batch_size": 64})
    assert found.converged is None
    rates = [row["lr"] for row in found.curve]
    assert rates[0] == pytest.approx(1e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 1e-5


@pytest.mark.parametrize(("images", "epochs"), [(1, 5), (591, 5), (6400, 5), (12_000, 3), (48_000, 1), (10**7, 1)])
def test_a_first_cycle_has_some_five_hundred_steps_but_at_most_five_passes(images, epochs):
    assert fit.usual_cycle(images, 64) == epochs


@pytest.mark.parametrize(
    ("cycles", "gain"),
    [
        ([1.0], None),
        ([1.0, 0.5], None),
        ([1.0, 0.9, 0.855], 1 - 0.95 ** (0.5 / 0.5)),  # gains of 10 % and 5 %: then 2.5 %, ... in logarithms
        ([1.0, 0.9, 0.9], 0.0),
        ([1.0, 0.99, 0.9], 1 - (0.9 / 0.99) ** 9),  # gains that grow have no end; nine more such are the most it says
    ],
)
def test_what_more_cycles_might_gain_is_extrapolated_from_the_last_two(cycles, gain):
    found = Fitted(Average([]), 0.0, [], cycles, 1, False, 0.0).extrapolated_gain
    assert found == (None if gain is None else pytest.approx(gain))


@pytest.mark.parametrize(("queries", "factor"), [(1, 1.0), (16, 1.0), (1, 2.0)])
def test_the_attacker_sees_what_all_defenses_leave_averaged_over_queries(model, own, queries, factor):
    class Scaled(Defense):
        def transform(self, z):
            return factor * z

    model.defense = Chain({"noise": GaussianNoise(0.1), "scaled": Scaled()})
    images = own.val.images.float() / 255
    torch.manual_seed(0)
    away = observe(model, images, queries) - factor * model.encoder(images)
    assert away.std().item() == pytest.approx(0.1 * factor / queries**0.5, rel=0.05)


def test_numbers_that_are_not_finite_end_the_training(fitted, monkeypatch):
    with pytest.raises(DivergedError, match="loss in epoch 1 is nan; lower the rate"):
        fitted(lr=1e30, batch_size=8)
    with_validation_errors(monkeypatch, [0.5, float("nan")])
    with pytest.raises(DivergedError, match="validation MSE of one in epoch 2 is not finite"):
        fitted()


def test_features_too_large_to_keep_give_the_same_network(fitted, model, own, monkeypatch):
    kept = fitted().curve
    monkeypatch.setattr("cem.attacks.observe.CACHE_BYTES", 1)
    assert clean_features(model, own.val) is None
    computed = fitted(key=2).curve
    assert [row["val_mse"] for row in computed] == pytest.approx([row["val_mse"] for row in kept], rel=1e-4)
