"""Every option of an attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cem.attacks.decoders import DECODER_NAMES, build_decoder
from cem.attacks.losses import LOSSES
from cem.options import ConfigError, Options, option, resolve_device


@dataclass
class AttackConfig(Options):
    """The options of one attack on a trained run.

    Constructing one checks nothing; :meth:`validate` does. ``tyro`` makes the command line of
    ``python -m cem.attack`` from these fields, and the text under each of them is its help.
    """

    attackers: tuple[str, ...] = ("res_normN4C32", "res_normN8C64", "res_normN8C64:ssim", "deconvC64:l1")
    """Decoders to train, as DECODER or DECODER:LOSS. The strongest on the attacker's validation images counts.
    Decoders: res_normN8C64 has 8 residual blocks of 64 channels, other numbers make smaller and larger ones;
    deconvC64 has transposed convolutions only. Losses: mse (default), l1, ssim (1 − SSIM + MSE)."""
    queries: int = 1
    """The attacker sees every image this many times and averages: independent noise falls to σ²/QUERIES.
    A defense that is noise alone gives way; one that keeps little of the image does not."""
    aux_size: int | None = None
    """The attacker's own training images; without it, all that the target's training left unused."""
    score_size: int | None = None
    """Score on this many images of the test set, and as many of the target's training set; without it, on as
    many as both have."""

    cycle_epochs: int = 5
    """Passes over the attacker's images in the first cosine cycle of the learning rate; each further cycle is
    twice as long."""
    max_epochs: int = 75
    """Bound on the passes. Cycles follow one another while the validation error still falls, and only whole ones
    are run: 5, 15, 35, 75, 155, ... epochs with --cycle-epochs 5. A decoder whose error was falling when the bound
    came is reported as not converged."""
    tolerance: float = 0.03
    """A decoder has converged when a cycle, twice as long as the one before, lowered the validation MSE by less
    than this fraction."""
    batch_size: int = 64
    """Images in a step of a decoder's training."""
    lr: float = 2e-3
    """Learning rate of Adam at the start of every cycle; it falls to a hundredth."""
    amp: bool = False
    """Train decoders under bfloat16 autocast: up to three times faster where the processor has the instructions.
    Validation and scores are in fp32 all the same."""

    white_box_images: int = 16
    """Images for the white-box attack, which knows the encoder's weights and optimizes pixels; 0 skips it."""
    white_box_steps: int = 300
    """Steps of Adam on those pixels."""

    control: Path | None = None
    """A run without a penalty under the same noise, attacked before in the same way, whose figures stand beside
    this one's, and to which the information is related. Without it: one beside this run, if there is any."""
    data_root: Path | None = None
    """Folder of the data set, if it is no longer where the run had it."""
    seed: int = 0
    """Seed of decoders' weights, order of images, noise, and everything else that is random."""
    device: str = "auto"
    """Where to compute: auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""

    def validate(self) -> None:
        """Check types and ranges.

        Raises:
            ConfigError: naming the option, what it takes and what it got.
        """
        self.convert()
        if not self.attackers:
            raise ConfigError("--attackers needs at least one DECODER or DECODER:LOSS")
        for name in self.attackers:
            parse_attacker(name)
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{option(name)} must be at least {least}, got {value}")
        for name in ("lr", "tolerance"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{option(name)} must be finite and above 0, got {getattr(self, name)}")
        if not self.seed < 2**32:
            raise ConfigError(f"--seed must be below 2**32, got {self.seed}")
        resolve_device(self.device)

    @property
    def directory(self) -> str:
        """Name of the attack's directory inside the run's, unless it is asked for elsewhere."""
        return "attack" if self.queries == 1 else f"attack-queries{self.queries}"

    def changed(self, after: AttackConfig) -> list[str]:
        """Describe the options that decide an attack's numbers and differ: ``["--lr (was 0.001, got 0.01)"]``."""
        old, new = self.to_dict(), after.to_dict()
        return [
            f"{option(name)} (was {old[name]}, got {new[name]})"
            for name in new
            if name not in _HARMLESS and old[name] != new[name]
        ]


_AT_LEAST = {
    **dict.fromkeys(("queries", "aux_size", "score_size", "cycle_epochs", "max_epochs", "batch_size"), 1),
    **dict.fromkeys(("white_box_images", "seed"), 0),
    "white_box_steps": 1,
}

_HARMLESS = frozenset({"device", "data_root", "control"})  # where it is computed, and what stands beside it


def parse_attacker(name: str) -> tuple[str, str]:
    """``"res_normN8C64:ssim"`` → ``("res_normN8C64", "ssim")``; the loss is ``mse`` if it is left out.

    Raises:
        ConfigError: there is no such decoder or loss.
    """
    decoder, _, loss = name.partition(":")
    loss = loss or "mse"
    if loss not in LOSSES:
        raise ConfigError(f"--attackers {name}: the loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    try:
        build_decoder(decoder, (1,), (1, 1, 1))
    except ValueError:
        raise ConfigError(f"--attackers {name}: decoders are named like {DECODER_NAMES}") from None
    return decoder, loss
