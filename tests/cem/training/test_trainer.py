"""The trainer: what it trains, what it measures, and what it leaves behind."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cem.models import SplitModel
from cem.surrogates import Surrogate
from cem.training import ConfigError, TrainConfig, Trainer, TrainingDiverged, load_run, read_summary, train
from cem.training import checkpoint as checkpoints
from cem.training import state as state_module
from cem.training import trainer as trainer_module
from cem.training.evaluation import accuracy, collect_features
from cem.training.runlog import COLUMNS
from cem.training.runs import new_run_dir, peak_memory

MakeConfig = Callable[..., TrainConfig]


class Scale(Surrogate):
    """A penalty with a parameter, that pulls features to zero and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor, labels: Tensor, unique_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        size = (features * (1 + 0.1 * torch.rand_like(features))).square().mean()
        return self.weight.square() * size, size.detach()


class Watched(Scale):
    """Keeps what it is told of the epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[float] = []

    def begin_epoch(self, progress: float) -> None:
        self.told.append(progress)


class Refitted(Scale):
    """A penalty that records its refits."""

    needs_refit = True

    def __init__(self) -> None:
        super().__init__()
        self.refits: list[tuple[Tensor, Tensor]] = []

    def refit(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        torch.rand(())  # a draw that must not shift the run's
        self.refits.append((features, labels))
        return {"information_nats": 123.4}


class Broken(Scale):
    """A penalty that is never finite."""

    def forward(self, features: Tensor, labels: Tensor, unique_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (features * torch.nan).sum(), features.detach().mean()


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures have tests of their own, and t-SNE takes longer than training here."""
    monkeypatch.setattr(trainer_module, "draw_tsne", lambda *_, **__: None)
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_, **__: None)


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    def make(name: str = "run", **options: Any) -> TrainConfig:
        small = TrainConfig(train_size=96, batch_size=32, epochs=4, penalty_from=1, noise_std=0.1, device="cpu")
        return replace(small, out=tmp_path / name, **options)

    return make


@pytest.fixture
def use_surrogate(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Surrogate]], list[Surrogate]]:
    """Let the trainer build the given surrogate, and list those that it built."""

    def use(kind: type[Surrogate]) -> list[Surrogate]:
        built: list[Surrogate] = []

        def build(*_: Any, **__: Any) -> Surrogate:
            built.append(kind())
            return built[-1]

        monkeypatch.setattr(state_module, "build_surrogate", build)
        return built

    return use


def rows(run_dir: Path) -> list[dict[str, float]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def weights(run_dir: Path, *parts: str) -> list[Tensor]:
    content = checkpoints.load(run_dir / "last.pt")
    return [tensor for part in parts for tensor in content[part].values()]


def log(run_dir: Path) -> str:
    return (run_dir / "train.log").read_text()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, pictures and all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_module, "build_surrogate", lambda *_, **__: Scale())
        out = tmp_path_factory.mktemp("runs") / "a"
        return train(TrainConfig(train_size=200, batch_size=32, epochs=4, device="cpu", out=out))


