"""Training and scoring of a decoder: what it sees, when it stops, and that it repeats."""

import pytest
import torch

from cem.attacks import fit
from cem.attacks.config import LOSS_NAMES, AttackConfig
from cem.attacks.decoders import build_decoder
from cem.attacks.observe import clean_features, defended, observe
from cem.attacks.splits import AttackSplits, attack_splits, identities
from cem.data import ImageSet, load_data
from cem.defenses import Chain, Defense, GaussianNoise
from cem.errors import DivergedError
from cem.models import build_split_model


@pytest.fixture(scope="module")
def splits():
    whole = attack_splits(load_data("digits", train_size=700), load_data("digits"), aux_size=64)
    return AttackSplits(**{name: images.subset(range(min(64, len(images)))) for name, images in vars(whole).items()})


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_split_model("resnet20", num_classes=10, image_shape=(1, 8, 8), cut_layer=2)
    model.defense = Chain({"noise": GaussianNoise(0.1)})
    return model.eval()


def decoder_for(model):
    torch.manual_seed(1)
    return build_decoder("deconvC8", model.feature_shape, (1, 8, 8))


def fitted(model, splits, loss="mse", **options):
    options = {"cycle_epochs": 1, "max_epochs": 3, "batch_size": 32, "lr": 1e-3, **options}
    return fit.fit_decoder(model, decoder_for(model), loss, splits, AttackConfig(**options))  # type: ignore[arg-type]


def with_validation_errors(monkeypatch, errors):
    """Let the decoder's validation MSE be ``errors``, epoch by epoch."""
    left = iter(errors)
    monkeypatch.setattr(fit, "_mse", lambda *_: next(left))


@pytest.mark.parametrize(("loss", "amp"), [*((loss, False) for loss in LOSS_NAMES), ("mse", True)])
def test_every_loss_trains_also_in_mixed_precision_and_scores_in_single(model, splits, loss, amp):
    found = fitted(model, splits, loss, max_epochs=7, lr=1e-2, amp=amp)
    assert found.curve[-1]["train_loss"] < found.curve[0]["train_loss"]
    assert found.curve[-1]["val_mse"] < 0.95 * found.curve[0]["val_mse"]
    assert fit.reconstruct(model, found.decoder, splits.test, 1, 0).dtype == torch.float32


@pytest.mark.parametrize(
    ("errors", "bound", "restarts", "converged"),
    [
        *(([0.5], bound, [], False) for bound in (1, 2)),
        *(([0.5, 0.4, 0.3], bound, [1], False) for bound in (3, 6)),
        ([0.5, 0.4, 0.3, 0.3, 0.3, 0.3, 0.2], 7, [1, 3], False),
        ([0.5, 0.49, 0.486], 100, [1], True),
        ([0.5, 0.49, 0.484, 0.484, 0.484, 0.484, 0.48], 100, [1, 3], True),
    ],
)
def test_cycles_double_while_whole_ones_fit_until_one_gains_less_than_the_tolerance(
    model, splits, monkeypatch, errors, bound, restarts, converged
):
    with_validation_errors(monkeypatch, errors)
    found = fitted(model, splits, max_epochs=bound, tolerance=0.03)
    assert (len(found.curve), found.converged) == (len(errors), converged)
    rates = [row["lr"] for row in found.curve]
    assert [epoch for epoch in range(1, len(rates)) if rates[epoch] > rates[epoch - 1]] == restarts


def test_weights_of_the_best_epoch_are_kept(model, splits, monkeypatch):
    seen, errors = [], iter([0.5, 0.1, 0.3])

    def spy(decoder, *_):
        seen.append(next(decoder.parameters()).detach().clone())
        return next(errors)

    monkeypatch.setattr(fit, "_mse", spy)
    found = fitted(model, splits)
    assert found.best_epoch == 2
    torch.testing.assert_close(next(found.decoder.parameters()), seen[1], rtol=0, atol=0)
    assert not torch.equal(seen[1], seen[2])
    assert not found.decoder.training


def test_only_the_attackers_own_images_are_read(model, splits, monkeypatch):
    read = set()
    original = ImageSet.__getitems__

    def spy(self, positions):
        read.update((self.origin, index) for index in self.indices[positions].tolist())
        return original(self, positions)

    monkeypatch.setattr(ImageSet, "__getitems__", spy)
    fitted(model, splits)
    assert read == identities(splits.attacker_train) | identities(splits.attacker_val)


def test_the_defense_draws_anew_in_every_epoch(model, splits, monkeypatch):
    views = []
    monkeypatch.setattr(fit, "_mse", lambda *_: 1.0)

    def spy(model, z, queries):
        noise = defended(model, z, queries) - z
        views.append((noise, noise[z.flatten(1).sum(1).argsort()]))  # as it was drawn, and image by image
        return noise

    monkeypatch.setattr(fit, "defended", spy)
    fitted(model, splits, batch_size=64)
    first, second, _ = views  # one batch an epoch
    assert first[0].std().item() == pytest.approx(0.1, rel=0.05)
    assert not any(torch.allclose(one, other, atol=1e-3) for one, other in zip(first, second, strict=True))


def test_scoring_draws_the_noise_of_its_seed_alone(model, splits):
    decoder, scores = decoder_for(model).eval(), []
    for seed, around in ((3, 5), (3, 6), (4, 5)):
        torch.manual_seed(around)
        scores.append(fit.score_decoder(model, decoder, splits.test, 1, seed=seed))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)
    assert not torch.equal(scores[0].mse, scores[2].mse)


def test_fitting_repeats_and_changes_neither_the_target_nor_the_callers_random_numbers(model, splits):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    curves = []
    for _ in range(2):
        decoder_for(model)  # what fitted does first: the same random state as before
        state = torch.get_rng_state()
        curves.append(fitted(model, splits, "l1").curve)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(7)
    assert curves[0] == curves[1]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("queries", "factor"), [(1, 1.0), (16, 1.0), (1, 2.0)])
def test_the_attacker_sees_what_all_defenses_leave_averaged_over_queries(model, splits, queries, factor):
    class Scaled(Defense):
        def transform(self, z):
            return factor * z

    model.defense = Chain({"noise": GaussianNoise(0.1), "scaled": Scaled()})
    images = splits.test.images.float() / 255
    torch.manual_seed(0)
    away = observe(model, images, queries) - factor * model.encoder(images)
    assert away.std().item() == pytest.approx(0.1 * factor / queries**0.5, rel=0.05)


def test_numbers_that_are_not_finite_end_the_training(model, splits, monkeypatch):
    with pytest.raises(DivergedError, match=r"epoch 1 is nan; lower --lr \(1e\+30\)"):
        fitted(model, splits, lr=1e30, batch_size=8)
    with_validation_errors(monkeypatch, [0.5, float("nan")])
    with pytest.raises(DivergedError, match="validation MSE of epoch 2 is not finite"):
        fitted(model, splits)


def test_features_too_large_to_keep_give_the_same_decoder(model, splits, monkeypatch):
    kept = fitted(model, splits).curve
    monkeypatch.setattr("cem.attacks.observe.CACHE_BYTES", 1)
    assert clean_features(model, splits.test) is None
    computed = fitted(model, splits).curve
    assert [row["val_mse"] for row in computed] == pytest.approx([row["val_mse"] for row in kept], rel=1e-4)
