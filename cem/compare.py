"""Train and attack every surrogate with every seed, at equal epochs, and write one report: what each
costs in accuracy and time, and what it buys against the attacker.

Start with --quick. A comparison to rely on takes --seeds 0 1 2 or more, --noise-stds with several levels, because
more noise is a defense too, and a --train-size that leaves images for the attackers to learn from: without it
they have no more than the validation images.

Every run has a directory in --out, named after what varies, such as none-noise0.3-seed0, as cem.train
and cem.attack leave it. The same command again goes on where it was stopped: what is finished stays, a training
that was interrupted is resumed, and more --seeds, --noise-stds or clients add runs. A run that fails costs only itself.

The report is about the runs that the command names: report.html (one file, opens offline), report.md, table.csv
(one line a run), tradeoff.png, reconstructions.png, and frontier.png where there are several clients. compare.yaml
holds all options; --config takes it back.

Examples:

  python -m cem.compare --quick                        a few minutes
  python -m cem.compare --quick --noise-stds 0.1 0.3   two levels of noise
  python -m cem.compare --quick --report-only          from what is there

Options of the training hold for all runs. Those of the attack begin with --attack.

Exit code: 0; 1 if runs failed; 2 for bad options; 130 if it was interrupted.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cem.attacks.config import AttackConfig
from cem.command import Parser, overridden, parse_options, read, read_first, run_command
from cem.comparison.config import NOT_SHARED, Comparison
from cem.comparison.grid import GridOptions
from cem.errors import UsageError
from cem.options import Options, option
from cem.progress import busy, say
from cem.surrogates import CONTROL
from cem.training.config import TrainConfig


@dataclass(frozen=True)
class Sources(Options):
    """What is written, and where options come from.

    Attributes:
        out: Folder of the comparison (default: runs/compare). It may hold runs of an earlier one under the same
            options.
        quick: A small comparison on digits, to see what comes out, in four minutes on two cores. It sets small
            defaults, two jobs, and runs/compare-quick for OUT; --quick --help shows them, and other options override.
        report_only: Run nothing; write the report anew from what OUT holds, also while a comparison is at work there.
            Options come from OUT/compare.yaml.
        config: Take options from this YAML file, such as the compare.yaml of another comparison; other options override
            it.
    """

    out: Path | None = option(None, group="files")
    quick: bool = option(False, group="files")
    report_only: bool = option(False, group="files")
    config: Path | None = option(None, group="files")


def quick() -> Comparison:
    """The comparison that ``--quick`` makes."""
    return Comparison(
        grid=GridOptions(seeds=(0, 1), jobs=2),
        train=TrainConfig(surrogate=CONTROL, train_size=700),
        # Attacks end before they are at their strongest, and the report says so.
        attack=AttackConfig(score_size=200).first_look(),
        out=Path("runs/compare-quick"),
    )


def parse(argv: Sequence[str]) -> tuple[Comparison, bool]:
    """What to compare, and whether only to report on it.

    Raises:
        CemError: a file cannot be used, or options contradict each other.
        SystemExit: the command line asked for help (0).
    """
    known = read_first(Sources(), argv)
    if known.quick and known.config is not None:
        raise UsageError("--quick and --config both set all options; leave one out")
    base = quick() if known.quick else Comparison()
    out, source = known.out or base.out, known.config
    if known.report_only and source is None:
        source = out / "compare.yaml"
        if not source.exists():
            raise UsageError(f"--report-only: there is no comparison in {out}: it holds no compare.yaml")
    if source is not None:
        base = Comparison.from_yaml(source)
    grid = read(base.grid, argv, places=["surrogates", "variants"])
    train = read(base.train, argv, places=["defenses"])
    with base.of_attack():
        attack = read(base.attack, argv, prefix="attack.")
    parser = Parser("python -m cem.compare", __doc__)
    parser.add_options(known)
    parser.add_options(grid)
    parser.add_members(grid)
    parser.add_options(train, hidden=(*NOT_SHARED, "capture"))
    parser.add_members(train)
    parser.add_options(attack, prefix="attack.", title="attack", hidden=("control",))
    parser.add_members(attack, prefix="attack.")
    given = parse_options(parser, argv, grid, train, attack=attack)
    comparison = Comparison(
        overridden(grid, given),
        overridden(train, {name: value for name, value in given.items() if name not in NOT_SHARED}),
        overridden(attack, given, "attack."),
        out,
    )
    return comparison, known.report_only


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (runs failed), 2 (bad options) or 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "cem.compare", *argv])
    code = run_command(lambda: _compare(argv, command))
    if code == 130:
        print(f"interrupted; to go on: {command}", file=sys.stderr)
    return code


def _compare(argv: Sequence[str], command: str) -> int:
    comparison, report_only = parse(argv)
    # Only here: --help needs none of them.
    with busy("loading libraries"):
        from cem.comparison.report import title, write_report
        from cem.comparison.results import read_results
        from cem.comparison.runner import run_comparison

    if not report_only:
        comparison = comparison.checked()
        say(f"{title(comparison)}; every run is trained, then attacked with {', '.join(comparison.attack.attacks)}")
        if comparison.train.train_size is None:
            say(
                "note: without --train-size all training images are the targets', and attackers learn from the "
                "validation images alone"
            )
        run_comparison(comparison, command)
    results = read_results(comparison)
    with busy("writing the report"):
        report = write_report(comparison, results)
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        say(f"failed: {result.run.name}: {result.reason}")
    finished = sum(result.status == "finished" for result in results)
    print(f"runs     {finished} of {len(results)} finished" + (f", {len(failed)} failed" if failed else ""))
    print(f"report   {shlex.quote(str(report))}")
    print("         report.md, table.csv, tradeoff.png and reconstructions.png beside it")
    if failed:
        print(
            f"logs     {shlex.quote(str(comparison.out / 'logs'))}; the same command again tries what failed once more"
        )
    print(f"next     python -m webbrowser {shlex.quote(report.resolve().as_uri())}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
