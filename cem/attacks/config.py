"""Every option of an attack."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cem.errors import UsageError
from cem.options import Options, differences, option, resolve_device

LOSS_NAMES = ("mse", "l1", "ssim")

_images = partial(option, group="what the attacker has")
_decoders = partial(option, group="decoders")
_white_box = partial(option, group="white box")
_run = partial(option, group="run")


@dataclass(frozen=True)
class AttackConfig(Options):
    """The options of one attack on a trained run.

    Constructing one checks nothing; :meth:`checked` does.

    Attributes:
        queries: The attacker sees every image this many times and averages: independent noise falls to σ²/QUERIES. A
            defense that is noise alone gives way; one that keeps little of the image does not.
        aux_size: The attacker's own training images; without it, all that the target's training left unused.
        score_size: Score on this many images of the test set, and as many of the target's training set; without it, on
            as many as both have.
        attackers: Decoders to train, as DECODER or DECODER:LOSS. The strongest on the attacker's validation images
            counts. Decoders: res_normN8C64 has 8 residual blocks of 64 channels, other numbers make smaller and larger
            ones; deconvC64 has transposed convolutions only. Losses: mse (without LOSS), l1, ssim (1 - SSIM + MSE).
        cycle_epochs: Passes over the attacker's images in the first cosine cycle of the learning rate; each further
            cycle is twice as long.
        max_epochs: Bound on the passes. Cycles follow one another while the validation error still falls, and only
            whole ones are run: 5, 15, 35, 75, 155, ... epochs with --cycle-epochs 5. A decoder whose error was falling
            when the bound came is reported as not converged.
        tolerance: A decoder has converged when a cycle, twice as long as the one before, lowered the validation MSE by
            less than this fraction.
        batch_size: Images in a step of a decoder's training.
        lr: Learning rate of Adam at the start of every cycle; it falls to a hundredth.
        amp: Train decoders under bfloat16 autocast: up to three times faster where the processor has the instructions.
            Validation and scores are in fp32 all the same.
        white_box_images: Images for the white-box attack, which knows the encoder's weights and optimizes pixels; 0
            skips it.
        white_box_steps: Steps of Adam on those pixels.
        control: A run without a penalty under the same noise, attacked before in the same way, whose figures stand
            beside this one's, and to which the information is related. Without it: one beside this run, if there is
            any.
        data_root: Folder of the data set, if it is no longer where the run had it.
        seed: Seed of decoders' weights, order of images, noise, and everything else that is random.
        device: Where to compute: auto (CUDA if there is one), cpu, cuda, cuda:1, ...
    """

    queries: int = _images(1, least=1)
    aux_size: int | None = _images(None, least=1)
    score_size: int | None = _images(None, least=1)

    attackers: tuple[str, ...] = _decoders(("res_normN4C32", "res_normN8C64", "res_normN8C64:ssim", "deconvC64:l1"))
    cycle_epochs: int = _decoders(5, least=1)
    max_epochs: int = _decoders(75, least=1)
    tolerance: float = _decoders(0.03, above=0)
    batch_size: int = _decoders(64, least=1)
    lr: float = _decoders(0.002, above=0)
    amp: bool = _decoders(False)

    white_box_images: int = _white_box(16, least=0)
    white_box_steps: int = _white_box(300, least=1)

    control: Path | None = _run(None, harmless=True)
    data_root: Path | None = _run(None, harmless=True)
    seed: int = _run(0, least=0, below=2**32)
    device: str = _run("auto", harmless=True)

    def check(self) -> None:
        """What no option can say alone."""
        if not self.attackers:
            raise UsageError("--attackers needs at least one DECODER or DECODER:LOSS")
        parsed = [parse_attacker(name) for name in self.attackers]
        twice = next((each for each in parsed if parsed.count(each) > 1), None)
        if twice is not None:
            raise UsageError(f"--attackers takes every decoder and loss once, got {':'.join(twice)} twice")
        resolve_device(self.device)

    @property
    def directory(self) -> str:
        """Name of the attack's directory inside the run's, unless it is asked for elsewhere."""
        return "attack" if self.queries == 1 else f"attack-queries{self.queries}"

    def changed(self, after: AttackConfig) -> list[str]:
        """Describe the options that decide an attack's numbers and differ: ``["--lr (was 0.001, got 0.01)"]``."""
        return differences(self, after, ("device", "data_root", "control"))


def parse_attacker(name: str) -> tuple[str, str]:
    """``"res_normN8C64:ssim"`` → ``("res_normN8C64", "ssim")``; the loss is ``mse`` if it is left out.

    Raises:
        UsageError: there is no such decoder or loss.
    """
    from cem.attacks.decoders import DECODER_NAMES, parse_decoder

    decoder, _, loss = name.partition(":")
    loss = loss or "mse"
    if loss not in LOSS_NAMES:
        raise UsageError(f"--attackers {name}: the loss must be one of {', '.join(LOSS_NAMES)}, got {loss!r}")
    try:
        parse_decoder(decoder)
    except ValueError:
        raise UsageError(f"--attackers {name}: decoders are named like {DECODER_NAMES}") from None
    return decoder, loss
