"""The split trainer: epochs, and the files of a run directory."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch.profiler import record_function
from tqdm import tqdm

from cem.report.curves import draw_curves
from cem.report.tsne import MAX_SAMPLES, draw_tsne
from cem.surrogates import Surrogate
from cem.training import checkpoint, runs
from cem.training.capture import CapturedPenalty
from cem.training.config import TrainConfig
from cem.training.evaluation import accuracy, collect_features, first_not_finite, isolated_random
from cem.training.injection import INJECTIONS
from cem.training.meter import EpochMeter, Stopwatch
from cem.training.runlog import draw_or_log, epoch_line, run_log, write_json, write_metrics
from cem.training.schedule import epoch_lr, lambda_eff
from cem.training.state import TrainState
from cem.training.tracing import traced_steps


class TrainingDiverged(RuntimeError):
    """The loss, the model or its features are no longer finite; the message names the epoch."""


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train a split model and return its run directory; see :class:`Trainer`."""
    trainer = Trainer(config, resume=resume)
    trainer.fit()
    return trainer.run_dir


class Trainer:
    """Trains one split model and leaves a run directory behind.

    Construction loads the data and builds everything, so what is wrong with the options is known before
    anything is written. :meth:`fit` then trains.

    Args:
        config: the options. When resuming, those of the run: ``TrainConfig.from_yaml(run_dir /
            "config.yaml")``, with ``out`` naming the directory.
        resume: continue the run that lies in ``config.run_dir`` from its last finished epoch. On the same
            device and with the same versions, the numbers are those of a run that never stopped.

    Attributes:
        run_dir: where the run's files lie. Without ``config.out``: ``config.run_dir``, or, for a new run whose
            name is taken, the first free one of ``NAME-2``, ``NAME-3``, ...
        finished: content of ``summary.json`` if the run to resume had reached its end, else ``None``.
        state: data, model, surrogate and optimizers.

    Raises:
        ConfigError: an option cannot be used, ``config.out`` is taken, the surrogate cannot be captured, or, when
            resuming, an option or the data differ.
        CheckpointError: ``last.pt`` or, for a new run, ``init_from`` is missing, damaged or another model's.
        ValueError: data set, architecture or surrogate refuse their options.
        BackendUnavailableError: the surrogate does not have ``config.backend``.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False) -> None:
        config.validate()
        self.config = config = config.resolved()
        self.run_dir = config.run_dir if resume else runs.new_run_dir(config)
        self.finished = runs.read_summary(self.run_dir) if resume else None
        # There is no log to put warnings into before it is certain that there will be a run.
        with warnings.catch_warnings(record=True) as self._warnings:
            self.state = TrainState(config)
        if resume:
            self.state.restore(self.run_dir / "last.pt")
        elif config.init_from is not None:
            self.state.warm_start(config.init_from)
        self._captured = self._capture() if config.capture else None
        self._resumed = resume
        self._warm = config.init_from is not None

    def fit(self) -> dict[str, Any]:
        """Train until the last epoch, score the best one on the test set, draw the pictures.

        Afterwards ``state.model`` has the weights of the best epoch.

        Returns:
            The content of ``summary.json``. A run that was finished already is left as it is.

        Whatever ends training early goes to the log and is handed on.

        Raises:
            KeyboardInterrupt: the log says how to resume.
            TrainingDiverged: the cross-entropy of an epoch, the model after it, or its features for a refit are
                not finite; the epoch before it stays in ``last.pt``.
        """
        if self.finished is not None:
            return self.finished
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with run_log(self.run_dir) as self._log:
            try:
                self._start()
                self._train()
                return self._finish()
            except KeyboardInterrupt:
                self._log.warning(
                    "interrupted; %d of %d epochs are saved. Resume with: %s",
                    len(self.state.history),
                    self.config.epochs,
                    runs.resume_command(self.run_dir),
                )
                raise
            except TrainingDiverged as error:
                self._log.error("%s", error)
                raise
            except Exception:
                self._log.exception("training failed")
                raise

    def _capture(self) -> CapturedPenalty:
        """The surrogate as a graph for full batches. It draws random numbers, which ``_start`` takes back."""
        state = self.state
        assert state.surrogate is not None  # validate() sees to that
        batch_size = min(self.config.batch_size, len(state.data.train))
        return CapturedPenalty(state.surrogate, (batch_size, *state.model.feature_shape), state.device)

    def _start(self) -> None:
        """The first lines of the log, and the files that make a run resumable from its very beginning."""
        config, state = self.config, self.state
        self._log.info(
            "%s: %d images to train on, %d to validate, %d to test; %s, z %s; surrogate %s; %s",
            config.data,
            len(state.data.train),
            len(state.data.val),
            len(state.data.test),
            config.arch,
            "×".join(map(str, state.model.feature_shape)),
            config.surrogate if config.penalized else "none",
            runs.device_name(state.device),
        )
        for warning in self._warnings:
            self._log.warning("%s: %s", warning.category.__name__, warning.message)
        state.rewind_random()
        if self._resumed:
            self._log.info("resuming after epoch %d of %d", len(state.history), config.epochs)
        else:
            # Without ``out``: the directory may be moved, and another run under these options needs another one.
            replace(config, out=None).to_yaml(self.run_dir / "config.yaml")
            state.save(self.run_dir / "last.pt")
        write_metrics(self.run_dir / "metrics.csv", state.history)

    def _train(self) -> None:
        # Importing TensorBoard takes longer than an epoch of a small model; only a run needs it.
        from torch.utils.tensorboard import SummaryWriter

        state, run_dir = self.state, self.run_dir
        done = len(state.history)
        board = SummaryWriter(str(run_dir), purge_step=done + 1 if done else None)
        with board, self._trace() as self._end_of_step:
            for epoch in range(done, self.config.epochs):
                row, monitors = self._epoch(epoch)
                # Validation accuracy alone would choose an early epoch, which the penalty has hardly shaped. The
                # original's rule for its weight says which are late, whatever is trained, so that all runs choose
                # among the same epochs.
                key = (self._rising_share(epoch), row["val_accuracy"])
                best = key > state.best
                state.history.append(row)
                if best:
                    state.best, state.best_epoch = key, epoch + 1
                    state.save(run_dir / "best.pt")
                state.save(run_dir / "last.pt")
                write_metrics(run_dir / "metrics.csv", state.history)
                for name in row.keys() - {"epoch"}:
                    board.add_scalar(name, row[name], epoch + 1)
                for name, value in monitors.items():
                    board.add_scalar(f"refit/{name}", value, epoch + 1)
                self._log.info("%s%s", epoch_line(row, self.config.epochs), "  best" if best else "")
                if monitors:
                    self._log.info("refit: %s", ", ".join(f"{name} {value:.6g}" for name, value in monitors.items()))

    def _trace(self) -> AbstractContextManager[Callable[[], None]]:
        """Trace from the first epoch with a penalty on, where there is one: without it a step is half a step."""
        config, state = self.config, self.state
        done, per_epoch = len(state.history), len(state.train)
        first = max(done, config.penalty_from - 1) if config.penalized else done
        return traced_steps(
            self.run_dir / "trace.json.gz",
            self._log,
            state.device,
            steps=config.profile_steps,
            begin=(first - done) * per_epoch,
            total=(config.epochs - done) * per_epoch,
        )

    def _epoch(self, epoch: int) -> tuple[dict[str, float], Mapping[str, float]]:
        """Train and validate epoch ``epoch``, counted from 0.

        Returns:
            Its row of the history, and what a refit of the surrogate had to say, by name.
        """
        config, state = self.config, self.state
        monitors: Mapping[str, float] = {}
        share = self._rising_share(epoch)
        weight = config.weight * (float(share > 0) if config.lambd_schedule == "constant" else share)
        watch = Stopwatch(state.device)
        start = time.perf_counter()
        means = self._steps(epoch, weight, watch)
        # Before anything is made of the model: neither a refit nor best.pt can do with what is not a number.
        if not math.isfinite(means["cross_entropy"]):
            raise self._diverged(f"the cross-entropy of epoch {epoch + 1} is {means['cross_entropy']}")
        broken = first_not_finite(state.model)
        if broken is not None:
            raise self._diverged(f"after epoch {epoch + 1} the model's {broken} is not finite")
        if state.surrogate is not None and state.surrogate.needs_refit:
            with watch:
                monitors = self._refit(state.surrogate, epoch)
        surrogate_seconds = watch.read()
        seconds = time.perf_counter() - start
        self._count_skipped(int(means.pop("skipped")), epoch)
        row = {
            "epoch": epoch + 1,
            "lr": epoch_lr(config.lr, epoch, config.epochs),
            "lambda_eff": weight,
            "train_loss": means["cross_entropy"] + weight * means["rob_loss"],
            **means,
            "val_accuracy": accuracy(state.model, state.val, state.device, config.seed, amp=config.amp),
            "seconds": seconds,
            "surrogate_seconds": surrogate_seconds,
        }
        return row, monitors

    def _rising_share(self, epoch: int) -> float:
        """Weight of the penalty in an epoch, counted from 0, relative to λ, where it rises; 0 before there is one."""
        if epoch + 1 < self.config.penalty_from:
            return 0.0
        return lambda_eff(1.0, epoch_lr(self.config.lr, epoch, self.config.epochs), self._warm)

    def _diverged(self, what: str) -> TrainingDiverged:
        lr, lambd = self.config.lr, self.config.weight
        return TrainingDiverged(f"{what}: training diverged; lower --lr ({lr:g}) or --lambd ({lambd:g})")

    def _steps(self, epoch: int, weight: float, watch: Stopwatch) -> dict[str, float]:
        """The training steps of an epoch, and what they measured."""
        state = self.state
        inject = partial(INJECTIONS[self.config.injection], amp=self.config.amp)
        if self._captured is not None:
            inject = partial(inject, penalize=self._captured)
        surrogate = state.surrogate if weight > 0 else None
        if surrogate is not None:
            first, last = self.config.penalty_from - 1, self.config.epochs - 1
            surrogate.begin_epoch((epoch - first) / (last - first) if last > first else 1.0)
        meter = EpochMeter(state.device)
        for part in state.parts().values():
            part.train()
        # disable=None: no bar where stderr is no terminal; the log has a line per epoch either way.
        with tqdm(total=len(state.train), desc=f"epoch {epoch + 1}", leave=False, disable=None) as bar:
            for images, labels in state.train:
                images = images.to(state.device, non_blocking=True)
                labels = labels.to(state.device, non_blocking=True)
                for optimizer in state.optimizers.values():
                    optimizer.zero_grad(set_to_none=True)
                step = inject(state.model, surrogate, images, labels, weight, watch)
                with record_function("optimizer"):
                    for optimizer in state.optimizers.values():
                        optimizer.step()
                    state.scheduler.step()
                meter.add(step, len(labels))
                self._end_of_step()
                if bar.update():  # true only when the bar is redrawn: reading the meter waits for the device
                    now = meter.read()
                    terms = f"ce {now['cross_entropy']:.3f}, rob {now['rob_loss']:.3f}"
                    bar.set_postfix_str(f"{terms}, accuracy {now['train_accuracy']:.1%}")
        return meter.read()

    def _refit(self, surrogate: Surrogate, epoch: int) -> Mapping[str, float]:
        """Refit on clean features of the whole training set; the run's random states stay as they are."""
        state, seed = self.state, self.config.seed + epoch
        features, labels = collect_features(state.model, state.plain_train, state.device, seed, noisy=False)
        # Weights that are finite can be so large that features are not.
        if not features.isfinite().all():
            raise self._diverged(f"after epoch {epoch + 1} features are not finite")
        with isolated_random(seed, state.device):
            return surrogate.refit(features, labels)

    def _count_skipped(self, skipped: int, epoch: int) -> None:
        if skipped and not self.state.skipped:
            self._log.warning(
                "the penalty or its gradient was not finite in %d steps of epoch %d; such steps follow the "
                "classification loss alone, and summary.json counts them (this is said once)",
                skipped,
                epoch + 1,
            )
        self.state.skipped += skipped

    def _finish(self) -> dict[str, Any]:
        """Score the best epoch, once, on the test set; draw the pictures; write the summary, last."""
        state, path = self.state, self.run_dir / "best.pt"
        runs.load_weights(state.model, checkpoint.load(path), path)
        best = state.history[state.best_epoch - 1]
        summary: dict[str, Any] = {
            "test_accuracy": accuracy(state.model, state.test, state.device, self.config.seed),
            "best_epoch": state.best_epoch,
            "epochs": len(state.history),
            "train_seconds": sum(row["seconds"] for row in state.history),
            "surrogate_seconds": sum(row["surrogate_seconds"] for row in state.history),
            "rob_loss": best["rob_loss"],
            # A monitor that overflowed is no reason to skip a step, and JSON has no word for infinity.
            "intra_mse": best["intra_mse"] if math.isfinite(best["intra_mse"]) else None,
            "parameters": {
                name: sum(parameter.numel() for parameter in state.parts()[name].parameters())
                for name in ("encoder", "server", "surrogate")
            },
            "skipped_steps": state.skipped,
            "peak_memory_bytes": runs.peak_memory(state.device),
            "device": runs.device_name(state.device),
            "versions": runs.versions(),
        }
        draw_or_log(
            self._log,
            self.run_dir / "curves.png",
            lambda file: draw_curves(state.history, file, best_epoch=state.best_epoch),
        )
        draw_or_log(self._log, self.run_dir / "tsne.png", self._draw_features)
        write_json(self.run_dir / "summary.json", summary)
        self._log.info("test accuracy %.1f %%, of epoch %d", 100 * summary["test_accuracy"], state.best_epoch)
        return summary

    def _draw_features(self, file: Path) -> None:
        state = self.state
        batches = islice(state.val, math.ceil(MAX_SAMPLES / self.config.batch_size))
        features, labels = collect_features(state.model, batches, state.device, self.config.seed, noisy=True)
        draw_tsne(features, labels, state.data.class_names, file, seed=self.config.seed)
