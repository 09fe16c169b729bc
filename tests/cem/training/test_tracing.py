"""The trace of a few training steps."""

import gzip
import json
import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_runs import STEPS, interrupt, log, weights
from small_terms import GAIN

from cem.training import train
from cem.training import trainer as trainer_module
from cem.training.tracing import traced_steps

SPLIT = ("encoder forward", "server", "surrogate", "defenses.gain", "encoder backward", "optimizer")
WHOLE = ("encoder forward", "server", "surrogate", "defenses.gain", "server and encoder backward", "optimizer")


def regions(run_dir):
    with gzip.open(run_dir / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def steps(run_dir):
    """Numbers of the steps in a trace, counted from 0, from where training or resuming began."""
    return sorted(int(name.split("#")[1]) for name in regions(run_dir) if name.startswith("ProfilerStep#"))


@pytest.mark.parametrize(("injection", "names"), [("combined", SPLIT), ("two_pass", WHOLE)])
def test_trace_shows_the_regions_of_every_step_and_the_log_where_it_is(make, injection, names):
    run_dir = train(make(epochs=2, profile_steps=2, defenses=(GAIN,), injection=injection))
    found = regions(run_dir)
    assert {name: count for name, count in found.items() if "#" not in name} == dict.fromkeys(names, 2)
    assert log(run_dir).count(f"trace of training steps: {run_dir}/trace.json.gz; open it") == 1


@pytest.mark.parametrize(
    ("asked", "begin", "traced"),
    [(2, 0, [3, 4]), (2, 3, [6, 7]), (5, 3, [4, 5, 6, 7, 8]), (100, 3, [3, 4, 5, 6, 7, 8]), (0, 3, None), (2, 9, None)],
    ids=["from the beginning", "later", "shorter warm-up", "fewer steps", "none", "none left"],
)
def test_trace_follows_a_warm_up_and_holds_what_there_is(tmp_path, asked, begin, traced):
    path, device = tmp_path / "trace.json.gz", torch.device("cpu")
    with traced_steps(path, logging.getLogger("t"), device, steps=asked, begin=begin, total=9) as end_of_step:
        for _ in range(9):
            end_of_step()
    assert path.exists() is (traced is not None)
    if traced is not None:
        assert steps(tmp_path) == traced


@pytest.mark.parametrize(
    ("options", "done", "begin"),
    [
        ({"penalty_from": 2}, 0, 3),
        ({"surrogate": "none", "penalty_from": 2}, 0, 0),
        ({"penalty_from": 3}, 1, 3),
        ({}, 1, 0),
    ],
    ids=["first epoch with the penalty", "no penalty", "resumed before the penalty", "resumed after its beginning"],
)
def test_trace_begins_in_the_first_epoch_with_the_penalty_that_is_left(make, monkeypatch, options, done, begin):
    asked = {}

    def nothing(*_, **windows):
        asked.update(windows)
        return traced_steps(*_, **windows | {"steps": 0})

    config = make(**options)
    if done:
        interrupt(config, done * STEPS)
    monkeypatch.setattr(trainer_module, "traced_steps", nothing)
    train(replace(config, profile_steps=2), resume=done > 0)
    assert asked == {"steps": 2, "begin": begin, "total": (3 - done) * STEPS}


def test_traced_run_has_the_numbers_of_one_that_is_not(make):
    plain, traced = train(make("plain")), train(make("traced", profile_steps=2))
    assert all(map(torch.equal, weights(plain), weights(traced)))
    assert not (plain / "trace.json.gz").exists()


def test_interrupted_run_leaves_the_steps_until_then(make):
    run_dir = interrupt(make(profile_steps=6), STEPS + 2)
    assert regions(run_dir)["optimizer"] == 2
