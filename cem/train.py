"""Train a split model: ``python -m cem.train``."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal

import tyro

from cem.training import CheckpointError, ConfigError, TrainConfig, Trainer, TrainingDiverged
from cem.training.presets import PRESETS
from cem.training.runs import check_same
from cem_kernels import BackendUnavailableError

DESCRIPTION = """Train a network that is split between a client and a server so that what the client sends is
hard to invert. Without options: scikit-learn's digits, attention surrogate, about a minute on two cores.

The client computes features z of an image, adds noise, and sends them; the server classifies. Besides the
cross-entropy, training minimizes a surrogate of how much z varies inside each class, which bounds what an
attacker can reconstruct.

Everything about a run lies in its directory: config.yaml, metrics.csv, summary.json, curves.png, tsne.png,
train.log, TensorBoard events, last.pt and best.pt. Ctrl-C leaves a run that --resume continues."""


@dataclass
class CommandLine(TrainConfig):
    """The options of a run, and where to take them from."""

    preset: Literal["attention", "seed", "gmm"] | None = None
    """Set the options of a defense at once; other options override it, and it overrides CONFIG.
    attention: what is recommended, and the default anyway.
    seed: the original attention surrogate, of flat features, frozen, at full weight.
    gmm: the mixture of the CEM paper."""
    config: Path | None = None
    """Take options from this YAML file, such as the config.yaml of another run; other options override it."""
    resume: Path | None = None
    """Continue the run in this directory, with the numbers it would have had without the interruption.
    Its options hold; only those that say where or how to compute may be given besides: --device, --backend,
    --capture, --num-workers (not with --augment), --data-root (the same data elsewhere), --download,
    --profile-steps."""


def parse(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The options of a run, and whether it is one to continue.

    Raises:
        ConfigError: a file cannot be used, or options contradict each other or the run that they continue.
        SystemExit: the command line itself cannot be read (2), or asked for help (0).
    """
    # Both files give the defaults of all other options, so they are needed before the command line can be
    # read.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path)
    first.add_argument("--preset")
    sources, _ = first.parse_known_args(list(argv))
    if sources.config is not None and sources.resume is not None:
        raise ConfigError("--resume takes its options from the run; leave out --config")
    if sources.preset is not None and sources.resume is not None:
        raise ConfigError("--resume takes its options from the run; leave out --preset")
    defaults = TrainConfig()
    if sources.config is not None:
        defaults = TrainConfig.from_yaml(sources.config)
    if sources.preset in PRESETS:  # if not, the command line is refused below, with what there is
        defaults = replace(defaults, **PRESETS[sources.preset])
    if sources.resume is not None:
        defaults = replace(TrainConfig.from_yaml(sources.resume / "config.yaml"), out=sources.resume)
    options = tyro.cli(
        CommandLine,
        prog="python -m cem.train",
        description=DESCRIPTION,
        default=CommandLine(**vars(defaults)),
        args=list(argv),
    )
    config = TrainConfig(**{name: getattr(options, name) for name in vars(defaults)})
    if sources.resume is not None:
        if config.out != sources.resume:
            raise ConfigError(f"--out {config.out}: a run continues where it is, in {sources.resume}")
        check_same(defaults, config, sources.resume)
    return config, sources.resume is not None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (diverged), 2 (bad options) or 130 (interrupted, resumable)."""
    # Whoever sends SIGTERM (a scheduler, a container) gets what Ctrl-C gets: a run that can be resumed.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        config, resume = parse(sys.argv[1:] if argv is None else argv)
        trainer = Trainer(config, resume=resume)
    except (ConfigError, CheckpointError, BackendUnavailableError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    try:
        summary = trainer.fit()
    except TrainingDiverged:
        return 1  # the run's log, which goes to stderr too, has said why
    except KeyboardInterrupt:
        return 130
    where = shlex.quote(str(trainer.run_dir))
    if trainer.finished is not None:
        print(f"The run in {where} was finished already; nothing was changed.")
    best, total = summary["best_epoch"], summary["epochs"]
    seconds, surrogate_seconds = summary["train_seconds"], summary["surrogate_seconds"]
    print(f"test accuracy  {summary['test_accuracy']:.1%} (epoch {best} of {total})")
    print(f"training time  {seconds:.0f} s, of which surrogate {surrogate_seconds:.0f} s")
    print(f"results        {where}")
    print(f"               curves.png and tsne.png there, or: tensorboard --logdir {where}")
    print(f"next           python -m cem.attack {where}")
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
