"""An attack on a run: what it reads, what it leaves behind, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cem.attacks import fit
from cem.attacks import run as run_module
from cem.attacks.config import AttackConfig
from cem.attacks.run import Attack
from cem.attacks.splits import identities, pick
from cem.data import ImageSet, load_data
from cem.errors import CheckpointError, DataError, UsageError
from cem.training import TrainConfig, checkpoint, train

TINY = AttackConfig(
    attackers=("deconvC4", "deconvC8:l1"),
    aux_size=200,
    score_size=50,
    cycle_epochs=1,
    max_epochs=3,
    white_box_images=4,
    white_box_steps=5,
    device="cpu",
)
TARGET = TrainConfig(train_size=200, epochs=1, surrogate="none", arch="resnet20", cut_layer=2, device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: ``none`` and ``centroid``, trained alike."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cem.training.trainer.draw_tsne", lambda *_, **__: None)
        train(replace(TARGET, out=folder / "none"))
        train(replace(TARGET, surrogate="centroid", lambd=0.5, penalty_from=1, out=folder / "centroid"))
    return folder


@pytest.fixture(scope="module")
def attacked(trained: Path) -> Path:
    """The same folder, the run ``none`` attacked."""
    Attack(trained / "none", TINY).run()
    return trained


@pytest.fixture
def runs_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the runs, not attacked, that a test may spoil."""
    for name in ("none", "centroid"):
        shutil.copytree(trained / name, tmp_path / name, ignore=shutil.ignore_patterns("attack*"))
    return tmp_path


def result_of(attack_dir: Path) -> dict[str, Any]:
    return json.loads((attack_dir / "attack.json").read_text())


def test_all_files_are_there(attacked: Path) -> None:
    assert {path.name for path in (attacked / "none" / "attack").iterdir()} == {
        "attack.json",
        "attack.log",
        "config.yaml",
        "curves.png",
        "reconstructions.png",
        "images.npz",
        "deconvC4.pt",
        "deconvC8-l1.pt",
    }


def test_the_strongest_on_validation_images_is_reported_and_all_are_kept(attacked: Path) -> None:
    result = result_of(attacked / "none" / "attack")
    attackers = {record["name"]: record for record in result["attackers"]}
    assert set(attackers) == {"deconvC4", "deconvC8:l1"}
    best = min(attackers.values(), key=lambda record: record["val"]["mse"])
    assert result["strongest"] == best["name"]
    assert result["test_target"] == best["test_target"]
    assert result["train_target"] == best["train_target"]
    assert set(result["test_target"]) == {"mse", "psnr", "ssim"}


def test_the_run_is_told_from_others(attacked: Path) -> None:
    facts = result_of(attacked / "none" / "attack")["run"]
    expected = {"name": "none", "surrogate": "none", "lambd": 0.0, "noise_std": 0.1, "defenses": [], "train_size": 200}
    assert facts.items() >= expected.items()


def test_sizes_of_the_sets_are_said(attacked: Path) -> None:
    assert result_of(attacked / "none" / "attack")["sizes"] == {
        "target_train": 200,
        "attacker_train": 200,
        "attacker_val": 247,
        "test": 359,
        "scored_train_target": 50,
        "scored_test_target": 50,
    }


def test_guessing_means_needs_no_features(attacked: Path) -> None:
    attack = Attack(attacked / "none", TINY)
    known, judged = attack.target.splits.attacker_train, attack.target.judged["test_target"]
    controls = result_of(attacked / "none" / "attack")["controls"]
    pixels, truth = known.images.double() / 255, judged.images.double() / 255
    assert controls["mean_image"]["test_target"]["mse"] == pytest.approx(
        (truth - pixels.mean(0)).square().mean().item()
    )
    guess = torch.stack([pixels[known.labels == label].mean(0) for label in judged.labels])
    assert controls["class_mean"]["test_target"]["mse"] == pytest.approx((truth - guess).square().mean().item())


