"""A run that was interrupted and resumed has the numbers of one that never stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import GAIN
from torch import Tensor

import cem
from cem.data.synthetic import write_test_images
from cem.errors import CheckpointError, UsageError
from cem.training import TrainConfig, Trainer, read_config, read_summary, train
from cem.training import checkpoint as checkpoints
from cem.training import trainer as trainer_module

STEPS_PER_EPOCH = 3


def small(out: Path, **options: Any) -> TrainConfig:
    return replace(
        TrainConfig(train_size=90, batch_size=32, epochs=3, noise_std=0.1, device="cpu", out=out),
        **options,
    )


def interrupt_at(step: int, config: TrainConfig, *, resume: bool = False) -> None:
    """Train until Ctrl-C comes in the middle of step ``step``, counted from 0."""
    with pytest.MonkeyPatch.context() as patch:
        inject, calls = trainer_module.INJECTIONS[config.injection], []

        def interrupted(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) > step:
                raise KeyboardInterrupt
            return inject(*args, **options)

        patch.setitem(trainer_module.INJECTIONS, config.injection, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, resume=resume)


def resume(run_dir: Path, **options: Any) -> None:
    train(replace(read_config(run_dir), out=run_dir, **options), resume=True)


def content(run_dir: Path) -> dict[str, Any]:
    """All of a run's ``last.pt`` that must repeat: everything but the times."""
    whole = checkpoints.load(run_dir / "last.pt")
    for row in whole["history"]:
        for name in [name for name in row if name.endswith("seconds")]:
            del row[name]
    del whole["config"]["out"]
    return whole


def assert_identical(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}/{index}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def attention(**options: Any) -> dict[str, Any]:
    own = cem.SURROGATES["attention"].Options(reduction="linear16", **options)
    return {"surrogate": "attention", "members": {"attention": own}}


def folder(root: Path, seed: int = 0) -> dict[str, Any]:
    """Options of a run on color images, of which it makes three batches as well."""
    write_test_images(root, num_classes=2, train_per_class=12, test_per_class=2, seed=seed)
    return {"data": "folder", "data_root": root, "image_size": 32, "train_size": None, "batch_size": 8, "epochs": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"surrogate": "none"},
        {"surrogate": "mixture"},
        {"surrogate": "centroid"},
        {"surrogate": "centroid", "defenses": (GAIN,)},
        attention(dropout=0.1),
        attention(trained=1e-4),
        attention(trained="shared"),
        attention(ramp_from=0.1) | {"injection": "two_pass"},
        {"surrogate": "none", "arch": "vgg11_bn", "epochs": 2},
        {"surrogate": "centroid", "amp": True},
    ],
    ids=[
        "none",
        "mixture",
        "centroid",
        "a defense with a term",
        "attention",
        "attention with Adam",
        "attention with SGD",
        "ramp and two passes",
        "dropout",
        "bfloat16",
    ],
)
def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    check_bit_for_bit(tmp_path, options)


def test_run_with_augmentation_resumes_bit_for_bit(tmp_path: Path) -> None:
    check_bit_for_bit(tmp_path, {"surrogate": "none", "augment": True, **folder(tmp_path / "images")})


def test_warm_started_run_resumes_bit_for_bit_without_the_run_that_it_started_from(tmp_path: Path) -> None:
    train(small(tmp_path / "first", surrogate="none", epochs=1))
    options = {"lambd_schedule": "rising", "init_from": tmp_path / "first", "epochs": 2, "lambd": 16.0}
    train(small(tmp_path / "whole", **options))
    interrupt_at(STEPS_PER_EPOCH + 1, small(tmp_path / "broken", **options))
    shutil.rmtree(tmp_path / "first")
    resume(tmp_path / "broken")
    assert_identical(content(tmp_path / "broken"), content(tmp_path / "whole"))
    assert content(tmp_path / "broken")["history"][1]["lambda_eff"] == 16.0


def check_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    train(small(tmp_path / "whole", **options))
    interrupt_at(STEPS_PER_EPOCH + 1, small(tmp_path / "broken", **options))
    torch.rand(100)  # whatever happens in between
    resume(tmp_path / "broken")
    assert_identical(content(tmp_path / "broken"), content(tmp_path / "whole"))
    whole, broken = (read_summary(tmp_path / name) for name in ("whole", "broken"))
    assert whole is not None
    assert broken is not None
    for key in ("test_accuracy", "best_epoch", "rob_loss", "intra_mse", "skipped_steps"):
        assert broken[key] == whole[key]


def test_run_interrupted_in_its_first_epoch_can_be_resumed(tmp_path: Path) -> None:
    train(small(tmp_path / "whole", surrogate="none", epochs=2))
    interrupt_at(1, small(tmp_path / "broken", surrogate="none", epochs=2))
    resume(tmp_path / "broken")
    assert_identical(content(tmp_path / "broken"), content(tmp_path / "whole"))


def test_run_interrupted_twice_can_be_resumed(tmp_path: Path) -> None:
    train(small(tmp_path / "whole", surrogate="none"))
    config = small(tmp_path / "broken", surrogate="none")
    interrupt_at(STEPS_PER_EPOCH, config)
    interrupt_at(STEPS_PER_EPOCH + 2, config, resume=True)
    resume(tmp_path / "broken")
    assert_identical(content(tmp_path / "broken"), content(tmp_path / "whole"))


