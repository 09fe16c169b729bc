"""Checkpoint files: whole or not at all, and only ours."""

import errno
import io
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cem.errors import CheckpointError, MachineError
from cem.interrupts import heeded
from cem.training import checkpoint
from cem.training.checkpoint import load, load_state, save, seed_everything


@pytest.mark.parametrize(("module", "step"), [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_failure_while_saving_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, module, step):
    save(tmp_path / "a.pt", {"epoch": 1})

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.pt", {"epoch": 2})
    assert load(tmp_path / "a.pt")["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_an_interrupt_in_the_middle_of_a_file_waits_for_its_end(tmp_path, monkeypatch):
    whole, writes = checkpoint._Summed.write, []

    def interrupted(file, data):
        signal.raise_signal(signal.SIGINT)
        writes.append(data)
        return whole(file, data)

    monkeypatch.setattr(checkpoint._Summed, "write", interrupted)
    with pytest.raises(KeyboardInterrupt), heeded():
        save(tmp_path / "a.pt", {"weights": torch.zeros(1000)})
    assert len(writes) > 3
    assert not list(tmp_path.iterdir())


def write(path, content=None, cut=None):
    save(path, {"weights": torch.arange(300.0), "plain": [1, (2.5, "x")]} if content is None else content)
    path.write_bytes(path.read_bytes()[:cut])


def test_any_flipped_bit_and_any_truncation_is_damage_and_torch_load_reads_the_rest(tmp_path):
    path = tmp_path / "a.pt"
    write(path)
    whole, draw = path.read_bytes(), random.Random(0)
    assert torch.load(path, weights_only=True)["plain"] == [1, (2.5, "x")]
    ends = [*range(250), *range(len(whole) - 250, len(whole))]  # of the archive's header, and of the last line
    for at in [*ends, *draw.sample(range(len(whole)), 100)]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << draw.randrange(8)
        for damaged in (flipped, whole[:at]):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"a\.pt (is damaged|is not a checkpoint|was written by)"):
                load(path)


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


UNSAFE = r"a\.pt holds something other than tensors and plain values$"
NO = r"a\.pt is not a checkpoint of cem"
WRONG = {
    "missing": (lambda path: None, r"there is no checkpoint .*a\.pt$"),
    "directory": (lambda path: path.mkdir(), r"cannot read checkpoint .*a\.pt: Is a directory$"),
    "empty": (lambda path: write(path, cut=0), NO + ": it is empty$"),
    "all but a byte": (lambda path: write(path, cut=-1), r"a\.pt is damaged: it does not have the checksum"),
    **{text: (lambda path, text=text: path.write_text(text), NO) for text in ("epoch,lr\n1,2\n", ".", "s3://b", "{}")},
    "code": (lambda path: write(path, {"x": Payload()}), UNSAFE),
    "another program's": (lambda path: torch.save({"state_dict": {}}, path), NO),
    "of 0.1.0": (lambda path: torch.save({"format": "cem-checkpoint-1"}, path), r"was written by version 0\.1\.0"),
    "a part missing": (lambda path: write(path, {}), r"a\.pt does not fit: it has no part$"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_whole_checkpoint_of_ours_is_refused_by_name_and_runs_no_code(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "a.pt", {"part": int})
    assert not (tmp_path / "pwned").exists()


def test_a_full_disk_is_said_in_the_users_words(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "open", lambda *_: Full(), raising=False)
    with pytest.raises(MachineError, match=r"^cannot write .*a\.pt: the disk is full$"):
        save(tmp_path / "a.pt", {"weights": torch.zeros(1000)})


FACTS = {"K": int, "mean": (float, ...), "size": (int, int), "sums": {str: int}, "w": torch.zeros(2, 3), "any": None}
FOUND = {"K": 3, "mean": [0.5], "size": (4, 4), "sums": {"a": 1}, "w": torch.ones(2, 3), "any": "thing"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"K": 2**63}, r"facts.K must be a whole number, got one beyond 2\*\*63"),
        ({"mean": 0.5}, "facts.mean must be a list, got a number"),
        ({"mean": (1, None)}, "facts.mean.1 must be a number, got NoneType"),
        ({"size": (4,)}, "facts.size has 1 entries, not 2"),
        ({"sums": {1: 2}}, "nothing here is called facts.sums.1"),
        ({"w": torch.ones(3)}, r"facts.w has shape \[3\], not \[2, 3\]"),
        ({"more": 1}, "nothing here is called facts.more"),
    ],
)
def test_what_is_built_otherwise_is_refused_with_file_and_place(other, message):
    checkpoint.expect(Path("a.pt"), "facts", FACTS, FOUND)
    with pytest.raises(CheckpointError, match=rf"^a\.pt does not fit: {message}$"):
        checkpoint.expect(Path("a.pt"), "facts", FACTS, FOUND | other)