def test_scores_are_those_of_the_kept_decoder(attacked: Path) -> None:
    attack = Attack(attacked / "none", TINY)
    record = result_of(attacked / "none" / "attack")["attackers"][0]
    content = checkpoint.load(attacked / "none" / "attack" / "deconvC4.pt")
    network = run_module.build_decoder("deconvC4", attack.target.model.feature_shape, attack.target.image_shape)
    network.load_state_dict(content["decoder"])
    scores = fit.score_decoder(attack.target.model, network.eval(), attack.target.judged["test_target"], 1, TINY.seed)
    assert scores.mse.double().mean().item() == record["test_target"]["mse"]


def test_a_finished_attack_is_left_as_it_is(attacked: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (attacked / "none" / "attack").iterdir()}
    attack = Attack(attacked / "none", TINY)
    assert attack.finished is not None
    assert attack.run() == attack.finished
    assert {path: path.stat().st_mtime_ns for path in (attacked / "none" / "attack").iterdir()} == before


def test_other_options_are_refused_by_name(attacked: Path) -> None:
    with pytest.raises(UsageError, match=r"other options: --max-epochs \(was 3, got 4\); choose another --out"):
        Attack(attacked / "none", replace(TINY, max_epochs=4))


def test_a_run_that_was_trained_again_is_not_mixed_up_with_the_old_one(attacked: Path, runs_copy: Path) -> None:
    shutil.copytree(attacked / "none" / "attack", runs_copy / "none" / "attack")
    shutil.copy(runs_copy / "centroid" / "best.pt", runs_copy / "none" / "best.pt")
    with pytest.raises(UsageError, match=r"is of another best\.pt, or of other images"):
        Attack(runs_copy / "none", TINY)


