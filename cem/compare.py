"""Compare surrogates at equal budget: ``python -m cem.compare``."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, TypeVar

import tyro

from cem.attacks.config import AttackConfig
from cem.comparison import Comparison, GridOptions, read_results, run_comparison, write_report
from cem.options import ConfigError
from cem.training.config import TrainConfig

DESCRIPTION = """Train and attack every surrogate with every seed, at equal epochs, and write one report: what each
costs in accuracy and time, and what it buys against the attacker.

Start with --quick. A comparison to rely on takes --seeds 0 1 2 or more, --noise-stds with several levels, because
more noise is a defense too, and a --train-size that leaves images for the attackers to learn from: without it
they have no more than the validation images.

Every run has a directory in --out, named after what varies, such as gmm-lambd16-noise0.1-seed0, as cem.train
and cem.attack leave it. The same command again goes on where it was stopped: what is finished stays, a training
that was interrupted is resumed, and more --seeds or --noise-stds add runs. A run that fails costs only itself.

The report is about the runs that the command names: report.html (one file, opens offline), report.md, table.csv
(one line a run), tradeoff.png, reconstructions.png. compare.yaml holds all options; --config takes it back.

Exit code: 0; 1 if runs failed; 2 for bad options; 130 if it was interrupted."""

_T = TypeVar("_T")
_Hidden = tyro.conf.Suppress[tyro.conf.Fixed[_T]]


@dataclass
class SharedTrainConfig(TrainConfig):
    """The options of all trainings; what the grid sets is no option here, nor what only one surrogate can do."""

    surrogate: _Hidden[Literal["attention", "gmm", "none"]] = "none"
    lambd: _Hidden[float] = 0.0
    noise_std: _Hidden[float] = 0.0
    seed: _Hidden[int] = 0
    capture: _Hidden[bool] = False
    out: _Hidden[Path | None] = None


@dataclass
class SharedAttackConfig(AttackConfig):
    """The options of all attacks; the control of each is a run of the comparison."""

    control: _Hidden[Path | None] = None


@dataclass
class CommandLine:
    """The options of a comparison, and where to take them from."""

    grid: Annotated[GridOptions, tyro.conf.arg(name="")]
    train: Annotated[SharedTrainConfig, tyro.conf.arg(name="")]
    attack: SharedAttackConfig
    out: Path = Path("runs/compare")
    """Folder of the comparison. It may hold runs of an earlier one under the same options."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A small comparison on digits, to see what comes out, in about two minutes on two cores. It sets small
    defaults, two jobs, and runs/compare-quick for OUT; `--quick --help` shows them, and other options override."""
    report_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run nothing; write the report anew from what OUT holds, also while a comparison is at work there.
    Options come from OUT/compare.yaml."""
    config: Path | None = None
    """Take options from this YAML file, such as the compare.yaml of another comparison; other options override it."""


def quick() -> Comparison:
    """The comparison that ``--quick`` makes."""
    return Comparison(
        grid=GridOptions(seeds=(0, 1), jobs=2),
        train=TrainConfig(train_size=700, epochs=10),
        # An epoch has ten steps here, so cycles are long; they end before a decoder has converged, and the report
        # says so.
        attack=AttackConfig(
            attackers=("res_normN4C32",), cycle_epochs=10, max_epochs=70, white_box_images=4, white_box_steps=100
        ),
        out=Path("runs/compare-quick"),
    )


def parse(argv: Sequence[str]) -> tuple[Comparison, bool]:
    """What to compare, and whether only to report on it.

    Raises:
        ConfigError: a file cannot be used, or options contradict each other.
        SystemExit: the command line itself cannot be read (2), or asked for help (0).
    """
    # These give the defaults of all other options, so they are needed before the command line can be read.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--out", type=Path)
    for flag in ("--quick", "--report-only"):
        first.add_argument(flag, action="store_true")
    known, _ = first.parse_known_args(list(argv))
    if known.quick and known.config is not None:
        raise ConfigError("--quick and --config both set all options; leave one out")
    defaults = quick() if known.quick else Comparison()
    out, source = known.out or defaults.out, known.config
    if known.report_only and source is None:
        source = out / "compare.yaml"
        if not source.exists():
            raise ConfigError(f"--report-only: there is no comparison in {out}: it holds no compare.yaml")
    if source is not None:
        defaults = Comparison.from_yaml(source)
    hidden = ("surrogate", "lambd", "noise_std", "seed", "out")
    train = {name: value for name, value in vars(defaults.train).items() if name not in hidden}
    attack = {name: value for name, value in vars(defaults.attack).items() if name != "control"}
    options = tyro.cli(
        CommandLine,
        prog="python -m cem.compare",
        description=DESCRIPTION,
        default=CommandLine(defaults.grid, SharedTrainConfig(**train), SharedAttackConfig(**attack), out=out),
        args=list(argv),
    )
    return Comparison(options.grid, options.train, options.attack, options.out), options.report_only


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (runs failed), 2 (bad options) or 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "cem.compare", *argv])
    # Whoever sends SIGTERM (a scheduler, a container) gets what Ctrl-C gets; so does who closes the terminal.
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup stays in force
            signal.signal(number, _interrupt)
    try:
        comparison, report_only = parse(argv)
        if not report_only:
            comparison.validate()
            if comparison.train.train_size is None:
                print(
                    "note: without --train-size all training images are the targets', and attackers learn from the "
                    "validation images alone",
                    file=sys.stderr,
                )
            run_comparison(comparison, command)
        results = read_results(comparison)
        report = write_report(comparison, results)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; to go on: {command}", file=sys.stderr)
        return 130
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        print(f"failed: {result.run.name}: {result.reason}", file=sys.stderr)
    finished = sum(result.status == "finished" for result in results)
    print(f"runs     {finished} of {len(results)} finished" + (f", {len(failed)} failed" if failed else ""))
    print(f"report   {shlex.quote(str(report))}")
    print("         report.md, table.csv, tradeoff.png and reconstructions.png beside it")
    return 1 if failed else 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
