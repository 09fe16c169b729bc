"""Train a network that is split between a client and a server so that what the client sends is
hard to invert. Without options: scikit-learn's digits, under a minute on two cores.

The client computes features z of an image, defends them, and sends them; the server classifies. Besides
the cross-entropy, training minimizes a surrogate of how much z varies inside each class, which bounds
what an attacker can reconstruct.

Everything about a run lies in its directory: config.yaml, metrics.csv, summary.json, curves.png,
tsne.png, train.log, TensorBoard events, last.pt and best.pt. Whatever ends a run early, --resume continues it.

Examples:

  python -m cem.train --train-size 700 --out runs/first   leaves some to attack
  python -m cem.train --surrogate none --noise-std 0.3    noise, but no penalty
  python -m cem.train --resume runs/first                 after an interruption

Exit code: 0; 2 for what a user can mend, such as bad options or a full disk; 3 if training diverged; 130 if it was
interrupted.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cem.command import Parser, overridden, parse_options, read, read_first, run_command
from cem.errors import UsageError
from cem.options import Options, option
from cem.progress import busy
from cem.training.config import TrainConfig


@dataclass(frozen=True)
class Sources(Options):
    """Where options come from.

    Attributes:
        config: Take options from this YAML file, such as the config.yaml of another run; other options override it.
        resume: Continue the run in this directory, with the numbers it would have had without the interruption. Its
            options hold; only those that say where or how to compute may be given besides: --device, --backend,
            --capture, --num-workers (not with --augment), --threads, --data-root, --download, --profile-steps.
    """

    config: Path | None = option(None, group="options from a file")
    resume: Path | None = option(None, group="options from a file")


def parse(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The options of a run, and whether it is one to continue.

    Raises:
        CemError: a file cannot be used, or options contradict each other or the run that they continue.
        SystemExit: the command line asked for help (0).
    """
    given = read_first(Sources(), argv)
    if given.config is not None and given.resume is not None:
        raise UsageError("--resume takes its options from the run; leave out --config")
    defaults = TrainConfig() if given.config is None else TrainConfig.from_yaml(given.config)
    if given.resume is not None:
        from cem.training.runs import read_config

        defaults = replace(read_config(given.resume), out=given.resume)
    base = read(defaults, argv)
    if base.surrogate != defaults.surrogate:  # weight and schedule of one surrogate are not another's
        base = replace(base, lambd=None, lambd_schedule=None)
    parser = Parser("python -m cem.train", __doc__)
    parser.add_options(given)
    parser.add_options(base)
    parser.add_members(base)
    result = overridden(base, parse_options(parser, argv, base))
    if given.resume is not None:
        from cem.training.runs import check_same

        if result.out != given.resume:
            raise UsageError(f"--out {result.out}: a run continues where it is, in {given.resume}")
        check_same(defaults, result, given.resume)
    return result.checked(), given.resume is not None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 2 (bad options), 3 (diverged) or 130 (interrupted, resumable)."""
    return run_command(lambda: _train(sys.argv[1:] if argv is None else argv))


def _train(argv: Sequence[str]) -> int:
    config, resume = parse(argv)
    with busy("loading libraries and data"):
        from cem.training.trainer import Trainer  # only here: --help needs nothing that computes

        trainer = Trainer(config, resume=resume)
    summary = trainer.fit()
    where = shlex.quote(str(trainer.run_dir))
    if trainer.finished is not None:
        print(f"The run in {where} was finished already; nothing was changed.")
    best, total = summary["best_epoch"], summary["epochs"]
    seconds, surrogate_seconds = summary["train_seconds"], summary["surrogate_seconds"]
    print(f"test accuracy  {summary['test_accuracy']:.1%} (epoch {best} of {total})")
    print(f"training time  {seconds:.0f} s, of which surrogate {surrogate_seconds:.0f} s")
    if parameters := summary.get("client_parameters"):
        work, sent = f"{summary['client_multiply_adds'] / 1e6:.3g}", summary["sent_bytes"]
        print(f"client         {parameters:,} parameters; an image: {work} M multiply-adds, {sent:,} bytes sent")
    print(f"results        {where}")
    print(f"               curves.png and tsne.png there, or: tensorboard --logdir {where}")
    print(f"next           python -m cem.attack {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
