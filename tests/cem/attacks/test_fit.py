"""Training and scoring of a decoder: what it sees, when it stops, and that it repeats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cem.attacks import fit
from cem.attacks.config import LOSS_NAMES, AttackConfig
from cem.attacks.decoders import build_decoder
from cem.attacks.observe import clean_features, defended, observe
from cem.attacks.splits import AttackSplits, attack_splits, identities
from cem.data import ImageSet, load_data
from cem.defenses import Chain, Defense, GaussianNoise
from cem.errors import DivergedError
from cem.models import SplitModel, build_split_model


@pytest.fixture(scope="module")
def splits() -> AttackSplits:
    whole = attack_splits(load_data("digits", train_size=700), load_data("digits"), aux_size=64)
    return AttackSplits(**{name: images.subset(range(min(64, len(images)))) for name, images in vars(whole).items()})


@pytest.fixture
def model() -> SplitModel:
    torch.manual_seed(0)
    model = build_split_model("resnet20", num_classes=10, image_shape=(1, 8, 8), cut_layer=2)
    model.defense = Chain({"noise": GaussianNoise(0.1)})
    return model.eval()


def decoder_for(model: SplitModel) -> nn.Module:
    torch.manual_seed(1)
    return build_decoder("deconvC8", model.feature_shape, (1, 8, 8))


def small(**options: object) -> AttackConfig:
    return AttackConfig(**{"cycle_epochs": 1, "max_epochs": 3, "batch_size": 32, "lr": 1e-3, **options})  # type: ignore[arg-type]


def with_validation_errors(monkeypatch: pytest.MonkeyPatch, errors: list[float]) -> None:
    """Let the decoder's validation MSE be ``errors``, epoch by epoch."""
    left = iter(errors)
    monkeypatch.setattr(fit, "_mse", lambda *_: next(left))


def test_validation_error_falls(model: SplitModel, splits: AttackSplits) -> None:
    fitted = fit.fit_decoder(model, decoder_for(model), "mse", splits, small(max_epochs=15, lr=1e-2))
    errors = [row["val_mse"] for row in fitted.curve]
    assert min(errors) < 0.8 * errors[0]


@pytest.mark.parametrize(("bound", "cycles"), [(1, [1]), (2, [1]), (3, [1, 2]), (6, [1, 2]), (7, [1, 2, 4])], ids=str)
def test_cycles_double_while_they_fit(
    model: SplitModel, splits: AttackSplits, monkeypatch: pytest.MonkeyPatch, bound: int, cycles: list[int]
) -> None:
    with_validation_errors(monkeypatch, [0.5**n for n in range(100)])
    curve = fit.fit_decoder(model, decoder_for(model), "mse", splits, small(max_epochs=bound)).curve
    assert len(curve) == sum(cycles)
    # Two steps an epoch: where a cycle of n steps ends, its last step is taken at (1 + cos(π (n-1)/n)) / 2 of the rate.
    lowest = {1: 0.505, 2: 0.155, 4: 0.0476}
    ends = [
        row["epoch"]
        for row in curve
        if any(row["lr"] == pytest.approx(1e-3 * each, rel=0.01) for each in lowest.values())
    ]
    assert ends == [sum(cycles[: n + 1]) for n in range(len(cycles))]


