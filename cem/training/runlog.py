"""What a run writes while it goes: its log, the warnings raised meanwhile, and the table of epochs."""

from __future__ import annotations

import csv
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cem.errors import CemError, MachineError
from cem.files import replacing, writing
from cem.progress import busy, say

COLUMNS = (
    "epoch", "lr", "lambda_eff", "train_loss", "cross_entropy", "rob_loss", "intra_mse", "train_accuracy",
    "val_accuracy", "seconds", "surrogate_seconds",
)  # fmt: skip
"""First columns of ``metrics.csv``; what else terms say follows as ``NAME.MONITOR``. Keys of a row of the history."""


class _ProgressBarHandler(logging.Handler):
    """Writes to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


class _FileHandler(logging.FileHandler):
    """Stays silent on a disk that takes no more: stderr has the line too, and whatever matters more says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def run_log(run_dir: Path, name: str = "train.log") -> Iterator[logging.Logger]:
    """Open a run's logger: the file ``name`` with times, and the same lines on stderr.

    There is one logger per run directory. Entering again while it is open gives the same one, without
    doubling its handlers; the outermost exit closes them. Python warnings raised inside go to the log as
    well.
    """
    logger = logging.getLogger(f"cem.run.{run_dir.resolve()}")
    if logger.handlers:
        yield logger
        return
    logger.setLevel(logging.INFO)
    logger.propagate = False
    with writing(run_dir / name):
        file = _FileHandler(run_dir / name, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    logger.addHandler(_ProgressBarHandler())
    try:
        with warnings.catch_warnings():  # puts showwarning back on exit
            warnings.showwarning = lambda message, category, *_, **__: logger.warning(
                "%s: %s", category.__name__, message
            )
            yield logger
    finally:
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()


def log_refusal(log: logging.Logger, error: CemError, advice: str = "") -> None:
    """Tell what a user can mend, once: commands do not repeat what a log, and so stderr, has."""
    log.error("%s%s", error, advice)
    error.logged = True


def draw_or_log(log: logging.Logger, path: Path, draw: Callable[[Path], None]) -> None:
    """Draw a picture to ``path``; whatever goes wrong goes to the log: it must not cost the run that it shows."""
    try:
        with busy(f"drawing {path.name}"), writing(path):
            draw(path)
    except MachineError as error:
        log.error("%s; the rest of the run is complete", error)
    except Exception:
        log.exception("cannot draw %s; the rest of the run is complete", path.name)


def epoch_line(row: Mapping[str, float], epochs: int) -> str:
    """One epoch of the history as a line for people."""
    others = row["train_loss"] - row["cross_entropy"] - row["lambda_eff"] * row["rob_loss"]
    more = f" + others {others:.3f}" if abs(others) > 1e-6 * abs(row["train_loss"]) else ""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  lr {row['lr']:.2g}  λ {row['lambda_eff']:.3g}  "
        f"loss {row['train_loss']:.3f} = ce {row['cross_entropy']:.3f} + λ·rob {row['rob_loss']:.3f}{more}  "
        f"train {row['train_accuracy']:.1%}  val {row['val_accuracy']:.1%}  "
        f"{row['seconds']:.1f} s (surrogate {row['surrogate_seconds']:.1f})"
    )


def write_metrics(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the table of epochs, whole, in place of the one before: after a resume it holds no row twice."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(dict.fromkeys([*COLUMNS, *(name for row in history for name in row)])))
        table.writeheader()
        table.writerows(history)
