"""The attack of whoever has the client's weights: the search for pixels, and how it chooses start and prior."""

import json
import logging
import math
from collections import Counter
from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from cem.attacks import white_box
from cem.attacks.base import UNSEEN, VAL, Exposed, Own, Progress, Record
from cem.attacks.networks import Average
from cem.attacks.white_box import WhiteBox, descend, surprise, total_variation
from cem.data import ImageSet
from cem.data.synthetic import make_test_images
from cem.defenses import Defense, GaussianNoise
from cem.models import SplitModel

SHAPE = (1, 6, 6)


def a_model(defense=None) -> SplitModel:
    """A wide encoder with batch normalization that an attacker can invert."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    server = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    model = SplitModel(encoder, server, image_shape=SHAPE, defense=defense or GaussianNoise(0.1))
    return model.eval().requires_grad_(False)


def some_images(seed=0, count=8) -> ImageSet:
    images, labels = make_test_images(4, count // 4, SHAPE, seed=seed)
    return ImageSet(images, labels, torch.arange(len(images)), "train")


def pixels(images: ImageSet) -> Tensor:
    return images.images.float() / 255


def answers(target, images, off):
    """A decoder that knows every image, and answers with an error of ``off`` in each pixel."""
    known, sent = torch.cat([pixels(each) for each in images]), torch.cat([*target.sent.values()]).flatten(1)
    known = known + off * torch.randn(known.shape, generator=torch.Generator().manual_seed(3))
    network = nn.Module()
    network.forward = lambda z: known[torch.cdist(z.flatten(1), sent).argmin(1)]
    return network


def a_case(model=None, queries=1, unseen=1):
    """What lies open and what the attacker has, and the images that it is judged on."""
    model, val, judged = model or a_model(), some_images(seed=5), some_images(unseen)
    target = Exposed(model, {}, torch.empty(0), 4, SHAPE, queries, 0)
    torch.manual_seed(7)
    sent = {VAL: target.observe(pixels(val)), UNSEEN: target.observe(pixels(judged))}
    return Exposed(model, sent, torch.empty(0), 4, SHAPE, queries, 0), Own(some_images(9, 40), val), judged


def attack(case, folder, off=None, steps=40, show=lambda done, what: None):
    """By a decoder, or with several in ``off`` by the average of such, the best one first."""
    target, own, judged = case
    decoders = [answers(target, (own.val, judged), each) for each in (off if isinstance(off, list) else [off]) if each]
    decoder = Average(decoders) if len(decoders) > 1 else [*decoders, None][0]
    earlier = {} if decoder is None else {"decoder": Record({}, {}, decoder)}
    folder.mkdir(exist_ok=True)
    progress = Progress(logging.getLogger("test"), folder, {}, earlier, show)
    return WhiteBox().run(target, own, WhiteBox.Options(steps=steps), progress)


def found(record: Record, name=UNSEEN) -> Tensor:
    (guesses,) = record.guesses.values()
    return guesses[name]


def mse(guess: Tensor, images: ImageSet) -> float:
    return (guess - pixels(images)).square().mean().item()


class Faint(Defense):
    def transform(self, z):
        return 0.2 * z


class Heavy(Defense):
    """Noise of which all is known but that it is Gaussian."""

    def transform(self, z):
        return z + 0.1 * torch.randn_like(z)

    def log_likelihood(self, sent, z):
        return -(sent - z).abs().flatten(1).sum(1) / 0.1


@pytest.mark.parametrize("defense", [GaussianNoise(0), Faint()])
def test_an_encoder_that_loses_nothing_is_inverted_from_the_mean_image(tmp_path, defense):
    case = a_case(a_model(defense))
    mean = pixels(case[1].train).mean(0)
    assert mse(found(attack(case, tmp_path, steps=150)), case[2]) < 0.05 * mse(mean, case[2])


@pytest.mark.parametrize(
    ("defense", "queries", "expected"),
    [
        (GaussianNoise(0.5), 1, lambda z, sent: (z - sent) ** 2 / (2 * 0.5**2)),
        (GaussianNoise(0.5), 4, lambda z, sent: (z - sent) ** 2 / (2 * 0.25**2)),
        (GaussianNoise(0), 4, lambda z, sent: (z - sent) ** 2 / (2 * 3**2)),
        (Heavy(), 1, lambda z, sent: (z - sent).abs() / 0.1),
        (Faint(), 1, lambda z, sent: (0.2 * z - sent) ** 2 / (2 * 3**2)),
    ],
)
def test_features_are_as_surprising_as_the_defense_says_or_as_their_squared_error(defense, queries, expected):
    (target, _, judged), x = a_case(a_model(defense), queries), pixels(some_images(2))
    z, sent = target.model.encoder(x), target.sent[UNSEEN]
    given = surprise(target, 3.0)
    difference = given(x, sent) - given(pixels(judged), sent)
    wanted = expected(z, sent) - expected(target.model.encoder(pixels(judged)), sent)
    torch.testing.assert_close(difference, wanted.flatten(1).sum(1), rtol=1e-4, atol=1e-3)


def test_a_descent_stays_in_the_box_and_each_image_keeps_the_best_it_has_had():
    goal, heard = torch.tensor([0.3, 0.5, 7.0]).view(3, 1, 1, 1).expand(3, *SHAPE), []

    def energy(x):
        return (x - goal).square().flatten(1).sum(1)

    start = torch.full((3, *SHAPE), 0.3)
    result = descend(energy, start, 25, 0.2, heard.append)
    torch.testing.assert_close(result, goal.clamp(max=1), rtol=0, atol=0.01)
    assert torch.equal(descend(energy, start, 1, 100.0)[0], start[0])
    assert heard == [10, 10, 5]


def test_total_variation_is_the_sum_of_steps_between_neighbors():
    image = torch.tensor([[[[0.0, 0.5, 0.5], [0.25, 0.5, 1.0]]]])
    assert total_variation(image).item() == (0.5 + 0 + 0.25 + 0.5) + (0.25 + 0 + 0.5)


def test_a_decoder_that_cannot_be_bettered_is_left_as_it_is(tmp_path):
    case = a_case(a_model(GaussianNoise(2.0)))
    record = attack(case, tmp_path, off=1e-3)
    assert (record.facts["start"], record.facts["weight"], record.facts["steps"]) == ("decoder", None, 0)
    torch.testing.assert_close(found(record), pixels(case[2]), rtol=0, atol=0.01)


def test_a_decoder_that_can_is_bettered_with_a_weight_that_fits_its_error_and_the_noise(tmp_path):
    weights = []
    for std in (0.02, 0.5):
        case = a_case(a_model(GaussianNoise(std)))
        record = attack(case, tmp_path / str(std), off=0.1)
        assert record.facts["start"] == "decoder"
        assert mse(found(record), case[2]) < 0.9 * 0.01
        weights.append(record.facts["weight"])
    assert weights[0] < weights[1]


@pytest.mark.parametrize(("off", "left_out"), [(0.1, ["its best network"]), ([0.1, 0.2], [])])
def test_all_weights_are_tried_briefly_and_the_best_of_each_start_with_all_steps(tmp_path, off, left_out):
    record = attack(a_case(), tmp_path, off=off)
    grid = record.facts["grid"]
    starts = {start: weights for start, weights in white_box.WEIGHTS.items() if start not in left_out}
    brief = [(row["start"], row["weight"]) for row in grid if row["steps"] == 10]
    assert brief == [(start, weight) for start in starts for weight in starts[start] if math.isfinite(weight)]
    whole = [row for row in grid if row["steps"] in (0, 40)]
    assert Counter(row["start"] for row in whole) == {start: 2 if start == "mean image" else 3 for start in starts}
    best = min(whole, key=lambda row: row["mse"])
    assert (best["start"], best["weight"]) == (record.facts["start"], record.facts["weight"])
    assert mse(found(record, VAL), a_case()[1].val) == pytest.approx(best["mse"])
    assert json.loads(json.dumps(record.facts, allow_nan=False)) == record.facts


def test_images_that_it_is_judged_on_choose_nothing(tmp_path):
    first, second = (attack(a_case(unseen=seed), tmp_path / str(seed), off=0.1) for seed in (1, 2))
    assert first.facts == second.facts
    assert torch.equal(found(first, VAL), found(second, VAL))
    assert not torch.equal(found(first), found(second))


@pytest.mark.parametrize("lived", [1, 2])
def test_an_attack_that_was_killed_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch, lived):
    monkeypatch.setattr(white_box, "BATCH", 3)
    monkeypatch.setattr(white_box, "PIXELS", 1)
    case, keep, calls, work = a_case(), Progress.keep, [], []
    whole = attack(case, tmp_path / "whole", off=0.1, show=lambda done, what: work.append(what))

    def dying(self, name, content):
        if len(calls) == lived:
            raise KeyboardInterrupt
        calls.append(name)
        keep(self, name, content)

    monkeypatch.setattr(Progress, "keep", dying)
    with pytest.raises(KeyboardInterrupt):
        attack(case, tmp_path / "killed", off=0.1)
    monkeypatch.setattr(Progress, "keep", keep)
    state, left = torch.get_rng_state(), []
    again = attack(case, tmp_path / "killed", off=0.1, show=lambda done, what: left.append((done, what)))
    assert torch.equal(torch.get_rng_state(), state)
    assert again.checksum == whole.checksum
    assert again.facts == whole.facts
    assert [what for _, what in left] == [UNSEEN] * (work.count(UNSEEN) - 4 * (lived - 1))
    assert left == sorted(left)
    assert left[-1][0] == 1


def test_what_a_defense_drew_cannot_be_drawn_again(tmp_path, monkeypatch):
    case, seeds = a_case(a_model(Faint())), []
    monkeypatch.setattr(Faint, "transform", lambda self, z: seeds.append(torch.initial_seed()) or z)
    attack(case, tmp_path, steps=1)
    assert len(seeds) > 0
    assert case[0].seed not in seeds


def test_it_takes_at_most_what_was_forecast_in_steps(monkeypatch):
    monkeypatch.setattr(white_box, "seconds_of", lambda step: 3 * 8)  # a second for an image and step
    target, own, _ = a_case()
    tried = sum(map(math.isfinite, chain(*white_box.WEIGHTS.values())))
    assert WhiteBox().forecast(target, own, WhiteBox.Options(steps=40)) == 8 * (tried * 10 + 6 * 40) + 8 * 40