def test_state_of_another_network_is_refused_with_file_and_part():
    for content, message in (
        ({}, "it has no encoder"),
        ({"encoder": nn.Linear(2, 3).state_dict()}, r"encoder.weight has shape \[3, 2\], not \[2, 2\]"),
    ):
        with pytest.raises(CheckpointError, match=rf"^a\.pt does not fit: {message}$"):
            load_state(nn.Linear(2, 2), content, "encoder", Path("a.pt"))


def trained(kind, width=2, **options):
    layer = nn.Linear(width, 1)
    optimizer = kind(layer.parameters(), lr=0.1, **options)
    layer(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (trained(torch.optim.Adam), "nothing here is called optimizers.own.param_groups.0.betas"),
        (
            trained(torch.optim.SGD, 3, momentum=0.9),
            r"optimizers.own.state.0.momentum_buffer has shape \[1, 3\], not \[1, 2\]",
        ),
    ],
)
def test_state_of_another_optimizer_is_refused_and_its_own_is_taken(other, message):
    own, same = (trained(torch.optim.SGD, momentum=0.9) for _ in range(2))
    checkpoint.load_optimizer(own, {"optimizers": {"own": same.state_dict()}}, "own", Path("a.pt"))
    with pytest.raises(CheckpointError, match=f"does not fit: {message}"):
        checkpoint.load_optimizer(own, {"optimizers": {"own": other.state_dict()}}, "own", Path("a.pt"))


def draw(loader=None):
    """From every generator that a run draws from."""
    ours = [random.random(), np.random.normal(), np.random.rand()]  # noqa: NPY002
    return [*ours, torch.rand(()).item(), torch.rand((), generator=loader).item()]


def test_random_states_survive_the_file(tmp_path):
    loader, cpu = torch.Generator().manual_seed(5), torch.device("cpu")
    seed_everything(4)
    np.random.normal()  # noqa: NPY002 - leaves half of a pair cached, which is part of the state
    save(tmp_path / "a.pt", {"random": checkpoint.random_state(loader, cpu)})
    expected = draw(loader)
    assert draw(loader) != expected
    checkpoint.restore_random_state(load(tmp_path / "a.pt")["random"], loader, cpu)
    assert draw(loader) == expected


@pytest.mark.parametrize(
    ("part", "damaged"),
    [
        ("torch", torch.zeros(5056, dtype=torch.uint8)),
        ("python", (3, (0,) * 625, "text")),
        ("numpy", {"keys": torch.zeros(624), "rest": (700, 0, 0.0)}),  # behind the last key
    ],
)
def test_a_damaged_random_state_is_refused_before_anything_draws_from_it(part, damaged):
    loader, cpu = torch.Generator().manual_seed(5), torch.device("cpu")
    state, before = checkpoint.random_state(loader, cpu), torch.get_rng_state()
    checkpoint.check_random_state(state, loader, cpu, Path("a.pt"))
    with pytest.raises(CheckpointError, match=r"^a\.pt does not fit: .*random"):
        checkpoint.check_random_state(state | {part: damaged}, loader, cpu, Path("a.pt"))
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_everything_seeds_every_global_generator():
    seed_everything(6)
    first = draw()
    seed_everything(6)
    assert draw() == first
