"""Try to invert what a trained run's client sends. RUN is a directory that python -m cem.train left.

The attacker has images of the same kind that the target never trained on, may send them through the client as often
as it likes, knows the defense, and trains decoders from noisy features back to images until twice the training gains
next to nothing. The decoder that does best on the attacker's own validation images is the one that counts, on images
that nobody has seen (they choose nothing) and on images that the target was trained on. Beside it: a white-box
attack that knows the encoder's weights; guessing the mean image, or the mean image of the right class; an undefended
run, where there is one; and an upper estimate of the information that the features hold.

An attack shows that at least so much leaks. A stronger one may exist.

Everything lies in RUN/attack/: attack.json, reconstructions.png, curves.png, attack.log, images.npz, the decoders.
Ctrl-C keeps the decoders that were finished; the same command goes on from there.

Examples:

  python -m cem.attack runs/first                   four decoders, a white box
  python -m cem.attack runs/first --queries 10      averages noise away
  python -m cem.attack runs/first --max-epochs 15   a first look, sooner done

Exit code: 0; 2 for what a user can mend, such as bad options; 3 if a decoder diverged; 130 if it was interrupted.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cem.attacks.config import AttackConfig
from cem.command import Parser, overridden, parse_options, read_first, run_command
from cem.errors import UsageError
from cem.options import Options, option
from cem.progress import busy


@dataclass(frozen=True)
class Sources(Options):
    """Where options come from, and where results go.

    Attributes:
        config: Take options from this YAML file, such as the config.yaml of another attack; other options override it.
        out: Directory for the results; without it RUN/attack, or RUN/attack-queriesR for more than one query.
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
    parser = Parser("python -m cem.attack", __doc__, usage="RUN [options]")
    parser.add_argument_group("what is attacked").add_argument(
        "run", metavar="RUN", nargs="?", help="Directory of a finished run."
    )
    parser.add_options(first)
    parser.add_options(defaults)
    given = parse_options(parser, argv, defaults)
    if given.get("run") is None:
        raise UsageError("which run? python -m cem.attack RUN [options]; RUN comes first")
    return Path(given["run"]).expanduser(), overridden(defaults, given).checked(), first.out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 2 (bad options), 3 (diverged) or 130 (interrupted, resumable)."""
    return run_command(lambda: _attack(sys.argv[1:] if argv is None else argv))


def _attack(argv: Sequence[str]) -> int:
    run_dir, config, out = parse(argv)
    with busy("loading libraries, the run and its images"):
        from cem.attacks.run import Attack  # only here: --help needs nothing that computes

        attack = Attack(run_dir, config, out)
    result = attack.run()
    if attack.finished is not None:
        print(f"The attack in {shlex.quote(str(attack.out))} was finished already; nothing was changed.")
    print(table(result))
    print(f"results   {shlex.quote(str(attack.out))}: attack.json, reconstructions.png, curves.png")
    print("next      python -m cem.compare --quick   sets several methods side by side, and writes a report")
    return 0


def table(result: dict[str, Any]) -> str:
    """What an attack found, for people."""
    from cem.attacks.run import FEW_IMAGES, longer

    attackers = {record["name"]: record for record in result["attackers"]}
    rows = [(f"strongest decoder, {result['strongest']}", result)]
    if result["most_similar"] not in (None, result["strongest"]):
        rows.append((f"highest SSIM, {result['most_similar']}", attackers[result["most_similar"]]))
    if result["white_box"] is not None:
        images = result["white_box"]["images"]
        rows.append((f"white box, {images} images", result["white_box"]))
        rows.append((f"strongest decoder, the same {images}", result["white_box"]["decoder"]))
    rows += [(f"guess the {name.replace('_', ' ')}", scores) for name, scores in result["controls"].items()]
    if result["undefended"] is not None:
        rows.append((f"without a penalty: {result['undefended']['name']}", result["undefended"]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}   {'unseen images':26}training images", f"{'':{width}}" + "   MSE      PSNR   SSIM " * 2]
    for name, scores in rows:
        cells = "".join(_cells(scores[part]) for part in ("test_target", "train_target"))
        lines.append(f"{name:{width}}{cells}")
    config = AttackConfig.from_dict(result["config"])
    for record in result["attackers"]:
        if not record["converged"]:
            lines.append(f"not converged: {record['name']}; {longer(record, config)}")
    if result["sizes"]["attacker_train"] < FEW_IMAGES:
        lines.append(f"a weak attacker: it had only {result['sizes']['attacker_train']} images to learn from")
    nats = result["information"]["nats"]
    if nats is None:
        lines.append("information in the features: unbounded without noise")
    else:
        lines.append(f"information in the features: about {nats:.0f} nats, an upper estimate; it certifies nothing")
    return "\n".join(lines)


def _cells(scores: dict[str, float | None]) -> str:
    ssim = "    -" if scores["ssim"] is None else f"{scores['ssim']:5.3f}"
    return f"   {scores['mse']:.5f}  {scores['psnr']:5.2f}  {ssim}"


if __name__ == "__main__":
    sys.exit(main())
