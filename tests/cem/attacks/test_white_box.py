import json
import math

import pytest
import torch
from torch import Tensor, nn

from cem.attacks import white_box
from cem.attacks.metrics import score_images
from cem.attacks.splits import AttackSplits
from cem.attacks.white_box import run_white_box, total_variation, white_box_attack
from cem.data import ImageSet
from cem.data.synthetic import make_test_images
from cem.defenses import Defense, GaussianNoise
from cem.models import SplitModel

CPU = torch.device("cpu")


def a_model(image_shape=(3, 6, 8), noise_std=0.0, scale=1.0, seed=0) -> SplitModel:
    """A wide encoder with batch normalization that an attacker can invert."""
    torch.manual_seed(seed)
    channels = image_shape[0]
    encoder = nn.Sequential(nn.Conv2d(channels, 8 * channels, 3, padding=1), nn.BatchNorm2d(8 * channels), nn.ReLU())
    encoder[1].weight.data.fill_(scale)
    server = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    return SplitModel(encoder, server, image_shape=image_shape, defense=GaussianNoise(noise_std)).eval()


def images_like(model: SplitModel, count=4, image_shape=(3, 6, 8), seed=1) -> Tensor:
    return torch.rand(count, *image_shape, generator=torch.Generator().manual_seed(seed))


def features(model: SplitModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.encoder(x)


def gray(image_shape=(3, 6, 8)) -> Tensor:
    return torch.full(image_shape, 0.5)


def some_splits(image_shape=(1, 6, 6), each=8, seed=0) -> AttackSplits:
    images, labels = make_test_images(4, each, image_shape, seed=seed)
    order = torch.randperm(4 * each, generator=torch.Generator().manual_seed(0))
    sets = [ImageSet(images[part], labels[part], part, "train") for part in order.chunk(4)]
    return AttackSplits(*sets)


def run(model, splits, *, images=4, steps=20, queries=1, seed=0):
    return run_white_box(model, splits, images=images, steps=steps, queries=queries, seed=seed, device=CPU)


# The search.


def test_an_encoder_that_loses_nothing_is_inverted():
    model = a_model()
    x = images_like(model)
    found = white_box_attack(model, features(model, x), gray(), steps=200, tv_weight=0.0)
    assert (found - x).square().mean() < 1e-4


def test_a_defense_that_only_scales_hides_nothing():
    class Faint(Defense):
        def transform(self, z):
            return 0.2 * z

    model = a_model()
    model.defense = Faint()
    x = images_like(model)
    found = white_box_attack(model, 0.2 * features(model, x), gray(), steps=200, tv_weight=0.0)
    assert (found - x).square().mean() < 1e-3


def test_pixels_stay_between_0_and_1():
    model = a_model()
    found = white_box_attack(model, 100 * features(model, images_like(model)), gray(), steps=20, tv_weight=0.0)
    assert found.min() >= 0
    assert found.max() <= 1
    assert ((found == 0) | (found == 1)).any()


def test_a_heavier_total_variation_gives_smoother_images():
    model = a_model()
    z = features(model, images_like(model))
    rough, smooth = (white_box_attack(model, z, gray(), steps=60, tv_weight=weight) for weight in (0.0, 1.0))
    assert total_variation(smooth).mean() < 0.5 * total_variation(rough).mean()


def test_total_variation_is_the_sum_of_steps_between_neighbors_per_pixel():
    images = torch.tensor([[[[0.0, 0.5, 0.5], [0.25, 0.5, 1.0]]], [[[0.3, 0.3, 0.3], [0.3, 0.3, 0.3]]]])
    across, down = 0.5 + 0 + 0.25 + 0.5, 0.25 + 0 + 0.5
    torch.testing.assert_close(total_variation(images), torch.tensor([(across + down) / 6, 0.0]))


def test_images_do_not_influence_one_another():
    model = a_model()
    z = features(model, images_like(model))
    together = white_box_attack(model, z, gray(), steps=15, tv_weight=0.01)
    alone = white_box_attack(model, z[1:2], gray(), steps=15, tv_weight=0.01)
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-3)


