"""Attacks on a run: what they read, what they leave behind, and what is refused."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cem.attacks import ATTACKS
from cem.attacks import run as run_module
from cem.attacks.base import TRAINED, UNSEEN, VAL, Attack, Record
from cem.attacks.config import AttackConfig
from cem.attacks.decoder import Decoder
from cem.attacks.fit import decode
from cem.attacks.gan import Gan
from cem.attacks.metrics import METRICS, judged
from cem.attacks.networks import build_network
from cem.attacks.query_free import QueryFree
from cem.attacks.run import AttackRun
from cem.attacks.splits import identities
from cem.attacks.white_box import WhiteBox
from cem.data import ImageSet, load_data
from cem.defenses import Chain
from cem.errors import CheckpointError, DataError, UsageError
from cem.models import CLIENT_COSTS
from cem.options import Options, option
from cem.training import TrainConfig, checkpoint, read_summary, train

SMALL = Decoder.Options(networks=("deconvC4", "deconvC8:l1"), cycle_epochs=1, max_cycles=2)
TINY = AttackConfig(attacks=("decoder",), members={"decoder": SMALL}, aux_size=200, score_size=50, device="cpu")
TARGET = TrainConfig(
    train_size=200, epochs=1, surrogate="none", arch="resnet20", cut_layer=2, noise_std=0.1, device="cpu"
)


class Painter(Attack):
    """Answers in one gray whatever was sent, after the decoder, if that is asked for."""

    name = "painter"
    summary = "for tests"
    needs = ("decoder",)

    @dataclass(frozen=True)
    class Options(Options):
        gray: float = option(1.0, least=0, most=1)

    def forecast(self, target, own, options):
        return 1.0

    def run(self, target, own, options, progress):
        progress.show(0.5, "half")
        shape = target.image_shape
        guesses = {name: torch.full((len(sent), *shape), options.gray) for name, sent in target.sent.items()}
        return Record({"gray": guesses}, {"converged": None, "note": "", "after": sorted(progress.earlier)})


@pytest.fixture
def painter(monkeypatch):
    monkeypatch.setitem(ATTACKS._members, "painter", Painter)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A folder of runs, ``none``, which is attacked with all pictures, and ``centroid``, trained alike."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cem.training.trainer.draw_tsne", lambda *_, **__: None)
        train(replace(TARGET, out=folder / "none"))
        train(replace(TARGET, surrogate="centroid", lambd=0.5, penalty_from=1, out=folder / "centroid"))
    AttackRun(folder / "none", TINY).run()
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


def test_everything_is_kept_and_says_what_it_was_measured_on(attacked):
    files = {"attack.json", "attack.log", "config.yaml", "curves.png", "reconstructions.png", "images.npz"}
    found = {path.name for path in (attacked / "none" / "attack").iterdir()}
    assert found == files | {"decoder-deconvC4.pt", "decoder-deconvC8-l1.pt"}
    result = result_of(attacked / "none")
    facts = {"name": "none", "surrogate": "none", "lambd": 0.0, "noise_std": 0.1, "defenses": [], "train_size": 200}
    assert result["run"].items() >= facts.items()
    summary = read_summary(attacked / "none")
    assert summary["client_multiply_adds"] > 10**5
    assert {name: result["run"][name] for name in CLIENT_COSTS} == {name: summary[name] for name in CLIENT_COSTS}
    sizes = {"attacker_train": 200, "attacker_val": 247, "test": 359, "trained": 12, "intercepted": 188}
    assert result["sizes"] == sizes | {"scored_test_target": 50, "scored_train_target": 12}
    assert result["knowledge"] == "auxiliary"
    assert len((attacked / "none" / "attack" / "attack.log").read_text().splitlines()) <= 12


def test_inside_an_attack_validation_images_choose_metric_by_metric(attacked):
    found = result_of(attacked / "none")["attacks"]["decoder"]
    candidates = found["candidates"]
    assert set(candidates) == {"deconvC4", "deconvC8:l1"}
    for metric, sign in METRICS.items():
        best = max(candidates, key=lambda name: sign * candidates[name][VAL][metric])
        assert found["chosen"][metric] == best
        assert found["metrics"][metric] == candidates[best]["metrics"][metric]
        assert found[TRAINED][metric] == candidates[best][TRAINED][metric]


def test_over_attacks_the_worst_case_counts_metric_by_metric_on_the_same_images(copy, painter):
    result = AttackRun(copy / "none", replace(TINY, attacks=("painter", "decoder"))).run()
    attacks = result["attacks"]
    assert [*attacks] == ["painter", "decoder"]
    assert attacks["painter"]["after"] == ["decoder"]
    for part, worst in (("metrics", result["worst"]), (TRAINED, result[f"worst_{TRAINED}"])):
        assert attacks["painter"][part]["images"] == attacks["decoder"][part]["images"]
        for metric, sign in METRICS.items():
            values = {name: each[part][metric] for name, each in attacks.items()}
            name = max(values, key=lambda name: sign * values[name])
            assert worst[metric] == {"attack": name, "value": values[name]}
    assert result["worst"]["mse"]["attack"] == "decoder"


def test_controls_guess_a_mean_or_the_image_with_the_nearest_features(attacked):
    run = AttackRun(attacked / "none", replace(TINY, seed=1), attacked / "elsewhere")
    controls = result_of(attacked / "none")["controls"]
    (count, images), known = run.target.judged[UNSEEN], run.target.splits.attacker_train
    pixels, truth = known.images.double() / 255, images.images[:count].double() / 255
    of_class = torch.stack([pixels[known.labels == label].mean(0) for label in images.labels[:count]])
    for name, guess in (("mean_image", pixels.mean(0)), ("class_mean", of_class)):
        expected = (truth - guess).square().mean().item()
        assert controls[name]["metrics"]["mse"] == pytest.approx(expected)
        assert controls[name]["metrics"]["identified"] <= 0.1
    # Without noise an image's own features are the nearest.
    own, run.target.model.defense = run._own, Chain({})
    sent = {UNSEEN: run._exposed.observe(own.train.images[:20].float() / 255), VAL: run._exposed.sent[VAL]}
    nearest = run_module.control_guesses(replace(run._exposed, sent=sent), own, {UNSEEN: own.train.labels[:20]})
    assert torch.equal(nearest["nearest_neighbor"][UNSEEN], own.train.images[:20].float() / 255)


def test_scores_are_those_of_the_networks_that_are_kept(attacked):
    run, result = AttackRun(attacked / "none", TINY), result_of(attacked / "none")
    content = checkpoint.load(attacked / "none" / "attack" / "decoder-deconvC4.pt")
    network = build_network("deconvC4", run.target.model.feature_shape, run.target.image_shape)
    network.to(memory_format=torch.channels_last).load_state_dict(content["snapshots"][0]["state"])
    scores = judged(decode(network, run._exposed.sent[UNSEEN]), run.target.judged[UNSEEN][1])
    assert scores == result["attacks"]["decoder"]["candidates"]["deconvC4"]["metrics"]


def numbers(result):
    """What of a result does not depend on how long things took."""
    if isinstance(result, dict):
        return {key: numbers(value) for key, value in result.items() if key not in ("seconds", "peak_memory_bytes")}
    return [numbers(each) for each in result] if isinstance(result, list) else result


def test_an_interrupted_attack_goes_on_to_the_same_numbers_and_a_finished_one_is_left_alone(copy, monkeypatch):
    directory, epochs = copy / "none" / "attack", []
    first = result_of(copy / "none")
    shutil.rmtree(directory)
    keep = run_module.Progress.keep

    def interrupted(self, name, content):
        keep(self, name, content)
        epochs.append((name, len(content["curve"])))
        if len(epochs) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Progress, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AttackRun(copy / "none", TINY).run()
    assert not (directory / "attack.json").exists()
    again = AttackRun(copy / "none", TINY).run()
    assert epochs == [("decoder-deconvC4", 1), ("decoder-deconvC4", 3), *(("decoder-deconvC8-l1", n) for n in (1, 3))]
    assert numbers(again) == numbers(first)

    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert AttackRun(copy / "none", TINY).run() == again
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_a_larger_bound_and_more_attacks_go_on_from_what_there_is(copy, painter, monkeypatch):
    first, epochs, keep = result_of(copy / "none"), [], run_module.Progress.keep

    def count(self, name, content):
        keep(self, name, content)
        epochs.append(len(content["curve"]))

    monkeypatch.setattr(run_module.Progress, "keep", count)
    longer = replace(TINY, members={"decoder": replace(SMALL, max_cycles=3)})
    result = AttackRun(copy / "none", longer).run()
    assert {*epochs} <= {7}
    assert result["attacks"]["decoder"]["curves"][0]["curve"][:3] == first["attacks"]["decoder"]["curves"][0]["curve"]
    more = AttackRun(copy / "none", replace(longer, attacks=("decoder", "painter"))).run()
    assert [*more["attacks"]] == ["decoder", "painter"]
    assert numbers(more["attacks"]["decoder"]) == numbers(result["attacks"]["decoder"])
    with pytest.raises(UsageError, match=r"other options: --decoder.max-cycles \(was 3, got 2\)"):
        AttackRun(copy / "none", replace(TINY, attacks=("decoder", "painter")))
    with pytest.raises(UsageError, match=r"other options: --attacks"):
        AttackRun(copy / "none", longer)


def test_knowledge_of_the_training_images_has_a_directory_of_its_own_and_is_scored_on_unseen_ones(copy):
    result = AttackRun(copy / "none", replace(TINY, knowledge=("training",))).run()
    assert (copy / "none" / "attack-training" / "attack.json").exists()
    assert result["knowledge"] == "training"
    assert f"worst_{TRAINED}" not in result
    assert TRAINED not in result["attacks"]["decoder"]


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


def test_no_attack_reads_an_image_that_it_is_judged_on_nor_one_whose_features_it_intercepts(
    attacked, tmp_path, monkeypatch
):
    members = {"decoder": SMALL, "white-box": WhiteBox.Options(steps=2), "gan": Gan.Options(epochs=1, critic_steps=2)}
    members["query-free"] = QueryFree.Options(steps=4, decoder_cycles=1, network="deconvC4")
    assert {*members} == {*ATTACKS}
    run = AttackRun(attacked / "none", replace(TINY, attacks=(*ATTACKS,), members=members), tmp_path / "attack")
    read, original, now = {name: set() for name in ATTACKS}, ImageSet.__getitems__, []

    def spy(self, positions):
        for name in now:
            read[name] |= identities(self.subset(positions))
        return original(self, positions)

    def watched(name, attack):
        def run(_, *arguments):
            now.append(name)
            record = attack(*arguments)
            now.remove(name)
            return record

        return run

    monkeypatch.setattr(ImageSet, "__getitems__", spy)
    for name in ATTACKS:
        monkeypatch.setattr(ATTACKS[name], "run", watched(name, ATTACKS[name]().run))
    result = run.run()
    assert [*result["attacks"]] == [*ATTACKS]
    # What an attack is given are these two objects, and images are in one of them.
    assert not any(isinstance(value, ImageSet) for value in vars(run._exposed).values())
    allowed = identities(run._own.train) | identities(run._own.val)
    for images in (run.target.splits.test, run.target.splits.trained, run.target.splits.intercepted):
        assert not allowed & identities(images)
    assert all(images <= allowed for images in read.values())
    assert identities(run._own.train) <= read["decoder"]


def test_images_of_the_final_test_change_nothing_but_what_is_measured_on_them(attacked, tmp_path):
    run = AttackRun(attacked / "none", TINY, tmp_path / "attack")
    assert identities(run.target._trained) == identities(load_data("digits", train_size=200).train)
    count, images = run.target.judged[UNSEEN]
    run.target.judged[UNSEEN] = count, replace(images, images=255 - images.images)
    first, other = result_of(attacked / "none")["attacks"]["decoder"], run.run()["attacks"]["decoder"]
    assert other["metrics"] != first["metrics"]
    for content in (first, other):
        for part in (content, *content["candidates"].values()):
            part.pop("metrics")
    assert numbers(other) == numbers(first)


def test_an_undefended_run_beside_it_is_found_wherever_the_results_go_and_pictures_show_the_same_images(
    attacked, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(run_module, "draw_or_log", lambda log, path, draw: drawn.append((path.name, draw)))
    result, control = AttackRun(attacked / "centroid", TINY, tmp_path / "attack").run(), result_of(attacked / "none")
    ((_, rows), *_) = (draw.args for name, draw in drawn if name == "reconstructions.png")
    assert [*rows] == ["none: decoder, the worst attack", "decoder", "class mean"]
    assert result["undefended"] == {"name": "none", "worst": control["worst"]}
    assert control["undefended"] is None
    one, other = (np.load(path / "images.npz") for path in (attacked / "none" / "attack", tmp_path / "attack"))
    for name in ("originals", "indices", "labels", "attacks"):
        assert np.array_equal(one[name], other[name])
    assert one["labels"].tolist() == list(range(10))
    assert one["attacks"].tolist() == ["decoder", "class_mean"]
    assert one["guesses"].shape == (2, *one["originals"].shape)
    assert (one["worst"], one["mse"].shape, one["ssim"].shape) == ("decoder", (2, 10), (2, 10))
    assert not np.array_equal(one["guesses"][0], other["guesses"][0])
    assert np.array_equal(one["guesses"][1], other["guesses"][1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content["config"].update(queries=4), r"attacked under other options: --queries"),
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
        AttackRun(copy / "centroid", replace(TINY, control=copy / "none"))
    assert AttackRun(copy / "centroid", TINY)._control is None


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
    assert (AttackRun(copy / "centroid", TINY)._control is not None) == found


def test_runs_with_a_penalty_or_of_another_version_are_no_controls(copy):
    shutil.copytree(copy / "none" / "attack", copy / "centroid" / "attack")
    with pytest.raises(UsageError, match="no control: it was trained with a penalty, centroid"):
        AttackRun(copy / "none", replace(TINY, control=copy / "centroid"))
    shutil.rmtree(copy / "centroid" / "attack")
    path = copy / "none" / "config.yaml"
    path.write_text(path.read_text().replace("format: 2", "format: 1"))
    with pytest.raises(CheckpointError, match="made by another version"):
        AttackRun(copy / "none", TINY)
    with pytest.raises(UsageError, match=r"no finished attack: .* made by another version"):
        AttackRun(copy / "centroid", replace(TINY, control=copy / "none"))
    assert AttackRun(copy / "centroid", TINY)._control is None


def test_a_network_in_one_piece_is_attacked_without_noise(tmp_path):
    train(replace(TARGET, centralized=True, out=tmp_path / "run"))
    result = AttackRun(tmp_path / "run", TINY).run()
    missing = ("cut_layer", "adapter", "bottleneck", *CLIENT_COSTS)
    assert [result["run"][name] for name in ("noise_std", *missing)] == [0.0, *[None] * 6]
    assert result["information"]["nats"] is result["undefended"] is None


def test_what_changed_since_the_target_was_trained_or_attacked_is_refused_by_name(copy, tmp_path):
    run, best = copy / "none", copy / "none" / "best.pt"
    with pytest.raises(UsageError, match=r"other options: --seed \(was 0, got 4\); choose another --out"):
        AttackRun(run, replace(TINY, seed=4))
    assert AttackRun(run, replace(TINY, queries=16)).out == run / "attack-queries16"
    content = checkpoint.load(best)
    shutil.copy(copy / "centroid" / "best.pt", best)
    with pytest.raises(UsageError, match=r"is of another best\.pt, or of other images"):
        AttackRun(run, TINY)
    content["data_fingerprint"]["checksum of the training images"] += 1
    del content["format"]
    checkpoint.save(best, content)
    with pytest.raises(UsageError, match="was trained on other data: checksum of the training images"):
        AttackRun(run, TINY)
    options = TrainConfig.from_yaml(run / "config.yaml")
    replace(options, data="mnist", data_root=Path("gone")).to_yaml(run / "config.yaml")
    with pytest.raises(DataError, match=r"neither in gone nor .*; --data-root says where the run's data are now"):
        AttackRun(run, TINY)
    with pytest.raises(UsageError, match=r"holds no finished run: there is no summary\.json"):
        AttackRun(tmp_path, TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ()}, "--attacks needs at least one"),
        ({"attacks": ("decoder", "decoder")}, "names decoder twice"),
        ({"attacks": ("oracle",)}, "--attacks takes decoder, .*, got 'oracle'"),
        ({"knowledge": ("training", "training")}, "--knowledge takes every name once"),
        ({"knowledge": ("none",)}, "--knowledge takes one of auxiliary, training, got .none."),
        ({"queries": 0}, "--queries must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(UsageError, match=message):
        replace(TINY, members={}, **options).checked()
