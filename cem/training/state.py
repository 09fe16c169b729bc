"""Everything of a run that changes while it trains: built from its options, saved, restored."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from cem.data import DataSplits, ImageSet, load_data, make_loader
from cem.data.images import Batch
from cem.defenses import Chain
from cem.errors import CheckpointError, UsageError
from cem.machine import check_fits
from cem.options import resolve_device
from cem.surrogates import SURROGATES
from cem.training import checkpoint, runs
from cem.training.config import TrainConfig
from cem.training.evaluation import isolated_random
from cem.training.runlog import COLUMNS
from cem.training.schedule import lr_factor
from cem.training.weighted import WeightedTerm

SURROGATE = "surrogate"
_COUNTERS = ("random", "history", "skipped", "best", "best_epoch")
_COLUMNS = {"loss": "rob_loss", "intra_mse": "intra_mse", "weight": "lambda_eff", "seconds": "surrogate_seconds"}


class TrainState:
    """Data, model, terms, optimizers and counters of one run.

    Args:
        config: checked and resolved.
        share: weight of the surrogate in an epoch, counted from 0.
        data: what ``config`` says to load, where that was done already.

    Attributes:
        model: the :class:`~cem.models.SplitModel` with its defenses, on ``device``.
        defenses: what lies at the cut, a part of ``model``.
        terms: what adds to the loss: the surrogate, if the run has one, then those of defenses.
        optimizers: ``sgd`` for the network and what terms share with it; those of terms, ``TERM.NAME``.
        scheduler: of ``sgd``; stepped after every step.
        train, plain_train, val, test: loaders of ``(images, labels)``. ``plain_train`` is ``train`` in order
            and without augmentation.
        history: a dict per finished epoch, with the columns of ``metrics.csv``.
        skipped: steps so far in which a term was not finite, by its key.
        best: ``(weight of the penalty relative to λ, validation accuracy)`` of the best epoch so far.
        best_epoch: its number, from 1; 0 before the first.

    Raises:
        CemError: data set, architecture, surrogate or a defense refuse their options.
    """

    def __init__(self, config: TrainConfig, share: Callable[[int], float], *, data: DataSplits | None = None) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.history: list[dict[str, float]] = []
        self.skipped: dict[str, int] = {}
        self.best: tuple[float, float] = (-1.0, -1.0)
        self.best_epoch = 0
        checkpoint.seed_everything(config.seed)
        self._load_data(data)
        self._check_memory()
        self.model = runs.build_model(config, self.data_facts).to(self.device)
        if config.amp:  # the layout for which processors have fast bfloat16 convolutions
            self.model = self.model.to(memory_format=torch.channels_last)
        self._check_lone_sample()
        assert isinstance(self.model.defense, Chain)
        self.defenses = self.model.defense
        # Before the optimizers and the first checkpoint: a term that appears later is in neither.
        self.terms = self._build_terms(share)
        self._build_optimizers()
        self.random = checkpoint.random_state(self._shuffle, self.device)

    def warm_start(self, init_from: Path) -> None:
        """Take encoder and server from another run's directory, or from a checkpoint file; its defenses may be others.

        Raises:
            CheckpointError: it is missing, damaged or another model's.
        """
        path = init_from / "best.pt" if init_from.is_dir() else init_from
        runs.load_weights(self.model, checkpoint.load(path), path, ("encoder", "server"))

    def parts(self) -> dict[str, nn.Module]:
        """The modules by the names they have in a checkpoint."""
        return {**self._network(), **{each.key: each.term for each in self.terms}}

    def _network(self) -> dict[str, nn.Module]:
        return {"encoder": self.model.encoder, "defense": self.model.defense, "server": self.model.server}

    def save(self, path: Path, *, resumable: bool = True) -> None:
        """Write all of it, and the random states, to ``path``; terms and optimizers only where it is to be resumed.

        Whoever gets the model gets none of what terms remember: some remember images.
        """
        self.random = checkpoint.random_state(self._shuffle, self.device)
        parts, optimizers = (self.parts(), self.optimizers) if resumable else (self._network(), {})
        content: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        content["optimizers"] = {name: each.state_dict() for name, each in optimizers.items()}
        content |= {"scheduler": self.scheduler.state_dict(), "config": self.config.to_dict()}
        content |= {name: getattr(self, name) for name in ("data_facts", "data_fingerprint", *_COUNTERS)}
        checkpoint.save(path, content)

    def restore(self, path: Path) -> None:
        """Inverse of :meth:`save`.

        Raises:
            CheckpointError: ``path`` is missing, damaged or another model's.
            UsageError: it was written under other options, or on other data.
        """
        content = checkpoint.load(path, checkpoint.RUN)
        with checkpoint.fitting(path, "config"):
            before = TrainConfig.from_dict(content["config"])
        runs.check_same(before, self.config, path.parent)
        runs.check_same_data(content["data_fingerprint"], self.data_fingerprint, path.parent)
        if before.threads not in (None, self.config.threads):
            warnings.warn(
                f"{before.threads} threads so far, {self.config.threads} from here on: last digits may differ from "
                f"those of a run without a break; --threads {before.threads} keeps them",
                stacklevel=2,
            )
        for name, part in self.parts().items():
            checkpoint.load_state(part, content, name, path)
        for name, optimizer in self.optimizers.items():
            checkpoint.load_optimizer(optimizer, content, name, path)
        checkpoint.expect(path, "scheduler", self.scheduler.state_dict(), content["scheduler"])
        self.scheduler.load_state_dict(content["scheduler"])
        checkpoint.check_random_state(content["random"], self._shuffle, self.device, path)
        rows, best = content["history"], content["best_epoch"]
        if not 0 <= best <= len(rows) or any(set(COLUMNS) - row.keys() for row in rows):
            raise CheckpointError(
                f"{path} does not fit: best_epoch {best} is not in the history, or columns are missing"
            )
        for name in _COUNTERS:
            setattr(self, name, content[name])

    def rewind_random(self) -> None:
        """Put all random states where construction or the last :meth:`save` or :meth:`restore` left them."""
        checkpoint.restore_random_state(self.random, self._shuffle, self.device)

    def _load_data(self, data: DataSplits | None) -> None:
        config = self.config
        self.data = data or load_data(
            config.data,
            config.data_root,
            train_size=config.train_size,
            image_size=config.image_size,
            augment=config.augment,
            download=config.download,
        )
        self._shuffle = torch.Generator().manual_seed(config.seed)

        def in_order(images: ImageSet) -> DataLoader[Batch]:
            return make_loader(images, config.batch_size, shuffle=False, num_workers=config.num_workers)

        self.train = make_loader(
            self.data.train, config.batch_size, shuffle=True, generator=self._shuffle, num_workers=config.num_workers
        )
        self.plain_train = in_order(replace(self.data.train, augment=None))
        self.val, self.test = in_order(self.data.val), in_order(self.data.test)
        facts = ("num_classes", "image_shape", "mean", "std")
        self.data_facts = {name: getattr(self.data, name) for name in facts} | {"train_size": len(self.data.train)}
        self.data_fingerprint = runs.data_fingerprint(self.data)

    def _check_lone_sample(self) -> None:
        """Batch normalization cannot train on one value a channel, as one sample is where its map is a single pixel."""
        config = self.config
        if min(config.batch_size, len(self.data.train)) > 1:
            return
        twin = copy.deepcopy(self.model).train()
        try:
            with isolated_random(config.seed, self.device), torch.no_grad():
                twin(torch.zeros(1, *self.data.image_shape, device=self.device))
        except ValueError as error:
            name = "--batch-size" if config.batch_size == 1 else "--train-size"
            network = f"{config.arch} with an adapter" if config.adapter else config.arch
            raise UsageError(
                f"{name} 1: {network} normalizes over batches, for which images of this size must be at least 2"
            ) from error

    def _check_memory(self) -> None:
        """Refuse what cannot fit: systems that promise more memory than they have kill whoever believes them."""
        with torch.device("meta"), isolated_random(self.config.seed, torch.device("cpu")):
            model = runs.build_undefended(self.config, self.data_facts)
        samples = min(self.config.batch_size, len(self.data.train))
        # Weights, their gradients and momenta; features, what is sent of them, and the gradients of both.
        numbers = 3 * sum(each.numel() for each in model.parameters()) + 4 * samples * math.prod(model.feature_shape)
        check_fits(4 * numbers, self.device, "the model", "--bottleneck or --batch-size")

    def _build_terms(self, share: Callable[[int], float]) -> list[WeightedTerm]:
        config, found = self.config, []
        first = config.first_penalized - 1
        if config.penalized:
            context = runs.context_of(config, self.model, self.data_facts)
            name = config.surrogate_name
            # Runs of one seed under different surrogates begin with the same weights, order of samples and noise.
            with isolated_random(config.seed, self.device):
                surrogate = SURROGATES.build(config.surrogate, context, config.options_of(name))
            found.append(WeightedTerm(SURROGATE, name, surrogate.to(self.device), share, first, self.device, _COLUMNS))
        for name, term in self.defenses.terms.items():
            weight = partial(_constant_from, first, self.defenses.weights[name])
            found.append(WeightedTerm(f"defenses.{name}", name, term.to(self.device), weight, first, self.device))
        return found

    def _build_optimizers(self) -> None:
        config = self.config
        # A defense may hold its term as a part: what is the term's own is not the network's.
        own = {id(parameter) for each in self.terms for parameter in each.term.parameters()}
        network = [parameter for parameter in self.model.parameters() if id(parameter) not in own]
        network += [parameter for each in self.terms for parameter in each.term.shared_parameters()]
        sgd = torch.optim.SGD(network, lr=config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay)
        self.optimizers: dict[str, torch.optim.Optimizer] = {"sgd": sgd}
        for each in self.terms:
            self.optimizers |= {f"{each.key}.{name}": own for name, own in each.term.optimizers().items()}
        factor = lr_factor(config.epochs, len(self.train), config.warmup_epochs, config.lr_schedule)
        self.scheduler = LambdaLR(sgd, factor)


def _constant_from(first: int, weight: float, epoch: int) -> float:
    return weight if epoch >= first else 0.0
