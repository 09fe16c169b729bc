"""Options of a run: defaults, what goes together, the run's directory, and what another run's may differ in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from small_runs import GAIN, Gain, Scale, surrogate

from cem.data import DATASETS
from cem.errors import UsageError
from cem.options import hints
from cem.surrogates import SURROGATES
from cem.training.config import TrainConfig, changed_options, without_penalty
from cem_kernels import BACKENDS, backends

EVERY_OPTION = TrainConfig(
    data="cifar10",
    data_root=Path("images"),
    download=True,
    train_size=500,
    image_size=32,
    augment=True,
    num_workers=2,
    arch="vgg11",
    cut_layer=3,
    bottleneck="none",
    centralized=True,
    surrogate="mixture",
    lambd=8.0,
    lambd_schedule="constant",
    penalty_from=5,
    injection="two_pass",
    backend="eager",
    capture=True,
    noise_std=0.025,
    defenses=("noise",),
    epochs=240,
    batch_size=64,
    lr=0.01,
    sgd_momentum=0.5,
    weight_decay=1e-6,
    warmup_epochs=2.5,
    amp=True,
    init_from=Path("runs/before"),
    seed=7,
    device="cpu",
    out=Path("runs/here"),
    profile_steps=5,
    members={"mixture": SURROGATES["mixture"].Options(clusters=3)},
)


def with_options(name: str, **options: Any) -> TrainConfig:
    """The defaults, under this surrogate with these options of its own."""
    return TrainConfig(surrogate=name, members={name: SURROGATES[name].Options(**options)})


def test_defaults_are_valid() -> None:
    checked = TrainConfig().checked()
    assert checked == replace(TrainConfig(), members={"centroid": SURROGATES["centroid"].Options()})


def test_backends_are_those_that_the_operators_have() -> None:
    assert get_args(hints(TrainConfig)["backend"]) == BACKENDS


def test_data_set_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=f"--data must be one of {', '.join(DATASETS)}, got 'imagenet'"):
        TrainConfig(data="imagenet").checked()


def test_yaml_gives_back_every_option(tmp_path: Path) -> None:
    default = TrainConfig()
    unchanged = [name for name in hints(TrainConfig) if getattr(EVERY_OPTION, name) == getattr(default, name)]
    assert unchanged == [], "the example must differ from the default in every option"
    EVERY_OPTION.to_yaml(tmp_path / "config.yaml")
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == EVERY_OPTION


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("train_size", 0),
        ("image_size", 0),
        ("cut_layer", 0),
        ("penalty_from", 0),
        ("lambd", -1.0),
        ("lambd", float("nan")),
        ("noise_std", float("inf")),
        ("lr", 0.0),
        ("sgd_momentum", 1.0),
        ("weight_decay", -1.0),
        ("warmup_epochs", -1.0),
        ("seed", 2**32),
        ("num_workers", -1),
        ("profile_steps", -1),
    ],
)
def test_value_out_of_range_is_refused_with_option_and_value(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be .* got {value}"):
        replace(TrainConfig(), **{name: value}).checked()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("centroid", {"momentum": 1.0}),
        ("mixture", {"clusters": 0}),
        ("mixture", {"var_threshold": -1.0}),
        ("mixture", {"gamma": 0.0}),
        ("attention", {"num_slots": 0}),
        ("attention", {"var_threshold": -1.0}),
        ("attention", {"threshold": 0.0}),
        ("attention", {"ramp_from": 0.0}),
        ("attention", {"eps_var": 0.0}),
        ("attention", {"gamma": 0.0}),
        ("attention", {"dropout": 1.0}),
        ("attention", {"trained": -1e-4}),
    ],
)
def test_option_of_a_surrogate_out_of_range_is_refused_with_the_surrogates_name(
    name: str, options: dict[str, float]
) -> None:
    ((option, value),) = options.items()
    with pytest.raises(UsageError, match=rf"--{name}\.{option.replace('_', '-')} must be .* got {value}"):
        with_options(name, **options).checked()


@pytest.mark.parametrize("reduction", ["conv", "linear0", "linear1.5", "pca8"])
def test_reduction_that_cannot_be_read_is_refused(reduction: str) -> None:
    with pytest.raises(UsageError, match=r"--attention\.reduction takes auto, none, linearN or convN, got"):
        with_options("attention", reduction=reduction).checked()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "none"}, "without a penalty there is nothing to capture, got --lambd 0"),
        ({"lambd": 0.0}, "without a penalty there is nothing to capture, got --lambd 0"),
        ({"injection": "two_pass"}, "takes --injection combined, got two_pass"),
        ({}, "needs a CUDA device, got cpu"),
        ({"surrogate": "none", "defenses": (GAIN,)}, "needs a CUDA device, got cpu"),
    ],
)
def test_capture_of_what_cannot_be_captured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"--capture:? {message}"):
        replace(TrainConfig(capture=True, device="cpu"), **options).checked()


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is a CUDA device here")
def test_capture_on_a_device_chosen_automatically_is_refused_with_the_choice() -> None:
    with pytest.raises(UsageError, match=r"got cpu \(--device auto\)"):
        TrainConfig(capture=True).checked()


@pytest.mark.parametrize("name", ["centroid", "attention"])
def test_triton_on_the_cpu_is_refused_before_anything_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(surrogate=name, backend="triton", device="cpu")
    monkeypatch.setattr(backends, "INTERPRETING", True)
    config.checked()
    monkeypatch.setattr(backends, "INTERPRETING", False)
    with pytest.raises(UsageError, match=r"--backend triton needs a CUDA device, got cpu"):
        config.checked()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1}, "--penalty-from must be at most --epochs 1, or no epoch has the penalty; got 2"),
        ({"warmup_epochs": 21.0}, "--warmup-epochs must be at most --epochs 20, got 21"),
        ({"centralized": True, "defenses": (GAIN,)}, f"--centralized has no cut for --defenses {GAIN}"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**options).checked()


def test_run_without_a_penalty_may_be_shorter_than_its_beginning() -> None:
    TrainConfig(surrogate="none", epochs=1).checked()
    TrainConfig(lambd=0.0, epochs=1).checked()


@pytest.mark.parametrize("name", list(SURROGATES))
def test_weight_and_schedule_are_the_surrogates_own_where_nobody_says(name: str) -> None:
    resolved, member = TrainConfig(surrogate=name).resolved(), SURROGATES[name]
    assert (resolved.lambd, resolved.lambd_schedule) == (member.Options.weight, member.schedule)
    given = TrainConfig(surrogate=name, lambd=3.0, lambd_schedule="rising")
    assert given.resolved() == given


def test_no_penalty_without_weight_or_surrogate() -> None:
    assert TrainConfig().penalized
    assert not TrainConfig(lambd=0.0).penalized
    assert not TrainConfig(surrogate="none").penalized
    assert not TrainConfig(surrogate="none", lambd=3.0).penalized


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            TrainConfig(surrogate="gmm", lambd=8, noise_std=0.025, seed=3),
            "digits-resnet20-mixture-lambd8-noise0.025-seed3",
        ),
        (TrainConfig(), "digits-resnet20-centroid-lambd0.5-noise0.1-seed0"),
        (TrainConfig(surrogate="none"), "digits-resnet20-none-noise0.1-seed0"),
        (with_options("centroid", momentum=0.97), "digits-resnet20-centroid-momentum0.97-lambd0.5-noise0.1-seed0"),
        (
            TrainConfig(surrogate=surrogate(Scale), defenses=(GAIN,), members={"gain": Gain.Options(factor=3.0)}),
            "digits-resnet20-scale-lambd1-gain-factor3.0-noise0.1-seed0",
        ),
        (
            TrainConfig(surrogate="none", data="svhn", arch="vgg11", defenses=("noise",)),
            "svhn-vgg11-none-noise-noise0.1-seed0",
        ),
    ],
)
def test_run_directory_is_named_after_what_tells_runs_apart(config: TrainConfig, name: str) -> None:
    assert config.run_dir == Path("runs") / name


def test_run_directory_that_is_asked_for_is_taken_as_it_is() -> None:
    assert TrainConfig(out="a/b").checked().run_dir == Path("a/b")  # type: ignore[arg-type]


def test_changed_options_name_what_would_change_the_numbers() -> None:
    before = TrainConfig()
    elsewhere = replace(before, device="cpu", backend="eager", profile_steps=3, out=Path("x"))
    assert changed_options(before, elsewhere) == []
    assert changed_options(before, replace(elsewhere, lr=0.1)) == ["--lr (was 0.05, got 0.1)"]


def test_where_a_run_was_before_need_not_be_here() -> None:
    before = TrainConfig(device="cuda:99", capture=True)
    assert changed_options(before, replace(before, device="cpu", capture=False)) == []


def test_options_of_members_change_the_numbers() -> None:
    assert changed_options(TrainConfig(), with_options("centroid", momentum=0.5)) == [
        "--centroid.momentum (was 0.99, got 0.5)"
    ]
    before = TrainConfig(surrogate="none", defenses=(GAIN,))
    assert changed_options(before, replace(before, members={"gain": Gain.Options(weight=1.0)})) == [
        "--gain.weight (was 0.25, got 1.0)"
    ]


def test_another_name_of_a_surrogate_and_options_that_are_its_own_change_nothing() -> None:
    own = replace(with_options("mixture"), lambd=16.0, lambd_schedule="rising")
    assert changed_options(TrainConfig(surrogate="gmm"), own) == []


def test_without_surrogate_it_still_matters_when_the_penalty_begins() -> None:
    # Before it no epoch is the best one, whatever is penalized.
    assert changed_options(TrainConfig(surrogate="none"), TrainConfig(surrogate="none", penalty_from=3)) == [
        "--penalty-from (was 2, got 3)"
    ]


def test_workers_change_the_numbers_of_a_run_with_augmentation_only() -> None:
    plain, augmented = TrainConfig(data="folder"), TrainConfig(data="folder", augment=True)
    assert changed_options(plain, replace(plain, num_workers=2)) == []
    assert changed_options(augmented, replace(augmented, num_workers=2)) == [
        "--num-workers (was 0, got 2; with --augment, worker processes draw other random numbers)"
    ]


def test_run_without_its_penalty_differs_in_nothing_else() -> None:
    before = replace(with_options("mixture", clusters=3), defenses=(GAIN,), lr=0.1, lambd=2.0, backend="eager")
    before = replace(before, members={**before.members, "gain": Gain.Options(weight=1.0)})
    expected = TrainConfig(surrogate="none", defenses=(GAIN,), lr=0.1, members={"gain": Gain.Options(weight=1.0)})
    assert without_penalty(before) == expected