def test_an_interrupted_attack_keeps_finished_decoders(runs_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, fitted = run_module.fit_decoder, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if fitted:
            raise KeyboardInterrupt
        fitted.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(run_module, "fit_decoder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Attack(runs_copy / "none", TINY).run()
    assert not (runs_copy / "none" / "attack" / "attack.json").exists()

    trained_now: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        trained_now.append(args[2])
        return original(*args, **kwargs)

    monkeypatch.setattr(run_module, "fit_decoder", counted)
    result = Attack(runs_copy / "none", TINY).run()
    assert trained_now == ["l1"]  # only the decoder that was missing
    assert [record["name"] for record in result["attackers"]] == ["deconvC4", "deconvC8:l1"]


def test_attacking_again_gives_the_same_numbers(attacked: Path, tmp_path: Path) -> None:
    again = Attack(attacked / "none", TINY, tmp_path / "again").run()
    first = result_of(attacked / "none" / "attack")
    for part in ("train_target", "test_target", "strongest", "controls"):
        assert again[part] == first[part]
    assert [record["curve"] for record in again["attackers"]] == [record["curve"] for record in first["attackers"]]


def test_an_undefended_run_beside_it_is_found(attacked: Path) -> None:
    result = Attack(attacked / "centroid", TINY).run()
    control = result_of(attacked / "none" / "attack")
    assert result["undefended"] == {
        "name": "none",
        "train_target": control["train_target"],
        "test_target": control["test_target"],
    }
    assert control["undefended"] is None


def test_no_image_of_the_final_test_is_read_while_the_target_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[tuple[str, int]] = set()
    original = ImageSet.__getitems__

    def spy(self: ImageSet, positions: Any) -> tuple[Tensor, Tensor]:
        read.update((self.origin, index) for index in self.indices[torch.as_tensor(positions)].tolist())
        return original(self, positions)

    monkeypatch.setattr(ImageSet, "__getitems__", spy)
    monkeypatch.setattr("cem.training.trainer.Trainer._finish", lambda self: {})  # scores the test set, once
    train(replace(TARGET, out=tmp_path / "run"))
    assert identities(load_data("digits", train_size=200).train) <= read
    assert not read & identities(load_data("digits").test)


def test_images_of_the_final_test_change_nothing_but_their_own_scores(attacked: Path, tmp_path: Path) -> None:
    attack = Attack(attacked / "none", TINY, tmp_path / "attack")
    target, test = attack.target, attack.target.splits.test
    target.splits = replace(target.splits, test=replace(test, images=255 - test.images))
    target.judged["test_target"] = pick(target.splits.test, 50)
    first, other = result_of(attacked / "none" / "attack"), attack.run()
    for name in ("strongest", "most_similar", "converged", "train_target"):
        assert other[name] == first[name]
    for one, another in zip(first["attackers"], other["attackers"], strict=True):
        assert another["curve"] == one["curve"]
        assert another["val"] == one["val"]
        file = f"{re.sub('[^A-Za-z0-9]', '-', one['name'])}.pt"
        kept, again = (checkpoint.load(path / file) for path in (attacked / "none" / "attack", tmp_path / "attack"))
        assert all(torch.equal(kept["decoder"][name], again["decoder"][name]) for name in kept["decoder"])
    assert other["white_box"]["tv_weight"] == first["white_box"]["tv_weight"]
    assert other["white_box"]["train_target"] == first["white_box"]["train_target"]
    assert other["test_target"] != first["test_target"]


def test_the_four_sets_of_an_attack_are_disjoint_and_hold_what_the_target_had(trained: Path) -> None:
    splits = Attack(trained / "none", TINY).target.splits
    for one, other in combinations(vars(splits).values(), 2):
        assert not identities(one) & identities(other)
    assert identities(splits.target_train) == identities(load_data("digits", train_size=200).train)


def test_same_images_for_every_run(attacked: Path, tmp_path: Path) -> None:
    Attack(attacked / "centroid", TINY, tmp_path / "attack").run()
    one, other = np.load(attacked / "none" / "attack" / "images.npz"), np.load(tmp_path / "attack" / "images.npz")
    assert np.array_equal(one["originals"], other["originals"])
    assert np.array_equal(one["indices"], other["indices"])
    assert sorted(one["labels"]) == list(range(10))
    assert not np.array_equal(one["reconstructions"], other["reconstructions"])
    assert one["ssim"].shape == (10,)


def test_more_queries_have_a_directory_of_their_own(trained: Path) -> None:
    assert Attack(trained / "none", replace(TINY, queries=16)).out == trained / "none" / "attack-queries16"


def test_other_data_than_the_targets_is_refused(runs_copy: Path) -> None:
    path = runs_copy / "none" / "best.pt"
    content = checkpoint.load(path)
    content["data_fingerprint"]["checksum of the training images"] += 1
    del content["format"]
    checkpoint.save(path, content)
    with pytest.raises(UsageError, match="was trained on other data: checksum of the training images"):
        Attack(runs_copy / "none", TINY)


def test_a_directory_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no finished run: there is no summary\.json"):
        Attack(tmp_path, TINY)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("attackers", ("res_normN8",), "--attackers res_normN8: decoders are named like res_normN8C64"),
        ("attackers", ("deconvC8:huber",), "the loss must be one of mse, l1, ssim, got 'huber'"),
        ("attackers", (), "--attackers needs at least one"),
        ("queries", 0, "--queries must be at least 1, got 0"),
        ("tolerance", 0.0, "--tolerance must be finite and above 0"),
        ("device", "tpu", "--device must be auto, cpu, cuda"),
        ("max_epochs", 1.5, "--max-epochs takes a whole number"),
    ],
)
def test_bad_options_are_refused_by_name(option: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(TINY, **{option: value}).checked()


def test_white_box_and_strongest_decoder_are_compared_on_the_same_images(attacked: Path) -> None:
    result = result_of(attacked / "none" / "attack")
    attack = Attack(attacked / "none", TINY)
    images = attack.target.judged["test_target"].subset(range(4))
    white_box = pick(attack.target.splits.test, result["white_box"]["images"])
    assert torch.equal(images.indices, white_box.indices)
    assert result["white_box"]["decoder"]["test_target"] != result["test_target"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content["config"].update(max_epochs=4), r"attacked under other options: --max-epochs"),
        (lambda content: content.update(data_checksum=1), "attacked on other images"),
        (lambda content: content["run"].update(noise_std=0.5), "other noise: σ is 0.5 there, 0.1 here"),
        (lambda content: content.pop("config"), "has no finished attack"),
    ],
)
def test_a_control_that_cannot_stand_beside_the_run_is_refused(
    attacked: Path, runs_copy: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    shutil.copytree(attacked / "none" / "attack", runs_copy / "none" / "attack")
    content = result_of(runs_copy / "none" / "attack")
    spoil(content)
    (runs_copy / "none" / "attack" / "attack.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        Attack(runs_copy / "centroid", replace(TINY, control=runs_copy / "none"))
    assert Attack(runs_copy / "centroid", TINY)._control is None  # nor is it found


def test_a_run_with_a_penalty_is_no_control(attacked: Path, runs_copy: Path) -> None:
    shutil.copytree(attacked / "none" / "attack", runs_copy / "centroid" / "attack")
    with pytest.raises(UsageError, match="no control: it was trained with a penalty, centroid"):
        Attack(runs_copy / "none", replace(TINY, control=runs_copy / "centroid"))


def test_a_control_is_found_wherever_the_results_go(attacked: Path, tmp_path: Path) -> None:
    assert Attack(attacked / "centroid", TINY, tmp_path / "elsewhere")._control is not None


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
def test_a_control_may_differ_in_every_option_of_the_penalty_and_where_it_was_computed_and_in_no_other(
    attacked: Path, runs_copy: Path, changes: dict[str, Any], found: bool
) -> None:
    shutil.copytree(attacked / "none" / "attack", runs_copy / "none" / "attack")
    path = runs_copy / "centroid" / "config.yaml"
    TrainConfig.from_dict(TrainConfig.from_yaml(path).to_dict() | changes).to_yaml(path)
    attack = Attack(runs_copy / "centroid", TINY)
    assert (attack._control is not None) == found


def test_runs_of_another_version_are_refused_and_passed_over(attacked: Path, runs_copy: Path) -> None:
    shutil.copytree(attacked / "none" / "attack", runs_copy / "none" / "attack")
    path = runs_copy / "none" / "config.yaml"
    path.write_text(path.read_text().replace("format: 2", "format: 1"))
    with pytest.raises(CheckpointError, match="made by another version"):
        Attack(runs_copy / "none", TINY)
    with pytest.raises(UsageError, match=r"no finished attack: .* made by another version"):
        Attack(runs_copy / "centroid", replace(TINY, control=runs_copy / "none"))
    assert Attack(runs_copy / "centroid", TINY)._control is None


def test_a_damaged_decoder_is_trained_again(runs_copy: Path, attacked: Path) -> None:
    attack_dir = runs_copy / "none" / "attack"
    shutil.copytree(attacked / "none" / "attack", attack_dir)
    (attack_dir / "attack.json").unlink()
    (attack_dir / "deconvC4.pt").write_bytes(b"half a file")
    result = Attack(runs_copy / "none", TINY).run()
    assert result["test_target"] == result_of(attacked / "none" / "attack")["test_target"]
    assert "training it again" in (attack_dir / "attack.log").read_text()


def test_a_network_in_one_piece_is_attacked_without_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cem.training.trainer.draw_tsne", lambda *_, **__: None)
    train(replace(TARGET, centralized=True, out=tmp_path / "run"))
    result = Attack(tmp_path / "run", replace(TINY, attackers=("deconvC4",))).run()
    assert (result["run"]["noise_std"], result["run"]["bottleneck"], result["run"]["cut_layer"]) == (0.0, None, None)
    assert result["information"]["nats"] is None
    assert result["undefended"] is None


def test_data_that_moved_are_asked_for(runs_copy: Path) -> None:
    options = TrainConfig.from_yaml(runs_copy / "none" / "config.yaml")
    replace(options, data="mnist", data_root=Path("gone")).to_yaml(runs_copy / "none" / "config.yaml")
    with pytest.raises(DataError, match=r"neither in gone nor .*; --data-root says where the run's data are now"):
        Attack(runs_copy / "none", TINY)