def test_decoder_that_stopped_improving_has_converged(
    model: SplitModel, splits: AttackSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_validation_errors(monkeypatch, [0.5, 0.49, 0.49])
    fitted = fit.fit_decoder(model, decoder_for(model), "mse", splits, small(max_epochs=100, tolerance=0.03))
    assert fitted.converged
    assert len(fitted.curve) == 3


def test_decoder_stopped_by_the_bound_has_not_converged(
    model: SplitModel, splits: AttackSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_validation_errors(monkeypatch, [0.5, 0.4, 0.3])
    assert not fit.fit_decoder(model, decoder_for(model), "mse", splits, small(max_epochs=3)).converged


def test_a_single_cycle_says_nothing_of_convergence(model: SplitModel, splits: AttackSplits) -> None:
    assert not fit.fit_decoder(model, decoder_for(model), "mse", splits, small(max_epochs=1)).converged


def test_weights_of_the_best_epoch_are_kept(
    model: SplitModel, splits: AttackSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    decoder = decoder_for(model)
    errors = iter([0.5, 0.1, 0.3])

    def spy(*_: object) -> float:
        seen.append(next(decoder.parameters()).detach().clone())
        return next(errors)

    monkeypatch.setattr(fit, "_mse", spy)
    fitted = fit.fit_decoder(model, decoder, "mse", splits, small())
    assert fitted.best_epoch == 2
    torch.testing.assert_close(next(fitted.decoder.parameters()), seen[1], rtol=0, atol=0)
    assert not torch.equal(seen[1], seen[2])
    assert not fitted.decoder.training


def test_only_the_attackers_own_images_are_read(
    model: SplitModel, splits: AttackSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[tuple[str, int]] = set()
    original = ImageSet.__getitems__

    def spy(self: ImageSet, positions: list[int]) -> tuple[Tensor, Tensor]:
        read.update((self.origin, index) for index in self.indices[positions].tolist())
        return original(self, positions)

    monkeypatch.setattr(ImageSet, "__getitems__", spy)
    fit.fit_decoder(model, decoder_for(model), "mse", splits, small())
    assert read == identities(splits.attacker_train) | identities(splits.attacker_val)


def test_the_defense_draws_anew_in_every_epoch(
    model: SplitModel, splits: AttackSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    views: list[Tensor] = []
    monkeypatch.setattr(fit, "_mse", lambda *_: 1.0)

    def spy(model: SplitModel, z: Tensor, queries: int) -> Tensor:
        views.append(defended(model, z, queries) - z)
        return views[-1]

    monkeypatch.setattr(fit, "defended", spy)
    fit.fit_decoder(model, decoder_for(model), "mse", splits, small(batch_size=64))
    noise = torch.stack(views)  # one batch an epoch
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(noise[0], noise[1])


def test_scoring_twice_with_a_seed_gives_the_same_numbers(model: SplitModel, splits: AttackSplits) -> None:
    decoder = decoder_for(model).eval()
    torch.manual_seed(5)
    first = fit.score_decoder(model, decoder, splits.test, 1, seed=3)
    torch.manual_seed(6)
    again = fit.score_decoder(model, decoder, splits.test, 1, seed=3)
    other = fit.score_decoder(model, decoder, splits.test, 1, seed=4)
    assert torch.equal(first.mse, again.mse)
    assert first.ssim is not None
    assert again.ssim is not None
    assert torch.equal(first.ssim, again.ssim)
    assert not torch.equal(first.mse, other.mse)


def test_fitting_twice_with_a_seed_gives_the_same_decoder(model: SplitModel, splits: AttackSplits) -> None:
    one, other = (fit.fit_decoder(model, decoder_for(model), "l1", splits, small()).curve for _ in range(2))
    assert one == other


def test_fitting_leaves_the_callers_random_numbers_alone(model: SplitModel, splits: AttackSplits) -> None:
    decoder = decoder_for(model)
    before = torch.get_rng_state()
    fit.fit_decoder(model, decoder, "mse", splits, small())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_target_does_not_change(model: SplitModel, splits: AttackSplits) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit.fit_decoder(model, decoder_for(model), "mse", splits, small())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("queries", [1, 16])
def test_repeated_queries_average_the_noise_away(model: SplitModel, splits: AttackSplits, queries: int) -> None:
    images = splits.test.images.float() / 255
    torch.manual_seed(0)
    noise = observe(model, images, queries) - model.encoder(images)
    assert noise.std().item() == pytest.approx(0.1 / queries**0.5, rel=0.05)


def test_the_attacker_sees_what_all_defenses_leave(model: SplitModel, splits: AttackSplits) -> None:
    class Double(Defense):
        def transform(self, z: Tensor) -> Tensor:
            return 2 * z

    model.defense = Chain({"noise": GaussianNoise(0.1), "double": Double()})
    images = splits.test.images.float() / 255
    torch.manual_seed(0)
    away = observe(model, images) - 2 * model.encoder(images)
    assert away.std().item() == pytest.approx(0.2, rel=0.05)


def test_a_validation_error_that_is_no_number_ends_the_training(
    model: SplitModel, splits: AttackSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_validation_errors(monkeypatch, [0.5, float("nan")])
    with pytest.raises(DivergedError, match="validation MSE of epoch 2 is not finite"):
        fit.fit_decoder(model, decoder_for(model), "mse", splits, small())


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_every_loss_trains(model: SplitModel, splits: AttackSplits, loss: str) -> None:
    curve = fit.fit_decoder(model, decoder_for(model), loss, splits, small(max_epochs=7, lr=1e-2)).curve
    assert curve[-1]["train_loss"] < curve[0]["train_loss"]


def test_mixed_precision_trains_and_scores_in_single(model: SplitModel, splits: AttackSplits) -> None:
    fitted = fit.fit_decoder(model, decoder_for(model), "mse", splits, small(amp=True, max_epochs=7, lr=1e-2))
    assert fitted.curve[-1]["train_loss"] < fitted.curve[0]["train_loss"]
    assert fit.reconstruct(model, fitted.decoder, splits.test, 1, 0).dtype == torch.float32


def test_a_loss_that_is_no_number_ends_the_training(model: SplitModel, splits: AttackSplits) -> None:
    with pytest.raises(DivergedError, match=r"epoch 1 is nan; lower --lr \(1e\+30\)"):
        fit.fit_decoder(model, decoder_for(model), "mse", splits, small(lr=1e30, batch_size=8))


def test_features_too_large_to_keep_give_the_same_decoder(
    model: SplitModel, splits: AttackSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = fit.fit_decoder(model, decoder_for(model), "mse", splits, small()).curve
    monkeypatch.setattr("cem.attacks.observe.CACHE_BYTES", 1)
    assert clean_features(model, splits.test) is None
    computed = fit.fit_decoder(model, decoder_for(model), "mse", splits, small()).curve
    assert [row["val_mse"] for row in computed] == pytest.approx([row["val_mse"] for row in kept], rel=1e-4)
