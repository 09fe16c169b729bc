"""The decoder as the generator of a GAN: what it starts from, what moves it, which epoch is kept, how it goes on."""

import copy
from dataclasses import replace

import pytest
import torch
from small_target import SHAPE, progress_in, scene, stopping_after
from torch import nn

from cem.attacks import gan
from cem.attacks.base import UNSEEN, VAL, Record
from cem.attacks.config import AttackConfig
from cem.attacks.fit import decode
from cem.attacks.gan import Gan, _Game
from cem.attacks.networks import Average, build_network
from cem.errors import DivergedError, UsageError

OPTIONS = Gan.Options(epochs=3, critic_steps=2, batch_size=16)


def a_decoder():
    torch.manual_seed(0)
    return build_network("deconvC8", (4, 8, 8), SHAPE).eval()


def attack(folder, options=OPTIONS, target=None, decoder=None, show=lambda done, what: None):
    earlier = {"decoder": Record({}, network=decoder or a_decoder())}
    found, own, _ = scene()
    return Gan().run(target or found, own, options, progress_in(folder, show, earlier))


def curve_of(record):
    return record.facts["curves"][0]["curve"]


@pytest.mark.parametrize("others", [0, 1])
def test_it_starts_from_the_best_network_of_the_decoder_and_leaves_that_as_it_is(tmp_path, others):
    decoder, target = a_decoder(), scene()[0]
    before = copy.deepcopy(decoder.state_dict())
    record = attack(tmp_path, decoder=Average([decoder, *[torch.nn.Identity()] * others]))
    assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())
    truth = scene()[1].val.images.float() / 255
    assert curve_of(record)[0]["val_mse"] == pytest.approx((decode(decoder, target.sent[VAL]) - truth).square().mean())
    assert not torch.equal(record.guesses["gan"][UNSEEN], decode(decoder, target.sent[UNSEEN]))
    assert record.guesses["gan"][UNSEEN].shape == (len(target.sent[UNSEEN]), *SHAPE)


def test_the_epoch_with_the_largest_ssim_on_validation_images_is_kept_though_the_decoder_had_more(
    tmp_path, monkeypatch
):
    heights = iter((0.9, 0.2, 0.5, 0.4, 0.9, 0.2, 0.5))
    monkeypatch.setattr(gan, "ssim", lambda guesses, images: torch.tensor(next(heights)))
    record = attack(tmp_path / "three")
    assert record.facts["curves"][0]["best_epoch"] == 2
    two = attack(tmp_path / "two", replace(OPTIONS, epochs=2))
    assert record.checksum == two.checksum


def test_nothing_but_validation_images_decides(tmp_path):
    target = scene()[0]
    other = replace(target, sent={**target.sent, UNSEEN: -target.sent[UNSEEN]}, intercepted=-target.intercepted)
    first, second = attack(tmp_path / "first"), attack(tmp_path / "second", target=other)
    assert first.facts == second.facts
    assert first.checksum != second.checksum


@pytest.mark.parametrize("stopped", [1, 2])
def test_an_interrupted_attack_or_one_with_a_larger_bound_goes_on_to_the_same_bits(tmp_path, stopped):
    shown = []
    whole = attack(tmp_path / "whole", show=lambda done, what: shown.append(done))
    assert shown == [pytest.approx(epoch / 3) for epoch in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        attack(tmp_path / "cut", show=stopping_after(stopped))
    shown.clear()
    resumed = attack(tmp_path / "cut", show=lambda done, what: shown.append(done))
    assert len(shown) == 3 - stopped
    attack(tmp_path / "less", replace(OPTIONS, epochs=stopped))
    grown = attack(tmp_path / "less")
    assert (resumed.checksum, resumed.facts) == (grown.checksum, grown.facts) == (whole.checksum, whole.facts)


def test_the_critic_tells_images_from_guesses_with_slopes_of_about_one_and_the_generator_follows_it():
    torch.manual_seed(0)
    gray = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Sigmoid(), nn.Unflatten(1, SHAPE))
    game = _Game(gray, SHAPE, Gan.Options(mse_weight=0.0, lr=2e-3))
    images = (torch.rand(32, *SHAPE) > 0.5).float()
    distances = [game.criticize(images, torch.zeros(32, 64)).item() for _ in range(60)]
    assert distances[-1] > max(distances[0], 0.5)
    between = (0.5 * images + 0.25).requires_grad_()
    (slope,) = torch.autograd.grad(game.critic(between).sum(), between)
    assert 0.5 < slope.flatten(1).norm(dim=1).mean() < 1.5
    score = lambda: game.critic(gray(torch.zeros(1, 64))).item()  # noqa: E731
    before = score()
    game.generate(images, torch.zeros(32, 64))
    assert score() > before


def test_the_squared_error_holds_the_generator_back(tmp_path):
    free, held = (
        curve_of(attack(tmp_path / f"{weight}", replace(OPTIONS, mse_weight=weight, lr=5e-3)))[-1]["val_mse"]
        for weight in (0.0, 1500.0)
    )
    assert held < 0.9 * free


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--attacks gan starts from decoder; give --attacks decoder gan"):
        AttackConfig(attacks=("gan",)).checked()
    assert AttackConfig(attacks=("decoder", "gan")).checked().options_of("gan") == Gan.Options()
    target, own, _ = scene()
    with pytest.raises(UsageError, match="no SSIM"):
        Gan().check(replace(target, image_shape=(1, 2, 8)), own, OPTIONS)
    with pytest.raises(DivergedError, match=r"lower --gan\.lr"):
        attack(tmp_path, replace(OPTIONS, lr=1e30))
