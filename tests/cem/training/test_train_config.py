"""Options of a run: defaults, ranges, and the way to YAML and back."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml

from cem.data import DATASETS
from cem.options import ConfigError, resolve_device
from cem.surrogates import SURROGATES
from cem.surrogates.build import ORIGINAL
from cem.training.config import TrainConfig, changed_options
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
    noise_std=0.025,
    centralized=True,
    surrogate="gmm",
    lambd=8.0,
    lambd_schedule="constant",
    penalty_from=5,
    var_threshold=0.125,
    measure="enhanced",
    penalty="hinge",
    hinge="softplus",
    threshold="ramp",
    threshold_value=0.01,
    threshold_quantile=0.25,
    eps_var=1e-6,
    gamma=0.02,
    anchor=0.9,
    memory_bank=64,
    tokens="spatial",
    reduce="conv1x1",
    num_slots=4,
    surrogate_policy="separate",
    surrogate_objective="likelihood",
    surrogate_lr=3e-5,
    reduce_dim=0,
    gmm_fit="full",
    injection="two_pass",
    backend="eager",
    capture=True,
    epochs=240,
    batch_size=64,
    lr=0.01,
    momentum=0.5,
    weight_decay=1e-6,
    warmup_epochs=2.5,
    amp=True,
    init_from=Path("runs/before"),
    seed=7,
    device="cpu",
    out=Path("runs/here"),
    profile_steps=5,
)


def test_defaults_are_valid() -> None:
    TrainConfig().validate()


@pytest.mark.parametrize(("name", "offered"), [("data", DATASETS), ("surrogate", SURROGATES), ("backend", BACKENDS)])
def test_choices_are_those_that_the_library_offers(name: str, offered: tuple[str, ...]) -> None:
    assert get_args(get_type_hints(TrainConfig)[name]) == offered


def test_yaml_gives_back_every_option(tmp_path: Path) -> None:
    default = TrainConfig()
    unchanged = [f.name for f in fields(TrainConfig) if getattr(EVERY_OPTION, f.name) == getattr(default, f.name)]
    assert unchanged == [], "the example must differ from the default in every option"
    EVERY_OPTION.to_yaml(tmp_path / "config.yaml")
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == EVERY_OPTION


def test_yaml_gives_back_the_defaults(tmp_path: Path) -> None:
    TrainConfig().to_yaml(tmp_path / "config.yaml")
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == TrainConfig()


def test_options_absent_from_yaml_keep_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("epochs: 3\n")
    assert TrainConfig.from_yaml(tmp_path / "short.yaml") == TrainConfig(epochs=3)


def test_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("lambda: 3\n")
    with pytest.raises(ConfigError, match=r"typo\.yaml: unknown option lambda; .*lambd"):
        TrainConfig.from_yaml(tmp_path / "typo.yaml")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 2.5, "a whole number"),
        ("epochs", True, "a whole number"),
        ("lr", "fast", "a number"),
        ("lr", True, "a number"),
        ("augment", 1, "true or false"),
        ("arch", 18, "text"),
        ("data_root", 3, "a path"),
        ("surrogate", "kmeans", "one of attention, gmm, none"),
        ("train_size", "all", "a whole number or nothing"),
        ("seed", None, "a whole number"),
    ],
)
def test_wrong_type_is_refused_with_option_and_value(name: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")) as error:
        TrainConfig.from_dict({name: value})
    assert expected in str(error.value)
    assert repr(value) in str(error.value)


def test_scientific_notation_without_point_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("surrogate_lr: 1e-4\n")
    assert isinstance(yaml.safe_load("1e-4"), str), "the reason for this test"
    assert TrainConfig.from_yaml(tmp_path / "config.yaml").surrogate_lr == 1e-4


@pytest.mark.parametrize("content", ["- epochs\n", "epochs\n", "", "a: [1\n"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        TrainConfig.from_yaml(tmp_path / "config.yaml")


def test_missing_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read options from"):
        TrainConfig.from_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("train_size", 0),
        ("cut_layer", 0),
        ("lambd", -1.0),
        ("lambd", float("nan")),
        ("noise_std", float("inf")),
        ("reduce_dim", -1),
        ("memory_bank", -1),
        ("anchor", 1.0),
        ("anchor", -0.1),
        ("num_slots", 0),
        ("threshold_value", 0.0),
        ("threshold_quantile", 1.0),
        ("eps_var", 0.0),
        ("gamma", 0.0),
        ("lr", 0.0),
        ("surrogate_lr", -1e-4),
        ("momentum", 1.0),
        ("warmup_epochs", 1000.0),
        ("seed", 2**32),
        ("num_workers", -1),
        ("profile_steps", -1),
    ],
)
def test_value_out_of_range_is_refused_with_option_and_value(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be .* got {value}"):
        replace(TrainConfig(), **{name: value}).validate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "gmm"}, "only the attention surrogate can be captured, got gmm"),
        ({"surrogate": "none"}, "only the attention surrogate can be captured, got none"),
        ({"anchor": 0.0, "num_slots": 8}, "takes --measure enhanced, or --measure slots with one slot"),
        ({"lambd": 0.0}, "without a penalty there is nothing to capture, got --lambd 0"),
        ({"injection": "two_pass"}, "takes --injection combined, got two_pass"),
        ({"backend": "eager", **ORIGINAL}, "takes --backend auto or triton, got eager: .* waits"),
        ({"backend": "eager", "anchor": 0.0}, "takes --backend auto or triton, got eager: .* waits"),
        ({"backend": "reference"}, "takes --backend auto, triton or eager, got reference: .* waits"),
        ({}, "needs a CUDA device, got cpu"),
    ],
)
def test_capture_of_what_cannot_be_captured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"--capture:? {message}"):
        replace(TrainConfig(capture=True, device="cpu"), **options).validate()


def test_an_objective_of_its_own_takes_the_combined_injection() -> None:
    with pytest.raises(ConfigError, match="--surrogate-objective likelihood takes --injection combined, got two_pass"):
        TrainConfig(num_slots=8, anchor=0.0, surrogate_objective="likelihood", injection="two_pass").validate()


@pytest.mark.parametrize(
    "options",
    [
        {"surrogate_policy": "separate"},
        {"surrogate_objective": "likelihood"},
        {"reduce_dim": 16},
        {"reduce": "conv1x1", "reduce_dim": 4},
    ],
)
def test_options_of_parameters_are_refused_where_there_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--measure slots --num-slots 1 has no parameters"):
        TrainConfig(**options).validate()


@pytest.mark.parametrize("options", [{"measure": "enhanced"}, {"num_slots": 8}, {"memory_bank": 64}])
def test_what_running_centroids_do_not_go_with_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"--anchor goes with .* give --anchor 0, for the original --preset seed, got --anchor 0\.99"
    ):
        TrainConfig(**options).validate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"noise_std": 0.0},
            "counts what crosses the noise, so --noise-std must be above 0, got 0; without noise give",
        ),
        (
            {"threshold": "ramp"},
            "has neither --threshold nor --hinge: give --penalty hinge with them, got --threshold ramp",
        ),
        ({"hinge": "softplus"}, "has neither .* got --threshold coupled --hinge softplus"),
    ],
)
def test_entropy_without_noise_and_with_what_it_does_not_have_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"--penalty entropy {message}"):
        TrainConfig(**options).validate()
    TrainConfig(**options, penalty="hinge").validate()
    TrainConfig(**options, surrogate="gmm").validate()
    TrainConfig(**options, lambd=0.0).validate()


@pytest.mark.parametrize("options", [{}, ORIGINAL, {"anchor": 0.0}])
def test_triton_on_the_cpu_is_refused_before_anything_is_built(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(backend="triton", device="cpu", **options)
    config.validate()  # the tests run Triton's interpreter
    monkeypatch.setattr(backends, "INTERPRETING", False)
    with pytest.raises(ConfigError, match=r"--backend triton needs a CUDA device, got cpu"):
        config.validate()


def test_triton_is_refused_for_what_has_no_kernels() -> None:
    with pytest.raises(ConfigError, match=r"no kernel for the variance around several slots, .* give --backend auto"):
        TrainConfig(backend="triton", device="cpu", num_slots=8, anchor=0.0).validate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "conv1x1"}, "--reduce conv1x1 needs --reduce-dim, a number of channels, got None"),
        (
            {"measure": "slots", "threshold": "quantile"},
            "--threshold quantile follows the variances of classes, .* give --measure enhanced",
        ),
        (
            {"measure": "slots", "surrogate_policy": "separate"},
            "--surrogate-policy separate give --surrogate-objective likelihood or reconstruction, got penalty",
        ),
    ],
)
def test_what_the_surrogate_cannot_be_built_with_is_refused_by_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{**ORIGINAL, **options}).validate()


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is a CUDA device here")
def test_capture_on_a_device_chosen_automatically_is_refused_with_the_choice() -> None:
    with pytest.raises(ConfigError, match=r"got cpu \(--device auto\)"):
        TrainConfig(capture=True).validate()


def test_validate_turns_text_into_the_path_it_names() -> None:
    config = TrainConfig(out="runs/a")  # type: ignore[arg-type]
    config.validate()
    assert config.run_dir == Path("runs/a")


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x", ""])
def test_device_that_cannot_be_used_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="--device"):
        resolve_device(device)


def test_cuda_device_beyond_the_last_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"--device cuda:99: PyTorch sees {torch.cuda.device_count()} CUDA"):
        resolve_device("cuda:99")


def test_run_directory_is_named_after_what_tells_runs_apart() -> None:
    config = TrainConfig(surrogate="gmm", lambd=8, noise_std=0.025, seed=3)
    assert config.run_dir == Path("runs/digits-resnet20-gmm-lambd8-noise0.025-seed3")


def test_no_penalty_without_weight_or_surrogate() -> None:
    assert TrainConfig().penalized
    assert not TrainConfig(lambd=0.0).penalized
    assert not TrainConfig(surrogate="none").penalized


def test_changed_options_name_what_would_change_the_numbers() -> None:
    before = TrainConfig()
    elsewhere = replace(before, device="cpu", backend="eager", capture=True, profile_steps=3, out=Path("x"))
    assert changed_options(before, elsewhere) == []
    assert changed_options(before, replace(elsewhere, lr=0.1)) == ["--lr (was 0.05, got 0.1)"]


@pytest.mark.parametrize(
    ("surrogate", "options"),
    [
        ("none", {"measure": "enhanced", "var_threshold": 0.2, "gmm_fit": "full", "lambd": 2.0}),
        ("gmm", {"measure": "enhanced", "anchor": 0.5, "num_slots": 4, "reduce_dim": 8}),
        ("attention", {"gmm_fit": "full"}),
    ],
)
def test_options_that_a_surrogate_does_not_have_change_no_numbers(surrogate: Any, options: dict[str, Any]) -> None:
    plain = TrainConfig(surrogate=surrogate)
    assert changed_options(plain, replace(plain, **options)) == []


def test_options_that_a_surrogate_has_change_its_numbers() -> None:
    # Before it no epoch is the best one, whatever is penalized.
    assert changed_options(TrainConfig(surrogate="none"), TrainConfig(surrogate="none", penalty_from=3)) != []
    for surrogate in ("gmm", "attention"):
        plain = TrainConfig(surrogate=surrogate)
        assert changed_options(plain, replace(plain, var_threshold=0.2)) == ["--var-threshold (was 0.1, got 0.2)"]
        assert changed_options(plain, replace(plain, lambd=2.0)) != []
    assert changed_options(TrainConfig(), TrainConfig(anchor=0.5)) == ["--anchor (was 0.99, got 0.5)"]


def test_workers_change_the_numbers_of_a_run_with_augmentation_only() -> None:
    plain, augmented = TrainConfig(data="folder"), TrainConfig(data="folder", augment=True)
    assert changed_options(plain, replace(plain, num_workers=2)) == []
    assert changed_options(augmented, replace(augmented, num_workers=2)) == [
        "--num-workers (was 0, got 2; with --augment, worker processes draw other random numbers)"
    ]
