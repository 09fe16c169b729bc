"""Options of a run: defaults, what goes together, the run's directory, and what another run's may differ in."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from small_terms import GAIN, Gain, Scale, surrogate

from cem.errors import UsageError
from cem.options import hints
from cem.surrogates import SURROGATES
from cem.training.config import TrainConfig, changed_options, without_penalty
from cem_kernels import BACKENDS, backends

GAINED = TrainConfig(surrogate="none", defenses=(GAIN,))


def under(name, **options):
    """The defaults, under this surrogate with these options of its own."""
    return TrainConfig(surrogate=name, members={name: SURROGATES[name].Options(**options)})


def gained(**options):
    return {"gain": Gain.Options(**options)}


def test_defaults_are_valid_and_backends_those_of_the_operators():
    expected = replace(TrainConfig(), members={"slots": SURROGATES["slots"].Options()})
    assert TrainConfig().checked() == expected
    assert get_args(hints(TrainConfig)["backend"]) == BACKENDS


POSITIVE = ("epochs", "batch_size", "train_size", "image_size", "cut_layer", "penalty_from", "lr")
NOT_NEGATIVE = ("lambd", "noise_std", "sgd_momentum", "weight_decay", "warmup_epochs", "num_workers", "profile_steps")
BEYOND = [("sgd_momentum", 1.0), ("seed", 2**32), ("lambd", float("nan")), ("data", "imagenet")]


@pytest.mark.parametrize(("name", "value"), [*((n, 0) for n in POSITIVE), *((n, -1) for n in NOT_NEGATIVE), *BEYOND])
def test_value_out_of_range_is_refused_with_option_and_value(name, value):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be .* got {value!r}"):
        replace(TrainConfig(), **{name: value}).checked()


CAPTURED = {"capture": True, "device": "cpu"}
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="auto is a CUDA device here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"epochs": 1, "penalty_from": 2},
            "--penalty-from must be at most --epochs 1, or no epoch has a penalty; got 2",
        ),
        ({"surrogate": "none", "defenses": (GAIN,), "penalty_from": 21}, "--penalty-from must be at most --epochs 20"),
        ({"warmup_epochs": 21.0}, "--warmup-epochs must be at most --epochs 20, got 21"),
        ({"centralized": True, "adapter": 2}, "--centralized has no cut for --adapter 2"),
        ({"centralized": True, "defenses": (GAIN,)}, f"--centralized has no cut for --defenses {GAIN}"),
        (CAPTURED | {"surrogate": "none"}, "--capture: without a penalty there is nothing to capture, got --lambd 0"),
        (CAPTURED | {"lambd": 0.0}, "--capture: without a penalty there is nothing to capture, got --lambd 0"),
        (CAPTURED | {"injection": "two_pass"}, "--capture takes --injection combined, got two_pass"),
        (CAPTURED | {"surrogate": "none", "defenses": (GAIN,)}, "--capture needs a CUDA device, got cpu"),
        pytest.param({"capture": True}, r"got cpu \(--device auto\)", marks=no_cuda),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**options).checked()


@pytest.mark.parametrize(("defenses", "begins"), [((GAIN,), 5), (("noise",), None)])
def test_losses_of_defenses_begin_in_the_control_where_they_did(defenses, begins):
    control = without_penalty(TrainConfig(defenses=defenses, penalty_from=5))
    assert (control.surrogate, control.defenses, control.penalty_from) == ("none", defenses, begins)


@pytest.mark.parametrize("name", ["slots", "attention"])
def test_triton_on_the_cpu_is_refused_before_anything_is_built(name, monkeypatch):
    config = TrainConfig(surrogate=name, backend="triton", device="cpu")
    monkeypatch.setattr(backends, "INTERPRETING", True)
    config.checked()
    monkeypatch.setattr(backends, "INTERPRETING", False)
    with pytest.raises(UsageError, match=r"--backend triton needs a CUDA device, got cpu"):
        config.checked()


@pytest.mark.parametrize("name", list(SURROGATES))
def test_weight_and_schedule_are_the_surrogates_own_where_nobody_says(name):
    resolved, member = TrainConfig(surrogate=name).resolved(), SURROGATES[name]
    assert (resolved.lambd, resolved.lambd_schedule) == (member.Options.weight, member.schedule)
    assert [TrainConfig(epochs=epochs).resolved().penalty_from for epochs in (1, 2, 3)] == [1, 2, 2]
    given = TrainConfig(surrogate=name, lambd=3.0, lambd_schedule="rising", penalty_from=3)
    assert given.resolved() == given


NAMES = {
    "digits-resnet20-mixture-lambd8-noise0.025-seed3": TrainConfig(surrogate="gmm", lambd=8, noise_std=0.025, seed=3),
    "digits-resnet20-slots-lambd0.5-noise0.3-seed0": TrainConfig(),
    "digits-resnet20-centroid-momentum0.9-lambd0.5-noise0.3-seed0": under("centroid", momentum=0.9),
    "digits-resnet20-scale-lambd1-gain-factor3.0-noise0.3-seed0": TrainConfig(
        surrogate=surrogate(Scale), defenses=(GAIN,), members=gained(factor=3.0)
    ),
    "svhn-vgg11-none-noise-noise0.3-seed0": TrainConfig(
        surrogate="none", data="svhn", arch="vgg11", defenses=("noise",)
    ),
}


@pytest.mark.parametrize(("name", "config"), NAMES.items(), ids=NAMES)
def test_run_directory_is_named_after_what_tells_runs_apart_or_as_it_is_asked_for(name, config):
    assert config.run_dir == Path("runs") / name
    assert replace(config, out="a/b").checked().run_dir == Path("a/b")


ELSEWHERE = TrainConfig(device="cuda:99", capture=True, backend="eager", profile_steps=3, out=Path("x"), num_workers=2)
OWN = replace(under("mixture"), lambd=16.0, lambd_schedule="rising")
FOLDER = TrainConfig(data="folder", augment=True)


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (ELSEWHERE, TrainConfig(), []),
        (ELSEWHERE, TrainConfig(lr=0.1), ["--lr (was 0.05, got 0.1)"]),
        (TrainConfig(), under("slots", num_slots=2), ["--slots.num-slots (was 4, got 2)"]),
        (GAINED, replace(GAINED, members=gained(weight=1.0)), ["--gain.weight (was 0.25, got 1.0)"]),
        (TrainConfig(surrogate="gmm"), OWN, []),
        # Before it no epoch is the best one, whatever is penalized.
        (GAINED, replace(GAINED, penalty_from=3), ["--penalty-from (was 2, got 3)"]),
        (TrainConfig(threads=1), TrainConfig(threads=2, penalty_from=2), []),
        (
            FOLDER,
            replace(FOLDER, num_workers=2),
            ["--num-workers (was 0, got 2; with --augment, worker processes draw other random numbers)"],
        ),
    ],
    ids=["where", "rate", "surrogate", "defense", "another name", "first epoch", "threads", "workers that augment"],
)
def test_changed_options_name_what_would_change_the_numbers(before, after, lines):
    assert changed_options(before, after) == lines