def test_batches_give_what_one_batch_gives(monkeypatch):
    model = a_model()
    z = features(model, images_like(model, count=5))
    whole = white_box_attack(model, z, gray(), steps=15, tv_weight=0.01)
    monkeypatch.setattr(white_box, "BATCH", 2)
    torch.testing.assert_close(white_box_attack(model, z, gray(), steps=15, tv_weight=0.01), whole, rtol=0, atol=1e-3)


def test_a_step_that_makes_it_worse_is_not_kept():
    model, start = a_model(), gray() + 0.01
    found = white_box_attack(model, features(model, gray()[None]), start, steps=3, lr=100.0, tv_weight=0.0)
    assert torch.equal(found[0], start)


def test_more_steps_never_end_at_a_higher_objective():
    model, weight = a_model(), 0.01
    z = features(model, images_like(model))

    def objective(steps):
        x = white_box_attack(model, z, gray(), steps=steps, tv_weight=weight)
        return (features(model, x) - z).flatten(1).square().mean(1) + weight * total_variation(x)

    # 100 and 200 steps begin with the same cycle.
    assert (objective(200) <= objective(100) + 1e-6).all()


def test_the_search_starts_at_the_start():
    model = a_model()
    x = images_like(model)
    found = white_box_attack(model, features(model, x), x[0], steps=1, lr=1e-4, tv_weight=0.0)
    assert (found - x[0]).abs().max() <= 1.1e-4


@pytest.mark.parametrize("image_shape", [(1, 4, 4), (2, 1, 5), (1, 3, 1), (3, 5, 2)], ids=str)
def test_any_image_shape_is_searched(image_shape):
    model = a_model(image_shape)
    z = features(model, images_like(model, 2, image_shape))
    found = white_box_attack(model, z, gray(image_shape), steps=3, tv_weight=0.1)
    assert found.shape == (2, *image_shape)
    assert found.isfinite().all()


def test_flat_features_are_inverted_too():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 24))
    model = SplitModel(encoder, nn.Sequential(nn.Linear(24, 3)), image_shape=(1, 3, 4)).eval()
    x = images_like(model, 3, (1, 3, 4))
    found = white_box_attack(model, features(model, x), gray((1, 3, 4)), steps=200, tv_weight=0.0)
    assert (found - x).square().mean() < 1e-3


