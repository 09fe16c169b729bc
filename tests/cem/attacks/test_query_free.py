"""Inversion by whoever has the server and listens: what it may not know, what its shadow is, how it goes on."""

import copy
from dataclasses import replace

import pytest
import torch
from small_target import CLASSES, SHAPE, class_mean_error, error, fresh_model, progress_in, scene, stopping_after
from torch import nn

from cem.attacks.base import UNSEEN, VAL, Exposed
from cem.attacks.query_free import QueryFree, _begun_anew, _Judge, _plain, _Training
from cem.defenses import Defense
from cem.errors import DivergedError, UsageError
from cem.models import SplitModel

OPTIONS = QueryFree.Options(steps=8, batch_size=16, network="deconvC8", decoder_cycles=1)


def attack(folder, options=OPTIONS, target=None, show=lambda done, what: None):
    found, own, _ = scene()
    return QueryFree().run(target or found, own, options, progress_in(folder, show))


@pytest.mark.parametrize("shadow", ["same", "other"])
def test_it_knows_neither_the_encoders_weights_nor_an_answer_of_it(tmp_path, monkeypatch, shadow):
    target, options = scene()[0], replace(OPTIONS, shadow=shadow)
    first = attack(tmp_path / "first", options)
    other = fresh_model(seed=7)
    other.server, other.defense = target.model.server, target.model.defense
    hidden = replace(target, model=other.eval(), sent={**target.sent, VAL: torch.zeros_like(target.sent[VAL])})
    monkeypatch.setattr(Exposed, "observe", None)
    second = attack(tmp_path / "second", options, hidden)
    assert first.checksum == second.checksum
    assert first.facts == second.facts
    assert first.guesses["query-free"].keys() == {UNSEEN}


@pytest.mark.slow
def test_aligned_to_what_went_by_it_beats_the_class_mean_and_a_shadow_that_only_serves(tmp_path):
    _, own, unseen = scene(each=40)
    errors = {}
    for alignment in (0.0, 1.0):
        options = QueryFree.Options(
            alignment=alignment, steps=600, batch_size=16, network="preactN1C16", decoder_cycles=3
        )
        record = QueryFree().run(scene(each=40)[0], own, options, progress_in(tmp_path / f"{alignment}"))
        errors[alignment] = error(record.guesses["query-free"][UNSEEN], unseen)
        assert record.facts["served"] > 0.9
    assert errors[1.0] < 0.7 * class_mean_error(own, unseen)
    assert errors[1.0] < 0.7 * errors[0.0]


def test_the_shadow_learns_to_serve_the_server_and_the_target_stays_as_it_is():
    target, own, _ = scene()
    before = copy.deepcopy(target.model.state_dict())
    _Training(target, own, OPTIONS).epoch(1)
    training = _Training(target, own, replace(OPTIONS, steps=32, alignment=0.0, lr=1e-2))
    rows = [training.epoch(number) for number in range(1, 9)]
    assert rows[-1]["cross_entropy"] < 0.5 * rows[0]["cross_entropy"]
    assert all(torch.equal(before[name], value) for name, value in target.model.state_dict().items())
    assert all(p.grad is None for p in target.model.parameters())
    assert not any(module.training for module in target.model.modules())


@pytest.mark.parametrize("stage", ["shadow", "decoder"])
def test_interrupted_it_goes_on_to_the_same_bits(tmp_path, stage):
    options = replace(OPTIONS, decoder_cycles=2)
    shown = []
    whole = attack(tmp_path / "whole", options, show=lambda done, what: shown.append(done))
    assert shown == sorted(shown)
    assert shown[-1] == 1
    with pytest.raises(KeyboardInterrupt):
        attack(tmp_path / "cut", options, show=stopping_after(1 if stage == "shadow" else 2 + 7))
    resumed = []
    again = attack(tmp_path / "cut", options, show=lambda done, what: resumed.append(what))
    assert (again.checksum, again.facts) == (whole.checksum, whole.facts)
    assert len(resumed) == (1 + 15 if stage == "shadow" else 10)  # decoders are kept by whole cycles


def test_a_shadow_of_the_same_architecture_keeps_constants_and_no_weight():
    encoder = scene()[0].model.encoder
    anew = _begun_anew(encoder)
    assert anew.state_dict().keys() == encoder.state_dict().keys()
    learned = [name for name, value in encoder.named_parameters() if value.std() > 1e-3]
    assert learned
    assert not any(torch.equal(anew.get_parameter(name), encoder.get_parameter(name)) for name in learned)
    assert (anew[1].running_mean == 0).all()
    assert (anew[1].running_var == 1).all()
    assert all(parameter.requires_grad for parameter in anew.parameters())


@pytest.mark.parametrize(
    ("image", "features"),
    [((3, 32, 32), (8, 8, 8)), ((1, 9, 7), (5, 2, 2)), ((1, 28, 28), (6,)), ((2, 3, 5), (2, 6, 10))],
)
@pytest.mark.parametrize("bounded", [False, True])
def test_another_shadow_and_the_discriminator_fit_any_features(image, features, bounded):
    shadow = _plain(image, features, bounded)
    z = shadow(100 * torch.rand(4, *image))
    assert z.shape == (4, *features)
    assert SplitModel(shadow, nn.Flatten(), image_shape=image).bounded == bounded
    assert _Judge(features, CLASSES)(z, torch.arange(4)).shape == (4,)


def test_features_within_the_noise_of_0_to_1_are_taken_for_bounded():
    target, own, _ = scene()
    for low, high, bounded in ((-0.5, 1.5, True), (-0.7, 1, False), (0, 1.7, False)):
        heard = torch.tensor([low, high]).view(2, 1, 1, 1).expand(2, *target.model.feature_shape)
        training = _Training(replace(target, intercepted=heard), own, replace(OPTIONS, shadow="other"))
        assert training.model.bounded == bounded


def test_what_is_seen_several_times_is_averaged():
    class Alternating(Defense):
        calls = 0

        def transform(self, z):
            self.calls += 1
            return z + (3 if self.calls % 3 == 0 else 0)

    model, (target, own, _) = fresh_model().eval(), scene()
    model.defense, seen = Alternating(), []
    model.server.register_forward_hook(lambda module, inputs, result: seen.append(inputs[0].detach()))
    for queries in (1, 3):
        training = _Training(replace(target, model=model, queries=queries), own, OPTIONS)
        model.defense.calls = 0
        training.step(own.train.images[:8].float() / 255, own.train.labels[:8])
    torch.testing.assert_close(seen[5], seen[2] + 1)  # classes of what went by, a dry run, the step; twice


def test_what_cannot_be_is_refused(tmp_path):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, z):
            return z * self.weight

    target, own, _ = scene()
    model = SplitModel(nn.Sequential(target.model.encoder, Scale()), target.model.server, image_shape=SHAPE)
    strange = replace(target, model=model)
    with pytest.raises(UsageError, match=r"a Scale has no reset_parameters.*take other"):
        QueryFree().check(strange, own, OPTIONS)
    QueryFree().check(strange, own, replace(OPTIONS, shadow="other"))
    with pytest.raises(UsageError, match="listens to features"):
        QueryFree().check(replace(target, intercepted=target.intercepted[:1]), own, OPTIONS)
    with pytest.raises(UsageError, match=r"--query-free\.network"):
        QueryFree.Options(network="deep").checked()
    with pytest.raises(DivergedError, match=r"lower --query-free\.lr"):
        attack(tmp_path, replace(OPTIONS, lr=1e30))