def test_run_interrupted_after_its_last_epoch_is_only_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    config = small(tmp_path / "run", surrogate="none", epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "draw_curves", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert read_summary(tmp_path / "run") is not None


def test_interruption_logs_the_command_that_resumes(tmp_path: Path) -> None:
    config = small(tmp_path / "my run", surrogate="none")
    interrupt_at(STEPS_PER_EPOCH, config)
    text = (config.run_dir / "train.log").read_text()
    assert f"1 of 3 epochs are saved. Resume with: python -m cem.train --resume '{config.run_dir}'" in text


def test_tensorboard_has_no_step_twice_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between TensorBoard's epoch and the checkpoint's, an epoch is trained, and written, again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small(tmp_path / "run", surrogate="none")
    interrupt_at(STEPS_PER_EPOCH, config)
    older = tmp_path / "older.pt"
    shutil.copy(tmp_path / "run" / "last.pt", older)
    interrupt_at(STEPS_PER_EPOCH, config, resume=True)
    shutil.copy(older, tmp_path / "run" / "last.pt")
    resume(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("cross_entropy")] == [1, 2, 3]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    train(small(tmp_path / "run", surrogate="none", epochs=1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    resume(tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_resuming_with_other_options_is_refused_by_name(tmp_path: Path) -> None:
    interrupt_at(STEPS_PER_EPOCH, small(tmp_path / "run", surrogate="none"))
    with pytest.raises(UsageError, match=r"--lr \(was 0\.05, got 0\.1\), --sgd-momentum \(was 0\.9, got 0\.5\)"):
        resume(tmp_path / "run", sgd_momentum=0.5, lr=0.1)


def test_resuming_with_an_option_that_says_where_to_compute_is_allowed(tmp_path: Path) -> None:
    interrupt_at(STEPS_PER_EPOCH, small(tmp_path / "run", surrogate="none", epochs=2))
    resume(tmp_path / "run", device="auto", backend="eager", download=True)
    assert read_summary(tmp_path / "run") is not None


def test_resuming_where_the_device_of_before_is_missing_is_allowed(tmp_path: Path) -> None:
    config = small(tmp_path / "run", surrogate="none", epochs=2)
    interrupt_at(STEPS_PER_EPOCH, config)
    path = tmp_path / "run" / "last.pt"
    content = checkpoints.load(path)
    content["config"]["device"] = "cuda:99"
    checkpoints.save(path, content)
    resume(tmp_path / "run")
    assert read_summary(tmp_path / "run") is not None


def test_resuming_on_the_same_data_elsewhere_is_allowed(tmp_path: Path) -> None:
    interrupt_at(STEPS_PER_EPOCH, small(tmp_path / "run", surrogate="none", **folder(tmp_path / "images")))
    (tmp_path / "images").rename(tmp_path / "moved")
    resume(tmp_path / "run", data_root=tmp_path / "moved")
    assert read_summary(tmp_path / "run") is not None


def test_resuming_on_other_images_is_refused(tmp_path: Path) -> None:
    interrupt_at(STEPS_PER_EPOCH, small(tmp_path / "run", surrogate="none", **folder(tmp_path / "images")))
    folder(tmp_path / "others", seed=1)
    with pytest.raises(UsageError, match=r"on other data: checksum of the training images \(was \d+, got \d+\)$"):
        resume(tmp_path / "run", data_root=tmp_path / "others")


def test_resuming_on_other_test_images_is_refused_by_number(tmp_path: Path) -> None:
    interrupt_at(STEPS_PER_EPOCH, small(tmp_path / "run", surrogate="none", **folder(tmp_path / "images")))
    next((tmp_path / "images" / "test").glob("*/*.png")).unlink()
    with pytest.raises(UsageError, match=r"on other data: test images \(was 4, got 3\)$"):
        resume(tmp_path / "run")


def test_moved_run_can_be_resumed(tmp_path: Path) -> None:
    interrupt_at(STEPS_PER_EPOCH, small(tmp_path / "run", surrogate="none", epochs=2))
    (tmp_path / "run").rename(tmp_path / "moved")
    resume(tmp_path / "moved")
    assert read_summary(tmp_path / "moved") is not None


def test_new_run_on_top_of_an_interrupted_one_is_refused_with_the_command_to_resume(tmp_path: Path) -> None:
    config = small(tmp_path / "run", surrogate="none")
    interrupt_at(STEPS_PER_EPOCH, config)
    with pytest.raises(UsageError, match=r"python -m cem\.train --resume"):
        Trainer(config)


def test_run_without_checkpoint_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*last\.pt"):
        Trainer(small(tmp_path / "run", surrogate="none"), resume=True)


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    config = small(tmp_path / "run", surrogate="none")
    interrupt_at(STEPS_PER_EPOCH, config)
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*last\.pt"):
        resume(tmp_path / "run")


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    interrupt_at(STEPS_PER_EPOCH, small(tmp_path / "run", surrogate="none"))
    interrupt_at(STEPS_PER_EPOCH, small(tmp_path / "other", surrogate="none", seed=1))
    shutil.copy(tmp_path / "other" / "last.pt", tmp_path / "run" / "last.pt")
    with pytest.raises(UsageError, match=r"--seed \(was 1, got 0\)"):
        resume(tmp_path / "run")
