"""Try to invert what a trained run's client sends. RUN is a directory that python -m cem.train left.

The attacker has images of the same kind that the target never trained on, may send them through the client as often
as it likes, and knows the defense; what else depends on the attack. Inside an attack everything is chosen on the
attacker's own validation images. All attacks are scored on the same images, which nobody has seen and which choose
nothing, and apart on some that the target was trained on. Over attacks the worst case counts, metric by metric:
MSE; its 5th percentile, what the worst protected images have; PSNR; SSIM; and identified, the share of
reconstructions to which no other image of the class is nearer than the original. Beside them: guessing the mean image,
the mean image of the right class, or the attacker's image with the nearest features; an undefended run, where
there is one; and, apart, an upper estimate of the information that the features hold.

An attack shows that at least so much leaks. A stronger one may exist.

Everything lies in RUN/attack/: attack.json, reconstructions.png, curves.png, attack.log, images.npz, the networks.
Ctrl-C keeps what was finished; the same command goes on from there, and so does one with more attacks or larger bounds.

Examples:

  python -m cem.attack runs/first                         the default attacks
  python -m cem.attack runs/first --queries 10            averages noise away
  python -m cem.attack runs/first --decoder.max-cycles 2  sooner done
  python -m cem.attack runs/first --knowledge training    the target's images

Exit code: 0; 2 for what a user can mend, such as bad options; 3 if a loss diverged; 130 if it was interrupted.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cem.attacks.config import AttackConfig
from cem.command import Parser, overridden, parse_options, read, read_first, run_command
from cem.errors import UsageError
from cem.options import Options, option
from cem.progress import busy


@dataclass(frozen=True)
class Sources(Options):
    """Where options come from, and where results go.

    Attributes:
        config: Take options from this YAML file, such as the config.yaml of another attack; other options override it.
        out: Directory for the results; without it RUN/attack, and RUN/attack-training, RUN/attack-queriesR for other
            knowledge or more than one query.
    """

    config: Path | None = option(None, group="files")
    out: Path | None = option(None, group="files")


def parse(argv: Sequence[str]) -> tuple[Path, AttackConfig, Path | None]:
    """The run, the options, and where the results go, if not into the run.

    Raises:
        CemError: a file cannot be used, an option cannot be read, or there is no RUN.
        SystemExit: the command line asked for help (0).
    """
    first = read_first(Sources(), argv)
    defaults = AttackConfig() if first.config is None else AttackConfig.from_yaml(first.config)
    base = read(defaults, argv)
    parser = Parser("python -m cem.attack", __doc__, usage="RUN [options]")
    parser.add_argument_group("what is attacked").add_argument(
        "run", metavar="RUN", nargs="?", help="Directory of a finished run."
    )
    parser.add_options(first)
    parser.add_options(base)
    parser.add_members(base)
    given = parse_options(parser, argv, base)
    if given.get("run") is None:
        raise UsageError("which run? python -m cem.attack RUN [options]; RUN comes first")
    config = overridden(base, given).checked()
    if first.out is not None and len(config.knowledge) > 1:
        raise UsageError("--out is for one attack; leave it out, and each --knowledge has a directory in RUN")
    return Path(given["run"]).expanduser(), config, first.out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 2 (bad options), 3 (diverged) or 130 (interrupted, resumable)."""
    return run_command(lambda: _attack(sys.argv[1:] if argv is None else argv))


def _attack(argv: Sequence[str]) -> int:
    run_dir, config, out = parse(argv)
    with busy("loading libraries, the run and its images"):
        from cem.attacks.run import AttackRun  # only here: --help needs nothing that computes

        attacks = [AttackRun(run_dir, each, out) for each in config.of_each_knowledge()]
    for attack in attacks:
        result = attack.run()
        if attack.finished is not None:
            print(f"The attack in {shlex.quote(str(attack.out))} was finished already; nothing was changed.")
        print(table(result))
        print(f"results   {shlex.quote(str(attack.out))}: attack.json, reconstructions.png, curves.png")
    print("next      python -m cem.compare --quick   sets several methods side by side, and writes a report")
    return 0


def table(result: dict[str, Any]) -> str:
    """What an attack found, for people."""
    from cem.attacks.run import FEW_IMAGES

    sizes = result["sizes"]
    trained = result["controls"]["mean_image"].get("train_target")
    rows = [*result["attacks"].items(), ("worst", {"metrics": _values(result["worst"])})]
    if trained:
        rows[-1][1]["train_target"] = _values(result["worst_train_target"])
    rows += [(f"guess: {name.replace('_', ' ')}", scores) for name, scores in result["controls"].items()]
    if result["undefended"] is not None:
        rows.append((f"{result['undefended']['name']}: worst", {"metrics": _values(result["undefended"]["worst"])}))
    width = max(len(name) for name, _ in rows)
    unseen = f"{sizes['scored_test_target']} unseen images"
    head = f"{'':{width}}   MSE      5 % have  PSNR   SSIM   identified"
    lines = [f"{'':{width}}   {unseen:42}"]
    if trained:
        lines[0] += f"   {sizes['scored_train_target']} training images"
        head += "   MSE      SSIM"
    lines.append(head)
    for name, scores in rows:
        lines.append(f"{name:{width}}{_cells(scores.get('metrics'), scores.get('train_target'))}".rstrip())
    chance = result["controls"]["mean_image"]["metrics"]
    lines.append(
        f"knowledge: {result['knowledge']}; identified: of {chance['candidates']:.0f} images of a class on average, "
        f"{chance['chance']:.1%} by chance"
    )
    lines += [f"{name}: {each['note']}" for name, each in result["attacks"].items() if each["note"]]
    if sizes["attacker_train"] < FEW_IMAGES:
        lines.append(f"a weak attacker: it had only {sizes['attacker_train']} images to learn from")
    nats = result["information"]["nats"]
    if nats is None:
        lines.append("information in the features, not measured by attacking: unbounded without noise")
    else:
        lines.append(f"information in the features, not measured by attacking: at most about {nats:.0f} nats")
    return "\n".join(lines)


def _values(worst: dict[str, Any]) -> dict[str, float | None]:
    return {metric: each["value"] for metric, each in worst.items()}


def _cells(unseen: dict[str, Any] | None, trained: dict[str, Any] | None) -> str:
    found = ""
    if unseen:
        ssim = "    -" if unseen["ssim"] is None else f"{unseen['ssim']:5.3f}"
        errors = f"   {unseen['mse']:.5f}  {unseen['mse_p05']:.5f}   {unseen['psnr']:5.2f}"
        found = f"{errors}  {ssim}  {unseen['identified']:6.1%}"
    if trained:
        ssim = "    -" if trained["ssim"] is None else f"{trained['ssim']:5.3f}"
        found = f"{found:48}   {trained['mse']:.5f}  {ssim}"
    return found


if __name__ == "__main__":
    sys.exit(main())
