"""The split trainer: epochs, and the files of a run directory."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from cem import interrupts
from cem.errors import CemError, MachineError
from cem.files import write_json, writing
from cem.folders import Lock, remove_left_lock, remove_unfinished
from cem.machine import enough
from cem.models import CLIENT_COSTS, client_budget
from cem.progress import about, bar, busy, over
from cem.report.curves import draw_curves
from cem.report.tsne import MAX_SAMPLES, draw_tsne
from cem.training import checkpoint, runs
from cem.training.capture import CapturedTerm
from cem.training.config import TrainConfig
from cem.training.divergence import Divergence
from cem.training.evaluation import accuracy, collect_features, isolated_random
from cem.training.injection import INJECTIONS
from cem.training.meter import EpochMeter
from cem.training.runlog import COLUMNS, draw_or_log, epoch_line, log_refusal, run_log, write_metrics
from cem.training.schedule import epoch_lr, lambda_eff
from cem.training.state import SURROGATE, TrainState
from cem.training.tracing import traced_steps
from cem.training.weighted import WeightedTerm

BIG = "--batch-size, --bottleneck, --image-size, --train-size or the sizes of the surrogate"
"""Options that decide how much memory a run takes."""


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train a split model and return its run directory; see :class:`Trainer`."""
    trainer = Trainer(config, resume=resume)
    trainer.fit()
    return trainer.run_dir