def test_the_target_is_left_as_it_is():
    model = a_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    white_box_attack(model, torch.rand(2, *model.feature_shape), gray(), steps=2, tv_weight=0.1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert model.encoder[1].training


def test_it_searches_where_gradients_are_switched_off():
    model = a_model()
    x = images_like(model)
    with torch.no_grad():
        found = white_box_attack(model, model.encoder(x), gray(), steps=30, tv_weight=0.0)
    assert not found.requires_grad
    assert (found - x).square().mean() < 0.5 * (gray() - x).square().mean()


def test_no_features_give_no_images():
    model = a_model()
    assert white_box_attack(model, torch.empty(0, *model.feature_shape), gray(), tv_weight=0.0).shape == (0, 3, 6, 8)


def test_progress_hears_of_every_step_of_every_batch(monkeypatch):
    model, heard = a_model(), []
    monkeypatch.setattr(white_box, "BATCH", 2)
    z = torch.rand(3, *model.feature_shape)
    white_box_attack(model, z, gray(), steps=3, tv_weight=0.0, progress=heard.append)
    assert heard == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("options", [{"steps": 0}, {"tv_weight": -1.0}, {"tv_weight": math.nan}], ids=str)
def test_unusable_numbers_are_refused(options):
    model = a_model()
    with pytest.raises(ValueError, match="steps must be at least 1 and tv_weight not negative"):
        white_box_attack(
            model, torch.rand(1, *model.feature_shape), gray(), **{"steps": 1, "tv_weight": 0.0, **options}
        )


# The attack on a run.


def test_the_result_is_the_entry_of_the_report():
    result = run(a_model((1, 6, 6)), some_splits(), images=3, steps=5)
    assert list(result) == ["images", "steps", "tv_weight", "seconds", "train_target", "test_target"]
    assert (result["images"], result["steps"]) == (3, 5)
    for name in ("train_target", "test_target"):
        assert list(result[name]) == ["mse", "psnr", "ssim"]
    assert result["seconds"] > 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_same_seed_finds_the_same():
    model, splits = a_model((1, 6, 6), noise_std=0.5), some_splits()
    results = [run(model, splits, seed=seed, steps=5) for seed in (0, 0, 1)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_the_callers_random_numbers_go_on_as_if_nothing_had_been():
    model, splits = a_model((1, 6, 6), noise_std=0.5), some_splits()
    state = torch.get_rng_state()
    run(model, splits, steps=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_makes_it_harder_and_asking_again_makes_it_easier():
    splits = some_splits()
    clean = run(a_model((1, 6, 6)), splits)
    noisy = run(a_model((1, 6, 6), noise_std=2.0), splits)
    averaged = run(a_model((1, 6, 6), noise_std=2.0), splits, queries=400)
    for name in ("train_target", "test_target"):
        assert clean[name]["mse"] < averaged[name]["mse"] < noisy[name]["mse"]


def test_training_and_unseen_images_are_scored_apart():
    model, splits, others = a_model((1, 6, 6)), some_splits(seed=0), some_splits(seed=7)
    unseen = AttackSplits(splits.target_train, splits.attacker_train, splits.attacker_val, others.test)
    first, second = run(model, splits, steps=5), run(model, unseen, steps=5)
    assert first["train_target"] == second["train_target"]
    assert first["test_target"] != second["test_target"]


def test_every_target_is_attacked_on_the_same_images(monkeypatch):
    attacked = []

    def record(found, originals):
        attacked[-1].append(originals)
        return score_images(found, originals)

    monkeypatch.setattr(white_box, "score_images", record)
    for noise_std, queries in ((0.0, 1), (0.5, 1), (0.5, 3)):
        attacked.append([])
        run(a_model((1, 6, 6), noise_std=noise_std), some_splits(), steps=1, queries=queries)
    assert all(
        torch.equal(first, other) for others in attacked[1:] for first, other in zip(attacked[0], others, strict=True)
    )


def test_the_weight_is_chosen_on_the_attackers_images_alone():
    model, splits = a_model((1, 6, 6), noise_std=0.5), some_splits(seed=0)
    others = some_splits(seed=7)
    swapped = AttackSplits(others.target_train, splits.attacker_train, splits.attacker_val, others.test)
    first, second = run(model, splits, steps=10), run(model, swapped, steps=10)
    assert first["tv_weight"] == second["tv_weight"]
    assert first["test_target"] != second["test_target"]


def test_noisier_features_are_met_with_a_heavier_weight():
    splits = some_splits()
    weights = [run(a_model((1, 6, 6), noise_std=std), splits)["tv_weight"] for std in (0.0, 2.0)]
    assert weights[0] < weights[1]


def test_the_weight_follows_the_scale_of_the_features():
    splits = some_splits()
    weights = [run(a_model((1, 6, 6), scale=scale), splits, steps=10)["tv_weight"] for scale in (1.0, 8.0)]
    assert weights[1] == pytest.approx(64 * weights[0], rel=1e-4)


def test_the_weight_comes_from_the_grid_and_gives_the_smallest_error_on_validation(monkeypatch):
    model, splits = a_model((1, 6, 6)), some_splits()
    monkeypatch.setattr(white_box, "TV_WEIGHTS", (100.0, 1e-3))
    heavy_first = run(model, splits)
    monkeypatch.setattr(white_box, "TV_WEIGHTS", (1e-3, 100.0))
    light_first = run(model, splits)
    assert heavy_first["tv_weight"] == light_first["tv_weight"]
    monkeypatch.setattr(white_box, "TV_WEIGHTS", (100.0,))
    assert run(model, splits)["tv_weight"] == pytest.approx(1e5 * light_first["tv_weight"])


def test_no_more_images_than_there_are():
    assert run(a_model((1, 6, 6)), some_splits(each=8), images=1000, steps=1)["images"] == 8


@pytest.mark.parametrize("option", ["images", "steps", "queries"])
def test_sizes_below_1_are_refused(option):
    with pytest.raises(ValueError, match="at least 1"):
        run(a_model((1, 6, 6)), some_splits(), **{option: 0})