def board(run_dir: Path) -> dict[str, list[int]]:
    """Steps of every scalar that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_run_directory_holds_every_file(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert names == {
        "config.yaml",
        "metrics.csv",
        "summary.json",
        "curves.png",
        "tsne.png",
        "train.log",
        "last.pt",
        "best.pt",
    }
    assert len(list(run_dir.glob("events.out.tfevents.*"))) == 1


def test_config_is_accepted_back_and_does_not_claim_the_directory_again(run_dir: Path) -> None:
    config = TrainConfig.from_yaml(run_dir / "config.yaml")
    assert config == TrainConfig(train_size=200, batch_size=32, epochs=4, device="cpu").resolved()


def test_metrics_have_a_row_per_epoch_and_the_named_columns(run_dir: Path) -> None:
    table = rows(run_dir)
    assert [row["epoch"] for row in table] == [1, 2, 3, 4]
    assert tuple(table[0]) == COLUMNS


def test_train_loss_is_the_weighted_sum_of_its_terms(run_dir: Path) -> None:
    for row in rows(run_dir):
        expected = row["cross_entropy"] + row["lambda_eff"] * row["rob_loss"]
        assert row["train_loss"] == pytest.approx(expected, rel=1e-12)


def test_metrics_follow_the_schedules(run_dir: Path) -> None:
    table = rows(run_dir)
    assert [row["lr"] for row in table] == pytest.approx([0.05, 0.01, 0.002, 0.0004])
    assert [row["lambda_eff"] for row in table] == [0.0, 0.5, 0.5, 0.5]  # from epoch 2


def test_a_rising_weight_follows_the_learning_rate(make_config: MakeConfig) -> None:
    config = make_config(epochs=4, lambd=16.0, lambd_schedule="rising", penalty_from=2)
    Trainer(config).fit()
    assert [row["lambda_eff"] / 16 for row in rows(config.run_dir)] == pytest.approx([0.0, 0.1, 0.5, 1.0])


@pytest.mark.parametrize(("surrogate", "own"), [("attention", [0.0, 0.5]), ("gmm", [0.0, 8.0]), ("none", [0.0, 0.0])])
def test_every_surrogate_has_a_weight_and_a_schedule_of_its_own(
    surrogate: str, own: list[float], make_config: MakeConfig
) -> None:
    config = make_config(surrogate=surrogate, epochs=2, penalty_from=2)
    Trainer(config).fit()
    assert [row["lambda_eff"] for row in rows(config.run_dir)] == own
    assert TrainConfig.from_yaml(config.run_dir / "config.yaml") == replace(config.resolved(), out=None)


def test_surrogate_time_is_part_of_the_time(run_dir: Path) -> None:
    first, *others = rows(run_dir)
    assert first["surrogate_seconds"] == 0
    assert all(0 < row["surrogate_seconds"] < row["seconds"] for row in others)


def test_summary_has_exactly_the_named_keys(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary) == {
        "test_accuracy",
        "best_epoch",
        "epochs",
        "train_seconds",
        "surrogate_seconds",
        "rob_loss",
        "intra_mse",
        "parameters",
        "skipped_steps",
        "peak_memory_bytes",
        "device",
        "versions",
    }
    assert set(summary["parameters"]) == {"encoder", "server", "surrogate"}
    assert {"python", "torch", "triton", "numpy", "cem"} <= set(summary["versions"])


def test_summary_agrees_with_the_metrics(run_dir: Path) -> None:
    summary, table = read_summary(run_dir), rows(run_dir)
    assert summary is not None
    best = table[summary["best_epoch"] - 1]
    assert (summary["rob_loss"], summary["intra_mse"]) == (best["rob_loss"], best["intra_mse"])
    assert summary["train_seconds"] == pytest.approx(sum(row["seconds"] for row in table))
    assert (summary["epochs"], summary["device"], summary["skipped_steps"]) == (4, "cpu", 0)


def test_best_is_chosen_under_the_strongest_penalty(run_dir: Path) -> None:
    assert checkpoints.load(run_dir / "best.pt")["best_epoch"] == 4


def test_loaded_model_has_the_accuracy_of_the_summary(run_dir: Path) -> None:
    config, model = load_run(run_dir, device="cpu")
    test = state_module.TrainState(config).test
    summary = read_summary(run_dir)
    assert summary is not None
    assert accuracy(model, test, torch.device("cpu"), config.seed) == summary["test_accuracy"]
    assert not model.training


def test_tensorboard_has_every_column(run_dir: Path) -> None:
    assert set(board(run_dir)) == set(COLUMNS) - {"epoch"}


@pytest.mark.parametrize(("amp", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_accuracy_is_computed_in_bfloat16_where_asked(amp: bool, dtype: torch.dtype) -> None:
    model = SplitModel(nn.Flatten(), nn.Linear(16, 3), image_shape=(1, 4, 4))
    seen: list[torch.dtype] = []
    model.server.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    assert 0 <= accuracy(model, [(torch.rand(5, 1, 4, 4), torch.arange(5) % 3)], torch.device("cpu"), 0, amp=amp) <= 1
    assert seen == [dtype]


def test_best_epoch_has_the_best_validation_accuracy_among_equally_penalized(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", epochs=8)
    train(config)
    late = [row for row in rows(config.run_dir) if row["epoch"] > 6]
    summary = read_summary(config.run_dir)
    assert summary is not None
    assert summary["best_epoch"] == max(late, key=lambda row: row["val_accuracy"])["epoch"]


def test_training_learns(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", epochs=8, train_size=400)
    train(config)
    summary = read_summary(config.run_dir)
    assert summary is not None
    assert summary["test_accuracy"] > 0.8


def test_training_under_amp_learns_and_its_weights_are_fp32(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", epochs=8, train_size=400, amp=True)
    train(config)
    summary = read_summary(config.run_dir)
    assert summary is not None
    assert summary["test_accuracy"] > 0.8
    assert not any(weight.dtype == torch.bfloat16 for weight in weights(config.run_dir, "encoder", "server"))


def test_same_seed_gives_the_same_numbers(make_config: MakeConfig) -> None:
    for name in ("a", "b"):
        train(make_config(name, surrogate="none", epochs=2))
    a, b = (make_config(name).run_dir for name in ("a", "b"))
    assert all(map(torch.equal, weights(a, "encoder", "server"), weights(b, "encoder", "server")))


def test_another_seed_gives_other_numbers(make_config: MakeConfig) -> None:
    for seed in (0, 1):
        train(make_config(str(seed), surrogate="none", epochs=1, seed=seed))
    a, b = (make_config(name).run_dir for name in ("0", "1"))
    assert not torch.equal(weights(a, "encoder")[-1], weights(b, "encoder")[-1])


def test_constructing_another_trainer_in_between_changes_nothing(make_config: MakeConfig) -> None:
    train(make_config("a", surrogate="none", epochs=1))
    trainer = Trainer(make_config("b", surrogate="none", epochs=1))
    Trainer(make_config("c", surrogate="none", seed=5))
    trainer.fit()
    a, b = (make_config(name).run_dir for name in ("a", "b"))
    assert all(map(torch.equal, weights(a, "encoder"), weights(b, "encoder")))


def test_training_without_evaluation_gives_the_same_weights(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config("a", surrogate="none", epochs=2))

    monkeypatch.setattr(trainer_module, "accuracy", lambda *_, **__: 0.5)
    train(make_config("b", surrogate="none", epochs=2))
    a, b = (make_config(name).run_dir for name in ("a", "b"))
    assert all(map(torch.equal, weights(a, "encoder", "server"), weights(b, "encoder", "server")))


def test_evaluation_leaves_the_mode_and_sees_the_same_noise_again(make_config: MakeConfig) -> None:
    state = state_module.TrainState(make_config(surrogate="none"))
    state.model.train()
    first, _ = collect_features(state.model, state.val, state.device, 0, noisy=True)
    again, _ = collect_features(state.model, state.val, state.device, 0, noisy=True)
    clean, _ = collect_features(state.model, state.val, state.device, 0, noisy=False)
    assert torch.equal(first, again)
    assert (first - clean).std().item() == pytest.approx(0.1, rel=0.05)
    assert state.model.training


def test_steps_with_broken_penalty_train_exactly_as_without_one(
    make_config: MakeConfig, use_surrogate: Callable[[type[Surrogate]], list[Surrogate]]
) -> None:
    use_surrogate(Broken)
    broken, none = make_config("broken", epochs=2), make_config("none", epochs=2, surrogate="none")
    train(broken)
    train(none)
    parts = ("encoder", "server")
    assert all(map(torch.equal, weights(broken.run_dir, *parts), weights(none.run_dir, *parts)))


def test_steps_with_broken_penalty_are_counted_and_warned_about_once(
    make_config: MakeConfig, use_surrogate: Callable[[type[Surrogate]], list[Surrogate]]
) -> None:
    use_surrogate(Broken)
    config = make_config(epochs=3)
    train(config)
    summary = read_summary(config.run_dir)
    assert summary is not None
    assert summary["skipped_steps"] == 9
    assert log(config.run_dir).count("was not finite in 3 steps of epoch 1") == 1
    assert log(config.run_dir).count("not finite") == 1
    assert all(row["rob_loss"] == 0 for row in rows(config.run_dir))


@pytest.mark.parametrize("options", [{"surrogate": "none"}, {"lambd": 0.0}])
def test_run_without_penalty_builds_no_surrogate(
    make_config: MakeConfig,
    use_surrogate: Callable[[type[Surrogate]], list[Surrogate]],
    options: dict[str, Any],
) -> None:
    built = use_surrogate(Refitted)
    config = make_config(epochs=1, **options)
    train(config)
    assert built == []
    assert rows(config.run_dir)[0]["surrogate_seconds"] == 0


@pytest.mark.parametrize(("policy", "learns"), [("frozen", False), ("separate", True), ("shared", True)])
def test_policy_decides_whether_the_surrogate_learns(
    make_config: MakeConfig,
    use_surrogate: Callable[[type[Surrogate]], list[Surrogate]],
    policy: Any,
    learns: bool,
) -> None:
    use_surrogate(Scale)
    config = make_config(epochs=1, measure="enhanced", anchor=0.0, surrogate_policy=policy)
    train(config)
    assert (weights(config.run_dir, "surrogate")[0].item() != 1.0) is learns


def test_separate_policy_trains_with_its_own_adam(
    make_config: MakeConfig, use_surrogate: Callable[[type[Surrogate]], list[Surrogate]]
) -> None:
    use_surrogate(Scale)
    state = state_module.TrainState(make_config(surrogate_policy="separate", surrogate_lr=3e-4))
    adam = state.optimizers["surrogate"]
    assert isinstance(adam, torch.optim.Adam)
    assert adam.param_groups[0]["lr"] == 3e-4
    assert adam.param_groups[0]["params"] == list(state.parts()["surrogate"].parameters())


def test_the_surrogate_is_told_how_far_the_penalized_epochs_have_come(
    make_config: MakeConfig, use_surrogate: Callable[[type[Surrogate]], list[Surrogate]]
) -> None:
    built = use_surrogate(Watched)
    train(make_config(epochs=4, penalty_from=2))
    assert isinstance(built[0], Watched)
    assert built[0].told == [0.0, 0.5, 1.0]


def test_refit_sees_the_whole_training_set_clean_after_every_epoch(
    make_config: MakeConfig, use_surrogate: Callable[[type[Surrogate]], list[Surrogate]]
) -> None:
    built = use_surrogate(Refitted)
    trainer = Trainer(make_config(epochs=2))
    trainer.fit()
    (surrogate,) = built
    assert isinstance(surrogate, Refitted)
    assert [features.shape for features, _ in surrogate.refits] == [(96, *trainer.state.model.feature_shape)] * 2
    assert torch.equal(surrogate.refits[0][1], trainer.state.data.train.labels)
    # The last epoch is the best here, so the trained model is the one that was refitted on.
    clean, _ = collect_features(trainer.state.model, trainer.state.plain_train, torch.device("cpu"), 0, noisy=False)
    assert trainer.state.best_epoch == 2
    assert torch.equal(surrogate.refits[1][0], clean)


def test_monitors_of_a_refit_reach_tensorboard_and_the_log(
    make_config: MakeConfig, use_surrogate: Callable[[type[Surrogate]], list[Surrogate]]
) -> None:
    use_surrogate(Refitted)
    config = make_config(epochs=2)
    train(config)
    assert board(config.run_dir)["refit/information_nats"] == [1, 2]
    assert log(config.run_dir).count("INFO refit: information_nats 123.4\n") == 2


def test_refit_leaves_the_runs_random_numbers_alone(
    make_config: MakeConfig, use_surrogate: Callable[[type[Surrogate]], list[Surrogate]]
) -> None:
    use_surrogate(Scale)
    train(make_config("plain", epochs=2))
    use_surrogate(Refitted)
    train(make_config("refitted", epochs=2))
    a, b = (make_config(name).run_dir for name in ("plain", "refitted"))
    assert all(map(torch.equal, weights(a, "encoder"), weights(b, "encoder")))


def test_two_pass_trains_as_combined_does(
    make_config: MakeConfig, use_surrogate: Callable[[type[Surrogate]], list[Surrogate]]
) -> None:
    use_surrogate(Scale)
    for injection in ("combined", "two_pass"):
        train(make_config(injection, epochs=1, injection=injection))
    a, b = (rows(make_config(name).run_dir)[0] for name in ("combined", "two_pass"))
    for name in ("cross_entropy", "rob_loss", "intra_mse"):
        assert a[name] == pytest.approx(b[name], rel=1e-4)


def test_warm_start_takes_the_weights_and_the_full_penalty(make_config: MakeConfig) -> None:
    first = make_config("first", surrogate="none", epochs=2)
    train(first)
    second = Trainer(make_config("second", surrogate="none", lambd=16.0, epochs=1, init_from=first.run_dir))
    best = checkpoints.load(first.run_dir / "best.pt")["encoder"]
    assert all(torch.equal(second.state.model.encoder.state_dict()[name], best[name]) for name in best)
    second.fit()
    assert rows(second.run_dir)[0]["lambda_eff"] == 16.0


def test_warm_start_from_another_architecture_is_refused_before_anything_is_written(
    make_config: MakeConfig,
) -> None:
    first = make_config("first", surrogate="none", epochs=1)
    train(first)
    other = make_config("other", surrogate="none", arch="vgg11", image_size=32, init_from=first.run_dir)
    with pytest.raises(checkpoints.CheckpointError, match=r"best\.pt does not fit this run's encoder"):
        train(other)
    assert not other.run_dir.exists()


def test_centralized_model_trains(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config(surrogate="none", epochs=1, centralized=True))
    assert trainer.state.model.feature_shape == (64,)
    trainer.fit()


def test_batch_that_does_not_divide_the_data_counts_every_sample(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", epochs=1, train_size=70)
    train(config)
    assert rows(config.run_dir)[0]["train_accuracy"] * 70 == pytest.approx(
        round(rows(config.run_dir)[0]["train_accuracy"] * 70)
    )


def test_diverged_training_says_so_and_keeps_the_last_good_epoch(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_config(surrogate="none", epochs=2))
    combined = trainer_module.INJECTIONS["combined"]

    def diverge(*args: Any, **options: Any) -> Any:
        step = combined(*args, **options)
        return replace(step, cross_entropy=step.cross_entropy * torch.nan) if trainer.state.history else step

    monkeypatch.setitem(trainer_module.INJECTIONS, "combined", diverge)
    with pytest.raises(TrainingDiverged, match=r"cross-entropy of epoch 2 is nan.*--lr"):
        trainer.fit()
    assert len(checkpoints.load(trainer.run_dir / "last.pt")["history"]) == 1


@pytest.mark.parametrize("broken", ["weight", "running_var"])
def test_model_that_blew_up_in_its_last_step_is_not_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    trainer = Trainer(make_config(surrogate="none", epochs=2))
    combined = trainer_module.INJECTIONS["combined"]
    name, tensor = next(item for item in trainer.state.model.state_dict().items() if item[0].endswith(broken))
    steps: list[int] = []

    def blow_up(*args: Any, **options: Any) -> Any:
        step = combined(*args, **options)
        steps.append(1)
        if len(steps) == 6:  # the last of epoch 2, whose cross-entropy is finite
            tensor.fill_(torch.inf)
        return step

    monkeypatch.setitem(trainer_module.INJECTIONS, "combined", blow_up)
    with pytest.raises(TrainingDiverged, match=rf"after epoch 2 the model's {name} is not finite.*--lr"):
        trainer.fit()
    assert len(checkpoints.load(trainer.run_dir / "last.pt")["history"]) == 1
    assert checkpoints.load(trainer.run_dir / "best.pt")["best_epoch"] == 1


def test_features_that_are_not_finite_never_reach_a_refit(
    make_config: MakeConfig,
    use_surrogate: Callable[[type[Surrogate]], list[Surrogate]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = use_surrogate(Refitted)
    infinite = torch.full((96, 2), torch.inf), torch.zeros(96, dtype=torch.int64)
    monkeypatch.setattr(trainer_module, "collect_features", lambda *_, **__: infinite)
    with pytest.raises(TrainingDiverged, match="after epoch 1 features are not finite"):
        train(make_config(epochs=1))
    assert isinstance(built[0], Refitted)
    assert built[0].refits == []


def test_divergence_is_an_error_line_of_the_log(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", epochs=1, lr=1e30, warmup_epochs=0)
    with pytest.raises(TrainingDiverged) as error:
        train(config)
    assert f"ERROR {error.value}\n" in log(config.run_dir)
    assert "Traceback" not in log(config.run_dir)


def test_other_errors_leave_their_traceback_in_the_log(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(trainer_module.INJECTIONS, "combined", fail)
    config = make_config(surrogate="none", epochs=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config)
    assert "Traceback" in log(config.run_dir)
    assert "RuntimeError: out of memory" in log(config.run_dir)


def test_lone_last_sample_does_not_stop_batch_normalization(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none", arch="vgg11_bn", train_size=5, batch_size=4, epochs=1)
    train(config)  # its maps shrink to one pixel
    assert read_summary(config.run_dir) is not None


def test_failed_picture_is_logged_with_its_traceback_and_costs_nothing_else(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(trainer_module, "draw_curves", fail)
    config = make_config(surrogate="none", epochs=1)
    train(config)
    assert "cannot draw curves.png" in log(config.run_dir)
    assert "RuntimeError: no fonts" in log(config.run_dir)
    assert read_summary(config.run_dir) is not None


def test_warning_raised_while_building_reaches_the_log(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: Any, **__: Any) -> Surrogate:
        warnings.warn("the threshold is swamped", UserWarning, stacklevel=1)
        return Scale()

    monkeypatch.setattr(state_module, "build_surrogate", build)
    config = make_config(epochs=1)
    train(config)
    assert log(config.run_dir).count("the threshold is swamped") == 1


def test_run_directory_that_is_not_empty_is_refused(make_config: MakeConfig) -> None:
    config = make_config(surrogate="none")
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not empty: choose another --out"):
        Trainer(config)
    assert [path.name for path in config.run_dir.iterdir()] == ["thesis.tex"]


def test_automatic_run_directory_takes_the_first_free_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig()
    assert new_run_dir(config) == config.run_dir
    for taken in ("", "-2", "-4"):
        path = config.run_dir.with_name(config.run_dir.name + taken)
        path.mkdir(parents=True)
        (path / "last.pt").touch()
    assert new_run_dir(config) == config.run_dir.with_name(f"{config.run_dir.name}-3")


def test_automatic_run_directory_that_is_empty_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TrainConfig().run_dir.mkdir(parents=True)
    assert new_run_dir(TrainConfig()) == TrainConfig().run_dir


def test_wrong_options_leave_no_directory_behind(make_config: MakeConfig) -> None:
    config = make_config(arch="resnet21")
    with pytest.raises(ValueError, match="resnet21"):
        train(config)
    assert not config.run_dir.exists()


def test_penalty_begins_in_the_epoch_it_is_asked_for(
    make_config: MakeConfig, use_surrogate: Callable[[type[Surrogate]], list[Surrogate]]
) -> None:
    use_surrogate(Scale)
    late = rows(train(make_config("late", penalty_from=3)))
    plain = rows(train(make_config("plain", surrogate="none")))
    assert [row["lambda_eff"] > 0 for row in late] == [False, False, True, True]
    assert [row["rob_loss"] > 0 for row in late] == [False, False, True, True]
    assert [row["cross_entropy"] for row in late[:2]] == [row["cross_entropy"] for row in plain[:2]]


def test_a_constant_weight_is_there_in_every_epoch_with_a_penalty(make_config: MakeConfig) -> None:
    config = make_config(epochs=5, lambd=3.0, lambd_schedule="constant", penalty_from=2)
    Trainer(config).fit()
    assert [row["lambda_eff"] for row in rows(config.run_dir)] == [0.0, 3.0, 3.0, 3.0, 3.0]


def test_the_best_epoch_is_a_late_one_under_a_constant_weight_too(make_config: MakeConfig) -> None:
    config = make_config(epochs=8, lambd=0.1, lambd_schedule="constant")
    summary = Trainer(config).fit()
    late = rows(config.run_dir)[6:]
    assert summary["best_epoch"] == max(late, key=lambda row: row["val_accuracy"])["epoch"]


def test_every_surrogate_chooses_its_best_epoch_among_the_penalized_ones(make_config: MakeConfig) -> None:
    # One epoch has the penalty, so it is chosen, however well the ones before it did.
    summary = Trainer(make_config(surrogate="none", penalty_from=4)).fit()
    assert summary["best_epoch"] == 4


def test_surrogates_begin_from_the_same_weights_and_random_numbers() -> None:
    none, *others = (
        state_module.TrainState(TrainConfig(surrogate=name, train_size=64, device="cpu"))
        for name in ("none", "gmm", "attention")
    )
    for other in others:
        for name, tensor in none.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[name], tensor, rtol=0, atol=0)
        assert torch.equal(other.random["torch"], none.random["torch"])


def test_peak_memory_counts_what_was_allocated() -> None:
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(2**27)  # 512 MiB, more than the process can have freed and kept
    after = peak_memory(torch.device("cpu"))
    assert before is not None
    assert after is not None
    assert after >= before
    assert after >= block.nbytes