class Trainer:
    """Trains one split model and leaves a run directory behind.

    Construction loads the data and builds everything, so what is wrong with the options is known before anything is
    written. :meth:`fit` then trains. While a run is trained, or constructed to be resumed, nobody else can work in its
    directory: it is locked.

    Args:
        config: the options. When resuming, those of the run, with ``out`` naming the directory.
        resume: continue the run that lies in ``config.run_dir`` from its last finished epoch. On the same
            device and with the same versions, the numbers are those of a run that never stopped.

    Attributes:
        run_dir: where the run's files lie. Without ``config.out``: ``config.run_dir``, or, for a new run whose
            name is taken when :meth:`fit` begins, the first free one of ``NAME-2``, ``NAME-3``, ...
        finished: content of ``summary.json`` if the run to resume had reached its end, else ``None``.
        state: data, model, terms and optimizers.

    Raises:
        UsageError: an option cannot be used, ``config.out`` is taken, a term cannot be captured, or, when resuming, an
            option or the data differ, or another process is at work there; or architecture, surrogate or a defense
            refuse their options.
        DataError: the data set is not there or cannot be read.
        CheckpointError: ``last.pt`` or, for a new run, ``init_from`` is missing, damaged or another model's.
        BackendError: the surrogate does not have ``config.backend``.
        MachineError: the run directory may not be written to, or memory is too small.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False) -> None:
        config = config.checked().resolved()
        self.config = config = replace(config, threads=config.threads or torch.get_num_threads())
        self.run_dir = config.run_dir
        self.finished = runs.read_summary(self.run_dir) if resume else None
        self._resumed, self._lock = resume, None
        if not resume:
            runs.check_place(config)
        try:
            # There is no log to put warnings into before it is certain that there will be a run.
            with enough("the model and its data", BIG), warnings.catch_warnings(record=True) as self._warnings:
                if resume and self.finished is None:
                    self._lock = Lock(self.run_dir)
                self._build()
        except BaseException:
            self._release()
            raise

    def fit(self) -> dict[str, Any]:
        """Train until the last epoch, score the best one on the test set, draw the pictures.

        Afterwards ``state.model`` has the weights of the best epoch.

        Returns:
            The content of ``summary.json``. A run that was finished already is left as it is, but for the lock of a
            process that was killed after its last file.

        Whatever ends training early goes to the log and is handed on.

        Raises:
            KeyboardInterrupt: the log says how to resume.
            DivergedError: training has diverged, see :mod:`cem.training.divergence`. The last good epoch stays in
                ``last.pt``.
            MachineError: a file cannot be written, memory ran out, or a process that loads images was killed; the log
                says how to go on.
            UsageError: ``config.out`` was taken meanwhile.
        """
        if self.finished is not None:
            remove_left_lock(self.run_dir)
            return self.finished
        threads = torch.get_num_threads()
        torch.set_num_threads(self.config.threads or threads)
        try:
            self.state.rewind_random()
            if not self._resumed:
                with warnings.catch_warnings(record=True) as more, interrupts.held():
                    self.run_dir, self._lock = runs.new_run(self.config, self._first_files)
                self._warnings += more
            self._saved = len(self.state.history)
            self._divergence = Divergence(self.config, self.state.data.num_classes)
            with run_log(self.run_dir) as self._log:
                return self._logged()
        finally:
            self._release()
            torch.set_num_threads(threads)

    def _logged(self) -> dict[str, Any]:
        """The training, with whatever ends it early in the log."""
        try:
            with interrupts.heeded(), writing(self.run_dir), enough("training", BIG):
                self._start()
                self._train()
                return self._finish()
        except KeyboardInterrupt:
            self._log.warning(f"interrupted; {self._how_to_go_on()}")
            raise
        except MachineError as error:
            log_refusal(self._log, error, f"; {self._how_to_go_on()}")
            raise
        except CemError as error:
            log_refusal(self._log, error)
            raise
        except Exception:
            self._log.exception("training failed")
            raise

    def _how_to_go_on(self) -> str:
        saved = f"{self._saved} of {self.config.epochs} epochs are saved"
        return f"{saved}. Resume with: {runs.resume_command(self.run_dir)}"

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _build(self) -> None:
        """Data, model, terms and optimizers, as they were when the run to resume was saved."""
        config = self.config
        self.state = TrainState(config, self._weight)
        if self._resumed:
            self.state.restore(self.run_dir / "last.pt")
        elif config.init_from is not None:
            self.state.warm_start(config.init_from)
        if config.capture:
            self._capture()

    def _first_files(self, run_dir: Path) -> None:
        """What makes a run resumable from its very beginning."""
        self.state.save(run_dir / "last.pt")
        # Without ``out``: the directory may be moved, and another run under these options needs another one.
        replace(self.config, out=None).to_yaml(run_dir / "config.yaml")

    def _capture(self) -> None:
        """Terms as graphs for full batches. That draws random numbers, which ``fit`` takes back."""
        state, batch_size = self.state, min(self.config.batch_size, len(self.state.data.train))
        features, images = (batch_size, *state.model.feature_shape), (batch_size, *state.data.image_shape)
        for each in state.terms:
            each.answer = CapturedTerm(each.term, features, images, state.device)

    def _start(self) -> None:
        """The first lines of the log, and the table as it was."""
        config, state, data = self.config, self.state, self.state.data
        shape = "×".join(map(str, state.model.feature_shape))
        terms = ", ".join(each.name for each in state.terms) or "no penalty"
        weight = f", λ {config.weight:g}" if config.penalized else ""
        noise = "in one piece" if config.centralized else f"noise σ {config.noise_std:g}"
        self._log.info(
            f"{config.data}: {len(data.train)} images to train on, {len(data.val)} to validate, {len(data.test)} to "
            f"test; {config.arch}, z {shape}; {terms}{weight}; {noise}; {config.epochs} epochs of {len(state.train)} "
            f"steps; {runs.device_name(state.device)}; {self.run_dir}"
        )
        for note in data.notes:
            self._log.info(note)
        for warning in self._warnings:
            self._log.warning("%s: %s", warning.category.__name__, warning.message)
        if self._resumed:
            self._log.info("resuming after epoch %d of %d", len(state.history), config.epochs)
            remove_unfinished(self.run_dir)
        write_metrics(self.run_dir / "metrics.csv", state.history)

    def _train(self) -> None:
        # Importing TensorBoard takes longer than an epoch of a small model; only a run needs it.
        from torch.utils.tensorboard import SummaryWriter

        state, run_dir = self.state, self.run_dir
        done = len(state.history)
        with interrupts.held():
            board = SummaryWriter(str(run_dir), purge_step=done + 1 if done else None)
        epochs, steps = self.config.epochs, len(state.train)
        # The first epoch that tells how long the others take: before the penalty is on, they take less.
        telling = max(done, self.config.first_penalized - 1 if state.terms else 0)
        with (
            board,
            self._trace() as self._end_of_step,
            bar(epochs * steps, "training", initial=done * steps) as self._bar,
        ):
            for epoch in range(done, epochs):
                began = time.perf_counter()
                row = self._epoch(epoch)
                # Validation accuracy alone would choose an early epoch, which the penalty has hardly shaped. The
                # original's rule for its weight says which are late, whatever is trained, so that all runs choose
                # among the same epochs.
                key = (self._rising_share(epoch), row["val_accuracy"])
                state.history.append(row)
                # What may have diverged must not take the place of what has not, unless there is nothing to come.
                good, last = not self._divergence.suspected, epoch + 1 == epochs
                best = key > state.best and (good or (last and state.best_epoch == 0))
                if best:
                    state.best, state.best_epoch = key, epoch + 1
                    state.save(run_dir / "best.pt", resumable=False)
                if good or last:
                    state.save(run_dir / "last.pt")
                    self._saved = epoch + 1
                write_metrics(run_dir / "metrics.csv", state.history)
                with interrupts.held():
                    for name in row.keys() - {"epoch"}:
                        board.add_scalar(name, row[name], epoch + 1)
                self._log.info("%s%s", epoch_line(row, epochs), "  best" if best else "")
                if epoch == telling and epoch + 1 < epochs:
                    left = (epochs - epoch - 1) * (time.perf_counter() - began)
                    self._log.info("about %s to go", about(left))

    def _trace(self) -> AbstractContextManager[Callable[[], None]]:
        """Trace from the first epoch with a penalty on, where there is one: without it a step is half a step."""
        config, state = self.config, self.state
        done, per_epoch = len(state.history), len(state.train)
        first = max(done, config.first_penalized - 1) if state.terms else done
        return traced_steps(
            self.run_dir / "trace.json.gz", self._log, state.device, steps=config.profile_steps,
            begin=(first - done) * per_epoch, total=(config.epochs - done) * per_epoch,
        )  # fmt: skip

    def _epoch(self, epoch: int) -> dict[str, float]:
        """Train and validate epoch ``epoch``, counted from 0; return its row of the history."""
        config, state = self.config, self.state
        start = time.perf_counter()
        state.defenses.prepare(state.model, epoch)
        for each in state.terms:
            each.before_epoch(epoch, config.epochs)
        means, measured = self._steps(epoch)
        # Neither a refit nor best.pt can do with what is not a number.
        self._divergence.check_epoch(epoch + 1, means["cross_entropy"], state.model)
        fitted = self._after_epoch(epoch)
        row = dict.fromkeys(COLUMNS, 0.0) | means | {"train_loss": means["cross_entropy"]}
        row |= {"epoch": epoch + 1, "lr": self._lr(epoch)}
        for each in state.terms:
            found = measured.get(each.key, {})
            self._count_skipped(each, int(found.pop("skipped", 0)), epoch)
            row["train_loss"] += each.now * found.get("loss", 0.0)
            found |= {**fitted.get(each.key, {}), "weight": each.now, "seconds": each.watch.read()}
            row |= each.columns(found)
            self._tell_outliers(each.name, found.get("outliers", 0.0), epoch)
        row["seconds"] = time.perf_counter() - start
        val = over(state.val, "validation")
        row["val_accuracy"] = accuracy(state.model, val, state.device, config.seed, amp=config.amp)
        return row

    def _weight(self, epoch: int) -> float:
        """λ_eff of an epoch, counted from 0."""
        share = self._rising_share(epoch)
        return self.config.weight * (float(share > 0) if self.config.lambd_schedule == "constant" else share)

    def _rising_share(self, epoch: int) -> float:
        """Weight of the penalty in an epoch, counted from 0, relative to λ, where it rises; 0 before there is one."""
        if epoch + 1 < self.config.first_penalized:
            return 0.0
        return lambda_eff(1.0, self._lr(epoch), self.config.init_from is not None)

    def _lr(self, epoch: int) -> float:
        """The learning rate with which an epoch begins, counted from 0."""
        return epoch_lr(self.config.lr, epoch, self.config.epochs, self.config.lr_schedule)

    def _steps(self, epoch: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """The training steps of an epoch, and what they measured; see :meth:`EpochMeter.read`."""
        state = self.state
        inject = INJECTIONS[self.config.injection]
        meter = EpochMeter(state.device)
        for part in state.parts().values():
            part.train()
        self._bar.set_description_str(f"epoch {epoch + 1}/{self.config.epochs}", refresh=False)
        for images, labels in state.train:
            images = images.to(state.device, non_blocking=True)
            labels = labels.to(state.device, non_blocking=True)
            for optimizer in state.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            step = inject(state.model, state.terms, images, labels, amp=self.config.amp)
            with record_function("optimizer"):
                for optimizer in state.optimizers.values():
                    optimizer.step()
                state.scheduler.step()
            meter.add(step, len(labels))
            interrupts.check()
            self._end_of_step()
            if self._bar.update():  # true only when the bar is redrawn: reading the meter waits for the device
                now, measured = meter.read()
                losses = "".join(f", {key} {values['loss']:.3f}" for key, values in measured.items())
                self._bar.set_postfix_str(f"ce {now['cross_entropy']:.3f}{losses}, {now['train_accuracy']:.1%} right")
        return meter.read()

    def _after_epoch(self, epoch: int) -> dict[str, dict[str, float]]:
        """Refits on clean features of the whole training set, and what they say, by the term's key.

        The run's random states stay as they are.
        """
        state, seed = self.state, self.config.seed + epoch
        wanted = [each for each in state.terms if each.term.needs_epoch_features]
        if not wanted:
            return {}
        with wanted[0].watch:
            images = over(state.plain_train, "features for a refit")
            features, labels = collect_features(state.model, images, state.device, seed, noisy=False)
        self._divergence.check_features(epoch + 1, features)
        found = {}
        for each in wanted:
            with busy(f"refit of {each.name}"), each.watch, isolated_random(seed, state.device):
                found[each.key] = dict(each.term.after_epoch(features, labels))
        return found

    def _count_skipped(self, term: WeightedTerm, skipped: int, epoch: int) -> None:
        before = self.state.skipped.get(term.key, 0)
        if skipped and not before:
            self._log.warning(
                f"{term.name} or its gradient was not finite in {skipped} steps of epoch {epoch + 1}; such steps "
                "follow the other losses alone, and summary.json counts them (this is said once)"
            )
        self.state.skipped[term.key] = before + skipped

    def _tell_outliers(self, name: str, outliers: float, epoch: int) -> None:
        column = f"{name}.outliers"
        if outliers and not any(row.get(column) for row in self.state.history):
            self._log.warning(
                f"{name} found outliers in epoch {epoch + 1}: batches that it measured and will not remember; {column} "
                "in metrics.csv says how many a step; nothing is to be done unless they stay (this is said once)"
            )

    def _finish(self) -> dict[str, Any]:
        """Score the best epoch, once, on the test set; draw the pictures; write the summary, last."""
        state, path = self.state, self.run_dir / "best.pt"
        runs.load_weights(state.model, checkpoint.load(path), path)
        best = state.history[state.best_epoch - 1]
        penalized = sum(row["lambda_eff"] > 0 for row in state.history) * len(state.train)
        applied = best["lambda_eff"] > 0 and state.skipped.get(SURROGATE, 0) < penalized
        summary: dict[str, Any] = {
            "test_accuracy": accuracy(state.model, over(state.test, "test"), state.device, self.config.seed),
            "best_epoch": state.best_epoch,
            "epochs": len(state.history),
            "train_seconds": sum(row["seconds"] for row in state.history),
            "surrogate_seconds": sum(row["surrogate_seconds"] for row in state.history),
            "rob_loss": best["rob_loss"] if applied else None,
            # A monitor that overflowed is no reason to skip a step, and JSON has no word for infinity.
            "intra_mse": best["intra_mse"] if applied and math.isfinite(best["intra_mse"]) else None,
            "parameters": {SURROGATE: 0}
            | {name: sum(each.numel() for each in part.parameters()) for name, part in state.parts().items()},
            **self._client_costs(),
            "skipped_steps": sum(state.skipped.values()),
            **runs.origin(state.device),
        }
        curves = partial(draw_curves, state.history, best_epoch=state.best_epoch)
        draw_or_log(self._log, self.run_dir / "curves.png", curves)
        draw_or_log(self._log, self.run_dir / "tsne.png", self._draw_features)
        write_json(self.run_dir / "summary.json", summary)
        self._log.info("test accuracy %.1f %%, of epoch %d", 100 * summary["test_accuracy"], state.best_epoch)
        if self._divergence.guesses(best["cross_entropy"]):
            self._log.warning("the model is no better than guessing: more --epochs, or a lower --lambd or --noise-std")
        return summary

    def _client_costs(self) -> dict[str, int | None]:
        if self.config.centralized:
            return dict.fromkeys(CLIENT_COSTS)
        return {**client_budget(self.state.model, self.state.data.image_shape)}

    def _draw_features(self, file: Path) -> None:
        state = self.state
        batches = islice(state.val, math.ceil(MAX_SAMPLES / self.config.batch_size))
        features, labels = collect_features(state.model, batches, state.device, self.config.seed, noisy=True)
        draw_tsne(features, labels, state.data.class_names, file, seed=self.config.seed)
