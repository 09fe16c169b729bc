"""The attack of whoever has the client's weights: the search for pixels, and its figures of a run."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from cem.attacks import white_box
from cem.attacks.splits import AttackSplits
from cem.attacks.white_box import run_white_box, total_variation, white_box_attack
from cem.data import ImageSet
from cem.data.synthetic import make_test_images
from cem.defenses import Defense, GaussianNoise
from cem.models import SplitModel

GRAY = torch.full((3, 6, 8), 0.5)


def a_model(image_shape=(3, 6, 8), noise_std=0.0, scale=1.0, flat=False) -> SplitModel:
    """A wide encoder with batch normalization, or a flat one, that an attacker can invert."""
    torch.manual_seed(0)
    channels = image_shape[0]
    norm = nn.BatchNorm2d(8 * channels)
    norm.weight.data.fill_(scale)
    encoder = nn.Sequential(nn.Conv2d(channels, 8 * channels, 3, padding=1), norm, nn.ReLU())
    if flat:
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 2 * math.prod(image_shape)))
    server = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    return SplitModel(encoder, server, image_shape=image_shape, defense=GaussianNoise(noise_std)).eval()


def images_like(count=4) -> Tensor:
    return torch.rand(count, *GRAY.shape, generator=torch.Generator().manual_seed(1))


def features(model: SplitModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.encoder(x)


def search(model: SplitModel, z: Tensor, start: Tensor = GRAY, **options) -> Tensor:
    return white_box_attack(model, z, start, **{"steps": 15, "tv_weight": 0.0, **options})


def some_splits(seed=0) -> AttackSplits:
    images, labels = make_test_images(4, 8, (1, 6, 6), seed=seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return AttackSplits(*(ImageSet(images[part], labels[part], part, "train") for part in order.chunk(4)))


def run(model, splits, *, images=4, steps=20, queries=1, seed=0):
    device = torch.device("cpu")
    found = run_white_box(model, splits, images=images, steps=steps, queries=queries, seed=seed, device=device)
    assert found.pop("seconds") > 0
    return found


class Faint(Defense):
    def transform(self, z):
        return 0.2 * z


@pytest.mark.parametrize(("flat", "defense"), [(False, None), (True, None), (False, Faint())])
def test_an_encoder_that_loses_nothing_is_inverted_also_where_a_defense_only_scales(flat, defense):
    model, x = a_model(flat=flat), images_like()
    if defense is not None:
        model.defense = defense
    with torch.no_grad():  # nor need the caller's gradients be on
        found = search(model, model.defense(features(model, x)), steps=200)
    assert (found - x).square().mean() < 1e-3


def test_total_variation_is_the_sum_of_steps_between_neighbors_per_pixel():
    images = torch.tensor([[[[0.0, 0.5, 0.5], [0.25, 0.5, 1.0]]], [[[0.3, 0.3, 0.3], [0.3, 0.3, 0.3]]]])
    across, down = 0.5 + 0 + 0.25 + 0.5, 0.25 + 0 + 0.5
    torch.testing.assert_close(total_variation(images), torch.tensor([(across + down) / 6, 0.0]))


def test_images_do_not_influence_one_another_alone_or_in_batches(monkeypatch):
    model, heard = a_model(), []
    z = features(model, images_like(count=5))
    whole, alone = search(model, z, tv_weight=0.01), search(model, z[1:2], tv_weight=0.01)
    torch.testing.assert_close(alone[0], whole[1], rtol=0, atol=1e-3)
    monkeypatch.setattr(white_box, "BATCH", 3)
    batches = search(model, z, tv_weight=0.01, progress=heard.append)
    torch.testing.assert_close(batches, whole, rtol=0, atol=1e-3)
    assert heard == 15 * [3] + 15 * [2]
    assert search(model, z[:0]).shape == (0, *GRAY.shape)


def test_the_search_starts_at_the_start_stays_in_the_box_and_keeps_no_step_that_makes_it_worse():
    model, x = a_model(), images_like()
    near = search(model, features(model, x), x[0], steps=1, lr=1e-4)
    assert (near - x[0]).abs().max() <= 1.1e-4
    assert torch.equal(search(model, features(model, GRAY[None]), GRAY + 0.01, steps=3, lr=100.0)[0], GRAY + 0.01)
    bounded = search(model, 100 * features(model, x))
    assert (bounded.min(), bounded.max()) == (0, 1)


def test_the_target_is_left_as_it_is():
    model = a_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    search(model, torch.rand(2, *model.feature_shape), steps=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_the_result_is_the_entry_of_the_report_and_repeats_with_its_seed():
    model, splits = a_model((1, 6, 6), noise_std=0.5), some_splits()
    state = torch.get_rng_state()
    first, again, other = (run(model, splits, seed=seed, images=1000, steps=5) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(first) == ["images", "steps", "tv_weight", "train_target", "test_target"]
    assert (first["images"], first["steps"]) == (8, 5)  # no more images than there are
    assert json.loads(json.dumps(first, allow_nan=False)) == first == again != other


def test_noise_makes_it_harder_takes_a_heavier_weight_and_asking_again_makes_it_easier():
    splits = some_splits()
    clean, noisy, averaged = (
        run(a_model((1, 6, 6), noise_std=std), splits, queries=queries) for std, queries in ((0, 1), (2, 1), (2, 400))
    )
    for name in ("train_target", "test_target"):
        assert clean[name]["mse"] < averaged[name]["mse"] < noisy[name]["mse"]
    assert clean["tv_weight"] < noisy["tv_weight"]


@pytest.mark.parametrize("swapped", ["target_train", "test"])
def test_the_weight_is_chosen_on_the_attackers_images_and_each_set_is_scored_apart(swapped):
    model, splits, others = a_model((1, 6, 6), noise_std=0.5), some_splits(), some_splits(seed=7)
    first = run(model, splits, steps=10)
    second = run(model, AttackSplits(**vars(splits) | {swapped: getattr(others, swapped)}), steps=10)
    assert first["tv_weight"] == second["tv_weight"]
    changed = {name for name in ("train_target", "test_target") if first[name] != second[name]}
    assert changed >= {"train_target" if swapped == "target_train" else "test_target"}
    assert swapped == "target_train" or changed == {"test_target"}


def test_the_weight_of_the_grid_with_the_smallest_error_follows_the_scale_of_the_features(monkeypatch):
    splits, weights = some_splits(), []
    for scale, grid in ((1, (100.0, 1e-3)), (1, (1e-3, 100.0)), (8, (1e-3, 100.0)), (1, (100.0,))):
        monkeypatch.setattr(white_box, "TV_WEIGHTS", grid)
        weights.append(run(a_model((1, 6, 6), scale=scale), splits)["tv_weight"])
    assert [each / weights[0] for each in weights] == pytest.approx([1, 1, 64, 1e5], rel=1e-4)


def test_unusable_numbers_are_refused():
    for option in ({"steps": 0}, {"tv_weight": -1.0}, {"tv_weight": math.nan}):
        with pytest.raises(ValueError, match="steps must be at least 1 and tv_weight not negative"):
            search(a_model(), torch.rand(1, 24, 6, 8), **option)
    for option in ("images", "steps", "queries"):
        with pytest.raises(ValueError, match="at least 1"):
            run(a_model((1, 6, 6)), some_splits(), **{option: 0})
