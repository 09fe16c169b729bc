"""The trace of a few training steps."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import GAIN, weights
from torch import Tensor

from cem.training import TrainConfig, train
from cem.training import trainer as trainer_module

REGIONS = ("encoder forward", "server", "surrogate", "defenses.gain", "encoder backward", "optimizer")
STEPS_PER_EPOCH = 3


def config(out: Path, **options: Any) -> TrainConfig:
    small = TrainConfig(train_size=90, batch_size=32, epochs=3, device="cpu", out=out)
    return replace(small, **options)


def regions(run_dir: Path) -> Counter[str]:
    with gzip.open(run_dir / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def steps(run_dir: Path) -> list[int]:
    """Numbers of the steps in a trace, counted from 0, from where training or resuming began."""
    return sorted(int(name.split("#")[1]) for name in regions(run_dir) if name.startswith("ProfilerStep#"))


def parts(run_dir: Path) -> list[Tensor]:
    return weights(run_dir, "encoder", "server", "surrogate")


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let Ctrl-C come in the middle of a step, counted from 0."""
    inject, calls = trainer_module.INJECTIONS["combined"], []

    def arrange(step: int) -> None:
        def interrupted(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == step + 1:
                raise KeyboardInterrupt
            return inject(*args, **options)

        monkeypatch.setitem(trainer_module.INJECTIONS, "combined", interrupted)

    return arrange


def test_trace_shows_the_regions_of_every_step(tmp_path: Path) -> None:
    found = regions(train(config(tmp_path / "run", profile_steps=2, defenses=(GAIN,))))
    assert {name: found[name] for name in REGIONS} == dict.fromkeys(REGIONS, 2)


def test_two_passes_have_regions_of_their_own(tmp_path: Path) -> None:
    found = regions(train(config(tmp_path / "run", profile_steps=2, injection="two_pass")))
    names = ("encoder forward", "server", "surrogate", "server and encoder backward", "optimizer")
    assert {name: found[name] for name in names} == dict.fromkeys(names, 2)


def test_trace_begins_after_a_warm_up_in_the_first_epoch_with_the_penalty(tmp_path: Path) -> None:
    run_dir = train(config(tmp_path / "run", profile_steps=2, penalty_from=2))
    assert steps(run_dir) == [STEPS_PER_EPOCH + 3, STEPS_PER_EPOCH + 4]


def test_run_without_penalty_is_traced_from_its_beginning(tmp_path: Path) -> None:
    assert steps(train(config(tmp_path / "run", profile_steps=2, surrogate="none"))) == [3, 4]


@pytest.mark.parametrize(
    ("asked", "traced"),
    [(5, [4, 5, 6, 7, 8]), (100, [3, 4, 5, 6, 7, 8])],
    ids=["shorter warm-up", "fewer steps"],
)
def test_where_few_steps_are_left_the_trace_holds_what_there_is(tmp_path: Path, asked: int, traced: list[int]) -> None:
    assert steps(train(config(tmp_path / "run", profile_steps=asked, penalty_from=2))) == traced


def test_traced_run_has_the_numbers_of_one_that_is_not(tmp_path: Path) -> None:
    plain, traced = train(config(tmp_path / "plain")), train(config(tmp_path / "traced", profile_steps=2))
    assert all(map(torch.equal, parts(plain), parts(traced)))
    assert not (plain / "trace.json.gz").exists()


def test_resumed_run_is_traced_and_goes_on_with_the_same_numbers(
    tmp_path: Path, interrupt_at: Callable[[int], None]
) -> None:
    whole, broken = train(config(tmp_path / "whole")), config(tmp_path / "broken")
    interrupt_at(STEPS_PER_EPOCH + 1)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    resumed = train(replace(broken, profile_steps=1), resume=True)
    assert steps(resumed) == [3]
    assert all(map(torch.equal, parts(whole), parts(resumed)))


def test_interrupted_run_leaves_the_steps_until_then(tmp_path: Path, interrupt_at: Callable[[int], None]) -> None:
    interrupt_at(STEPS_PER_EPOCH + 2)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "run", profile_steps=6, penalty_from=1))
    assert regions(tmp_path / "run")["optimizer"] == 2


def test_log_says_where_the_trace_is(tmp_path: Path) -> None:
    run_dir = train(config(tmp_path / "run", profile_steps=1))
    assert (run_dir / "train.log").read_text().count(f"trace of training steps: {run_dir}/trace.json.gz; open it") == 1
