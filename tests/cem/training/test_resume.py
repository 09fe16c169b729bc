"""A run that was interrupted and resumed has the numbers of one that never stopped."""

import errno
import os
import shutil
import signal
from dataclasses import replace
from itertools import count

import pytest
import torch
from small_runs import STEPS, attention, board, content, interrupt, log, resume, rows, small
from small_terms import GAIN, OwnScale, surrogate
from torch.utils.tensorboard import SummaryWriter

from cem.data.synthetic import write_test_images
from cem.errors import CheckpointError, MachineError, UsageError
from cem.training import checkpoint as checkpoints
from cem.training import load_run, read_config, read_summary, train
from cem.training import trainer as trainer_module

RUNS = {
    "mixture": {"surrogate": "mixture"},
    "a surrogate from elsewhere": {"surrogate": surrogate(OwnScale)},
    "a defense that learns": {"surrogate": "centroid", "defenses": (GAIN,)},
    "attention with dropout": attention(dropout=0.1),
    "attention with Adam": attention(trained=1e-4),
    "attention with SGD": attention(trained="shared"),
    "ramp and two passes": attention(ramp_from=0.1) | {"injection": "two_pass"},
    "an adapter": {"surrogate": "centroid", "adapter": 1},
    "slots and an attacker with a memory": {"surrogate": "slots", "defenses": ("noise", "inversion")},
    "bfloat16": {"amp": True},
}


def folder(root, seed=0):
    """Options of a run on color images, of which it makes three batches as well."""
    write_test_images(root, num_classes=2, train_per_class=12, test_per_class=2, seed=seed)
    return {"data": "folder", "data_root": root, "image_size": 32, "train_size": None, "batch_size": 8}


def check_resumed(broken, whole):
    """Resume a run and compare all of it."""
    torch.rand(100)  # whatever happens in between
    resumed, expected = resume(broken), read_summary(whole)
    assert expected is not None
    assert content(broken) == content(whole)
    for key in ("test_accuracy", "best_epoch", "rob_loss", "intra_mse", "skipped_steps"):
        assert resumed[key] == expected[key]


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(make, options):
    whole = train(make("whole", **options))
    check_resumed(interrupt(make("broken", **options), STEPS + 1), whole)


def test_run_with_augmentation_resumes_bit_for_bit(make, tmp_path):
    options = {"surrogate": "none", "augment": True, **folder(tmp_path / "images")}
    whole = train(make("whole", **options))
    check_resumed(interrupt(make("broken", **options), STEPS + 1), whole)


def test_warm_started_run_resumes_bit_for_bit_without_the_run_that_it_started_from(make):
    first = train(make("first", surrogate="none", epochs=1))
    options = {"lambd_schedule": "rising", "init_from": first, "lambd": 16.0}
    whole, broken = train(make("whole", **options)), interrupt(make("broken", **options), STEPS + 1)
    shutil.rmtree(first)
    check_resumed(broken, whole)
    assert rows(broken)[1]["lambda_eff"] == 16.0


def test_run_interrupted_in_its_first_epoch_and_again_resumes_bit_for_bit(make):
    whole, broken = train(make("whole", surrogate="none")), make("broken", surrogate="none")
    interrupt(broken, 1)
    interrupt(broken, 2 * STEPS + 1, resume=True)
    check_resumed(broken.run_dir, whole)


