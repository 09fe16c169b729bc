"""An attack on a run: what it reads, what it leaves behind, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cem.attacks import fit
from cem.attacks import run as run_module
from cem.attacks.config import AttackConfig
from cem.attacks.run import Attack
from cem.attacks.splits import identities, pick
from cem.data import ImageSet, load_data
from cem.errors import CheckpointError, DataError, UsageError
from cem.training import TrainConfig, checkpoint, train

TINY = AttackConfig(attackers=("deconvC4", "deconvC8:l1"), aux_size=200, score_size=50, cycle_epochs=1, max_epochs=3)
TINY = replace(TINY, white_box_images=4, white_box_steps=5, device="cpu")
TARGET = TrainConfig(train_size=200, epochs=1, surrogate="none", arch="resnet20", cut_layer=2, device="cpu")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A folder of runs, ``none``, which is attacked with all pictures, and ``centroid``, trained alike."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cem.training.trainer.draw_tsne", lambda *_, **__: None)
        train(replace(TARGET, out=folder / "none"))
        train(replace(TARGET, surrogate="centroid", lambd=0.5, penalty_from=1, out=folder / "centroid"))
    Attack(folder / "none", TINY).run()
    return folder


@pytest.fixture(autouse=True)
def _no_pictures(attacked, monkeypatch):
    """Later trainings and attacks draw none."""
    monkeypatch.setattr("cem.training.trainer.draw_tsne", lambda *_, **__: None)
    monkeypatch.setattr(run_module, "draw_or_log", lambda *_: None)


@pytest.fixture
def copy(attacked, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(attacked, tmp_path / "copy")


def result_of(run_dir):
    return json.loads((run_dir / "attack" / "attack.json").read_text())


def test_the_strongest_on_validation_images_is_reported_and_everything_is_kept(attacked):
    files = {"attack.json", "attack.log", "config.yaml", "curves.png", "reconstructions.png", "images.npz"}
    found = {path.name for path in (attacked / "none" / "attack").iterdir()}
    assert found == files | {"deconvC4.pt", "deconvC8-l1.pt"}
    result = result_of(attacked / "none")
    attackers = {record["name"]: record for record in result["attackers"]}
    best = min(attackers.values(), key=lambda record: record["val"]["mse"])
    assert set(attackers) == {"deconvC4", "deconvC8:l1"}
    assert [result[key] for key in ("strongest", "test_target", "train_target")] == [
        best[key] for key in ("name", "test_target", "train_target")
    ]
    facts = {"name": "none", "surrogate": "none", "lambd": 0.0, "noise_std": 0.1, "defenses": [], "train_size": 200}
    assert result["run"].items() >= facts.items()
    sizes = {"target_train": 200, "attacker_train": 200, "attacker_val": 247, "test": 359}
    assert result["sizes"] == sizes | {"scored_train_target": 50, "scored_test_target": 50}


def test_controls_guess_the_mean_of_the_attackers_images_or_of_the_class(attacked):
    target, controls = Attack(attacked / "none", TINY).target, result_of(attacked / "none")["controls"]
    known, judged = target.splits.attacker_train, target.judged["test_target"]
    pixels, truth = known.images.double() / 255, judged.images.double() / 255
    of_class = torch.stack([pixels[known.labels == label].mean(0) for label in judged.labels])
    for name, guess in (("mean_image", pixels.mean(0)), ("class_mean", of_class)):
        expected = (truth - guess).square().mean().item()
        assert controls[name]["test_target"]["mse"] == pytest.approx(expected)


def test_scores_are_those_of_the_kept_decoder_and_the_white_box_beside_it_has_the_same_images(attacked):
    target, result = Attack(attacked / "none", TINY).target, result_of(attacked / "none")
    content = checkpoint.load(attacked / "none" / "attack" / "deconvC4.pt")
    network = run_module.build_decoder("deconvC4", target.model.feature_shape, target.image_shape)
    network.load_state_dict(content["decoder"])
    judged = target.judged["test_target"]
    scores = fit.score_decoder(target.model, network.eval(), judged, 1, TINY.seed)
    assert scores.mse.double().mean().item() == result["attackers"][0]["test_target"]["mse"]
    assert torch.equal(judged.subset(range(4)).indices, pick(target.splits.test, 4).indices)
    assert result["white_box"]["decoder"]["test_target"] != result["test_target"]


def test_an_interrupted_attack_goes_on_to_the_same_numbers_and_a_finished_one_is_left_alone(copy, monkeypatch):
    directory, original, fitted = copy / "none" / "attack", run_module.fit_decoder, []
    first = result_of(copy / "none")
    shutil.rmtree(directory)

    def interrupted(model, decoder, loss, *rest):
        fitted.append(loss)
        if fitted == ["mse", "l1"]:
            raise KeyboardInterrupt
        return original(model, decoder, loss, *rest)

    monkeypatch.setattr(run_module, "fit_decoder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Attack(copy / "none", TINY).run()
    assert not (directory / "attack.json").exists()
    again = Attack(copy / "none", TINY).run()
    assert fitted == ["mse", "l1", "l1"]  # only the decoder that was missing
    for part in ("strongest", "train_target", "test_target", "controls"):
        assert again[part] == first[part]
    assert [each["curve"] for each in again["attackers"]] == [each["curve"] for each in first["attackers"]]

    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert Attack(copy / "none", TINY).run() == again
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_a_damaged_decoder_is_trained_again(copy):
    directory, first = copy / "none" / "attack", result_of(copy / "none")
    (directory / "attack.json").unlink()
    (directory / "deconvC4.pt").write_bytes(b"half a file")
    assert Attack(copy / "none", TINY).run()["test_target"] == first["test_target"]
    assert "training it again" in (directory / "attack.log").read_text()


def test_no_image_of_the_final_test_is_read_while_the_target_is_trained(tmp_path, monkeypatch):
    read, original = set(), ImageSet.__getitems__

    def spy(self, positions):
        read.update((self.origin, index) for index in self.indices[torch.as_tensor(positions)].tolist())
        return original(self, positions)

    monkeypatch.setattr(ImageSet, "__getitems__", spy)
    monkeypatch.setattr("cem.training.trainer.Trainer._finish", lambda self: {})  # scores the test set, once
    train(replace(TARGET, out=tmp_path / "run"))
    assert identities(load_data("digits", train_size=200).train) <= read
    assert not read & identities(load_data("digits").test)


def test_images_of_the_final_test_change_nothing_but_their_own_scores(attacked, tmp_path):
    attack = Attack(attacked / "none", TINY, tmp_path / "attack")
    splits = attack.target.splits
    assert identities(splits.target_train) == identities(load_data("digits", train_size=200).train)
    attack.target.splits = replace(splits, test=replace(splits.test, images=255 - splits.test.images))
    attack.target.judged["test_target"] = pick(attack.target.splits.test, 50)
    first, other = result_of(attacked / "none"), attack.run()
    assert other["test_target"] != first["test_target"]
    for content in (first, other):
        for part in (content, content["white_box"], content["white_box"]["decoder"], *content["attackers"]):
            for name in ("test_target", "seconds"):
                part.pop(name, None)
    for name in ("strongest", "most_similar", "converged", "train_target", "attackers", "white_box"):
        assert other[name] == first[name]
    for file in ("deconvC4.pt", "deconvC8-l1.pt"):
        kept, again = (checkpoint.load(path / file) for path in (attacked / "none" / "attack", tmp_path / "attack"))
        assert all(torch.equal(kept["decoder"][name], again["decoder"][name]) for name in kept["decoder"])


def test_an_undefended_run_beside_it_is_found_wherever_the_results_go_and_has_the_same_images(attacked, tmp_path):
    result, control = Attack(attacked / "centroid", TINY, tmp_path / "attack").run(), result_of(attacked / "none")
    assert result["undefended"] == {name: control[name] for name in ("train_target", "test_target")} | {"name": "none"}
    assert control["undefended"] is None
    one, other = (np.load(path / "images.npz") for path in (attacked / "none" / "attack", tmp_path / "attack"))
    for name in ("originals", "indices", "labels"):
        assert np.array_equal(one[name], other[name])
    assert one["labels"].tolist() == list(range(10))
    assert not np.array_equal(one["reconstructions"], other["reconstructions"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content["config"].update(max_epochs=4), r"attacked under other options: --max-epochs"),
        (lambda content: content.update(data_checksum=1), "attacked on other images"),
        (lambda content: content["run"].update(noise_std=0.5), "other noise: σ is 0.5 there, 0.1 here"),
        (lambda content: content.pop("config"), "has no finished attack"),
    ],
    ids=["options", "images", "noise", "unfinished"],
)
def test_a_control_that_cannot_stand_beside_the_run_is_refused_and_not_found(copy, spoil, message):
    content = result_of(copy / "none")
    spoil(content)
    (copy / "none" / "attack" / "attack.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        Attack(copy / "centroid", replace(TINY, control=copy / "none"))
    assert Attack(copy / "centroid", TINY)._control is None


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"centroid": {"momentum": 0.9}, "penalty_from": 1, "lambd_schedule": "rising", "backend": "eager"}, True),
        ({"device": "cuda:7", "profile_steps": 3}, True),
        ({"lr": 0.01}, False),
        ({"noise_std": 0.2}, False),
    ],
    ids=str,
)
def test_a_control_may_differ_in_the_penalty_and_where_it_was_computed_and_in_nothing_else(copy, changes, found):
    path = copy / "centroid" / "config.yaml"
    TrainConfig.from_dict(TrainConfig.from_yaml(path).to_dict() | changes).to_yaml(path)
    assert (Attack(copy / "centroid", TINY)._control is not None) == found


def test_runs_with_a_penalty_or_of_another_version_are_no_controls(copy):
    shutil.copytree(copy / "none" / "attack", copy / "centroid" / "attack")
    with pytest.raises(UsageError, match="no control: it was trained with a penalty, centroid"):
        Attack(copy / "none", replace(TINY, control=copy / "centroid"))
    shutil.rmtree(copy / "centroid" / "attack")
    path = copy / "none" / "config.yaml"
    path.write_text(path.read_text().replace("format: 2", "format: 1"))
    with pytest.raises(CheckpointError, match="made by another version"):
        Attack(copy / "none", TINY)
    with pytest.raises(UsageError, match=r"no finished attack: .* made by another version"):
        Attack(copy / "centroid", replace(TINY, control=copy / "none"))
    assert Attack(copy / "centroid", TINY)._control is None


def test_a_network_in_one_piece_is_attacked_without_noise(tmp_path):
    train(replace(TARGET, centralized=True, out=tmp_path / "run"))
    result = Attack(tmp_path / "run", replace(TINY, attackers=("deconvC4",), white_box_images=0)).run()
    assert [result["run"][name] for name in ("noise_std", "bottleneck", "cut_layer")] == [0.0, None, None]
    assert result["information"]["nats"] is result["undefended"] is result["white_box"] is None


def test_what_changed_since_the_target_was_trained_or_attacked_is_refused_by_name(copy, tmp_path):
    run, best = copy / "none", copy / "none" / "best.pt"
    with pytest.raises(UsageError, match=r"other options: --max-epochs \(was 3, got 4\); choose another --out"):
        Attack(run, replace(TINY, max_epochs=4))
    more = replace(TINY, queries=16)
    assert Attack(run, more).out == run / "attack-queries16"
    content = checkpoint.load(best)
    shutil.copy(copy / "centroid" / "best.pt", best)
    with pytest.raises(UsageError, match=r"is of another best\.pt, or of other images"):
        Attack(run, TINY)
    content["data_fingerprint"]["checksum of the training images"] += 1
    del content["format"]
    checkpoint.save(best, content)
    with pytest.raises(UsageError, match="was trained on other data: checksum of the training images"):
        Attack(run, TINY)
    options = TrainConfig.from_yaml(run / "config.yaml")
    replace(options, data="mnist", data_root=Path("gone")).to_yaml(run / "config.yaml")
    with pytest.raises(DataError, match=r"neither in gone nor .*; --data-root says where the run's data are now"):
        Attack(run, TINY)
    with pytest.raises(UsageError, match=r"holds no finished run: there is no summary\.json"):
        Attack(tmp_path, TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attackers": ("res_normN8",)}, "--attackers res_normN8: decoders are named like res_normN8C64"),
        ({"attackers": ("deconvC8:huber",)}, "the loss must be one of mse, l1, ssim, got 'huber'"),
        ({"attackers": ()}, "--attackers needs at least one"),
        ({"attackers": ("deconvC8", "deconvC8:mse")}, "--attackers takes .* once, got deconvC8:mse twice"),
        ({"queries": 0}, "--queries must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(UsageError, match=message):
        replace(TINY, **options).checked()
