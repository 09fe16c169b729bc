"""What an attack is given, what it returns, and how it says how far it is."""

from __future__ import annotations

import logging
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from cem.attacks.observe import observe
from cem.data import ImageSet
from cem.errors import CheckpointError
from cem.models import SplitModel
from cem.models.split import ImageShape
from cem.options import Options as BaseOptions
from cem.training import checkpoint

O = TypeVar("O", bound=BaseOptions)  # noqa: E741

VAL = "val"
"""Set of the attacker's own validation images, on which everything inside an attack is chosen."""
UNSEEN = "test_target"
"""Set of images that nobody has seen: the figures that count."""
TRAINED = "train_target"
"""Set of images that the target was trained on."""


@dataclass(frozen=True)
class Exposed:
    """What of a run lies open to attackers: never an image that they are judged on.

    Attributes:
        model: the target, in evaluation mode, its parameters frozen, on its device. An attack that claims to know less
            leaves ``encoder`` alone.
        sent: by set, features ``[N, *feature_shape]`` of the images to be reconstructed as they crossed the cut, the
            mean over ``queries``, on the CPU: :data:`UNSEEN`, :data:`TRAINED` (not where the attacker was trained on
            such images), and :data:`VAL`, the attacker's own validation images. Drawn once: all attacks see the same
            noise.
        intercepted: ``[M, *feature_shape]``, features of other images, of which the attacker has nothing else; disjoint
            from all sets above.
        num_classes: labels are below this.
        image_shape: ``(C, H, W)``.
        queries: how often the attacker sees every image.
        seed: of all that an attack draws.
    """

    model: SplitModel
    sent: Mapping[str, Tensor]
    intercepted: Tensor
    num_classes: int
    image_shape: ImageShape
    queries: int
    seed: int

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.model.parameters()).device

    def observe(self, images: Tensor) -> Tensor:
        """Features of images ``[B, C, H, W]`` of one's own as they cross the cut, under new draws of the defense."""
        return observe(self.model, images, self.queries)


@dataclass(frozen=True)
class Own:
    """The images that the attacker has, with their labels.

    Attributes:
        train: to learn from.
        val: to choose with; ``Exposed.sent["val"]`` are theirs, in this order.
    """

    train: ImageSet
    val: ImageSet


Guesses = dict[str, Tensor]
"""By set, reconstructions ``[n, C, H, W]`` of its first images, float32 in [0, 1], on the CPU."""


@dataclass
class Record:
    """What came of an attack.

    Attributes:
        guesses: by candidate. Where there are several, each has guesses of :data:`VAL` too, and for every metric the
            one that does best on those counts.
        facts: plain values for ``attack.json``; ``converged`` (``None`` where nothing converges) and ``note`` (what
            the figures should be read with, or empty) among them; ``curves``, where networks were trained: of each
            ``name``, ``curve`` (rows with ``epoch`` and ``val_mse``), ``best_epoch``, ``converged``.
        network: for attacks that start from this one: features on the model's device to images, in evaluation mode.
    """

    guesses: dict[str, Guesses]
    facts: dict[str, Any] = field(default_factory=dict)
    network: nn.Module | None = None

    @property
    def checksum(self) -> int:
        """Of the guesses."""
        found = 0
        for candidate in self.guesses.values():
            for each in candidate.values():
                found = zlib.crc32(each.contiguous().numpy().data, found)
        return found


def seconds_of(step: Callable[[], object]) -> float:
    """How long ``step`` takes on its second call; the first pays for what is set up once."""
    step()
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


class Progress:
    """How an attack says how far it is, and keeps what would be dear to compute again.

    Args:
        log: of the attack.
        folder: of its files.
        key: all that the attack's numbers depend on, as plain values.
        earlier: records of attacks that were finished before, by name.
        show: takes the fraction that is done, and what is being done.
    """

    def __init__(
        self,
        log: logging.Logger,
        folder: Path,
        key: Mapping[str, Any],
        earlier: Mapping[str, Record] = {},
        show: Callable[[float, str], None] = lambda done, what: None,
    ) -> None:
        self.log, self.folder, self.key, self.earlier, self.show = log, folder, dict(key), earlier, show

    def keep(self, name: str, content: Mapping[str, Any]) -> None:
        """Write ``content`` (tensors and plain values) to ``folder/name.pt``, complete or not at all.

        Raises:
            MachineError: it cannot be written.
        """
        checkpoint.save(self.folder / f"{name}.pt", {**content, "key": self.key})

    def kept(self, name: str, layout: Mapping[str, Any] = {}) -> dict[str, Any] | None:
        """What :meth:`keep` wrote under the same key, or ``None``; what is damaged is said and forgotten.

        Args:
            name: of the file.
            layout: see :func:`cem.training.checkpoint.expect`.
        """
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return None
        try:
            content = checkpoint.load(path, {**layout, "key": dict})
        except CheckpointError as error:
            self.log.warning("%s; computing it again", error)
            return None
        return content if content["key"] == self.key else None


class Attack(ABC, Generic[O]):
    """Reconstructs images from features.

    It is constructed without arguments and holds nothing: all that a run of it needs are its arguments.

    Attributes:
        name: what ``--attacks`` calls it.
        summary: one line for ``--help``.
        Options: its options.
        needs: attacks whose records it starts from, where they were asked for; they are run before it.
        required: whether it cannot do without those.
        bounds: options that only say how far to go: with a larger one, an attack goes on from where it was.
        first_look: options with which it is soon done, and not at its strongest.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    needs: ClassVar[Sequence[str]] = ()
    required: ClassVar[bool] = False
    bounds: ClassVar[Sequence[str]] = ()
    first_look: ClassVar[Mapping[str, Any]] = {}

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of an attack without options."""

    def check(self, target: Exposed, own: Own, options: O) -> None:
        """Raise :class:`~cem.errors.UsageError` where it cannot be run on this target, before anything is."""

    @abstractmethod
    def forecast(self, target: Exposed, own: Own, options: O) -> float:
        """Seconds that it takes at most; steps are timed for it."""

    @abstractmethod
    def run(self, target: Exposed, own: Own, options: O, progress: Progress) -> Record:
        """Attack.

        Args:
            target: what lies open.
            own: what the attacker has.
            options: an instance of :attr:`Options`.
            progress: to be told how far it is.

        Raises:
            DivergedError: a loss is not finite.
        """