def test_run_interrupted_after_its_last_epoch_is_only_finished(make, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    config = make(surrogate="none", epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "draw_curves", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    before = (config.run_dir / "last.pt").read_bytes()
    resume(config.run_dir)
    assert (config.run_dir / "last.pt").read_bytes() == before
    assert read_summary(config.run_dir) is not None


def test_interrupt_while_events_are_written_waits_for_them(make, monkeypatch):
    write, names = SummaryWriter.add_scalar, []

    def interrupted(board, name, *values):
        signal.raise_signal(signal.SIGINT)
        names.append(name)
        write(board, name, *values)

    monkeypatch.setattr(SummaryWriter, "add_scalar", interrupted)
    config = make(surrogate="none")
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert {"epoch", *names} == {*rows(config.run_dir)[0]}
    assert "1 of 3 epochs are saved" in (config.run_dir / "train.log").read_text()


@pytest.mark.parametrize("written", [0, 6, 9, 14], ids=["first", "middle", "end of an epoch", "last"])
def test_full_disk_says_where_and_how_to_go_on_and_a_resumed_run_is_the_undisturbed_one(make, monkeypatch, written):
    whole, broken, left = train(make("whole", surrogate="none")), make("broken", surrogate="none"), count(-written)

    def full(_):
        if next(left) >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MachineError, match=f"cannot write {broken.run_dir}.*: the disk is full"):
            train(broken)
    if written == 0:
        assert not broken.run_dir.exists()
        train(broken)
    else:
        assert f"epochs are saved. Resume with: python -m cem.train --resume {broken.run_dir}" in log(broken.run_dir)
        resume(broken.run_dir)
    assert content(broken.run_dir) == content(whole)


def test_other_number_of_threads_is_warned_about_and_left_to_the_run_where_nobody_says(make):
    run_dir = interrupt(make("run", surrogate="none", threads=1), STEPS)
    interrupt(replace(read_config(run_dir), out=run_dir), 1, resume=True)
    assert "threads so far" not in log(run_dir)
    before = torch.get_num_threads()
    assert resume(run_dir, threads=2)["threads"] == 2
    assert "1 threads so far, 2 from here on: last digits may differ" in log(run_dir)
    assert torch.get_num_threads() == before


def test_run_without_its_options_takes_them_from_the_checkpoint(make):
    run_dir = interrupt(make("run", surrogate="none"), STEPS)
    (run_dir / "config.yaml").unlink()
    assert resume(run_dir)["epochs"] == 3


def test_interruption_logs_the_command_that_resumes(make):
    run_dir = interrupt(make("my run", surrogate="none"), STEPS)
    expected = f"1 of 3 epochs are saved. Resume with: python -m cem.train --resume '{run_dir}'"
    assert expected in log(run_dir)


def test_tensorboard_has_no_step_twice_after_a_resume(make, tmp_path):
    """Killed between TensorBoard's epoch and the checkpoint's, an epoch is trained, and written, again."""
    config = make(surrogate="none")
    last = interrupt(config, STEPS) / "last.pt"
    shutil.copy(last, tmp_path / "older.pt")
    interrupt(config, STEPS, resume=True)
    shutil.copy(tmp_path / "older.pt", last)
    resume(config.run_dir)
    assert board(config.run_dir)["cross_entropy"] == [1, 2, 3]


@pytest.fixture
def moved(tmp_path):
    """Where a run that was interrupted in its second epoch lies now, and its images beside it."""
    before = tmp_path / "before"
    interrupt(small(before / "run", surrogate="none", **folder(before / "images")), STEPS)
    return before.rename(tmp_path / "after")


def test_run_resumes_elsewhere_on_its_images_elsewhere_without_its_device(moved):
    path = moved / "run" / "last.pt"
    content = checkpoints.load(path)
    content["config"]["device"] = "cuda:99"
    checkpoints.save(path, content)
    resume(moved / "run", data_root=moved / "images", device="auto", backend="eager", download=True)
    assert read_summary(moved / "run") is not None


def test_resuming_with_other_options_is_refused_by_name(moved):
    with pytest.raises(UsageError, match=r"--lr \(was 0\.05, got 0\.1\), --sgd-momentum \(was 0\.9, got 0\.5\)"):
        resume(moved / "run", data_root=moved / "images", sgd_momentum=0.5, lr=0.1)


def test_resuming_on_other_images_is_refused(moved):
    folder(moved / "others", seed=1)
    next((moved / "images" / "test").glob("*/*.png")).unlink()
    for name, of in (
        ("others", r"checksum of the training images \(was \d+"),
        ("images", r"test images \(was 4, got 3"),
    ):
        with pytest.raises(UsageError, match=f"on other data: {of}"):
            resume(moved / "run", data_root=moved / name)


def test_a_checkpoint_of_ours_with_other_content_is_refused_by_name_wherever_it_is_read(make):
    run_dir = interrupt(make(surrogate="none"), STEPS)
    last, best = run_dir / "last.pt", run_dir / "best.pt"
    others = {"encoder": None, "optimizers": {}, "scheduler": {"last_epoch": 3}, "config": {"lr": "text"}}
    others |= {"data_facts": {}, "history": [{"epoch": 1}], "random": {}, "best_epoch": 2}
    for path, parts, read in (
        (last, others, lambda: resume(run_dir)),
        (best, ("encoder", "data_facts"), lambda: load_run(run_dir)),
    ):
        whole = checkpoints.load(path)
        for part in parts:
            checkpoints.save(path, whole | {part: others[part]})
            with pytest.raises(CheckpointError, match=rf"{path.name} does not fit: .*{part}"):
                read()
        checkpoints.save(path, whole)
    resume(run_dir)
