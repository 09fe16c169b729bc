"""Everything of a run that changes while it trains: built from its options, saved, restored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from cem.data import ImageSet, load_data, make_loader
from cem.data.images import Batch
from cem.options import resolve_device
from cem.surrogates import NoSurrogate, Surrogate, build_surrogate
from cem.training import checkpoint, runs
from cem.training.config import TrainConfig
from cem.training.evaluation import isolated_random
from cem.training.schedule import lr_factor


class TrainState:
    """Data, model, surrogate, optimizers and counters of one run.

    Attributes:
        model: the :class:`~cem.models.SplitModel`, on ``device``.
        surrogate: the penalty, or ``None`` if the run has none.
        optimizers: ``sgd`` for the network (and a shared surrogate), ``surrogate`` for one that trains
            separately.
        scheduler: of ``sgd``; stepped after every step.
        train, plain_train, val, test: loaders of ``(images, labels)``. ``plain_train`` is ``train`` in order
            and without augmentation.
        history: a dict per finished epoch, with the columns of ``metrics.csv``.
        skipped: steps so far whose penalty was not finite.
        best: ``(weight of the penalty relative to λ, validation accuracy)`` of the best epoch so far.
        best_epoch: its number, from 1; 0 before the first.

    Raises:
        ValueError: data set, architecture or surrogate refuse their options.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.history: list[dict[str, float]] = []
        self.skipped = 0
        self.best: tuple[float, float] = (-1.0, -1.0)
        self.best_epoch = 0
        checkpoint.seed_everything(config.seed)
        self._load_data()
        self.model = runs.build_model(config, self.data_facts).to(self.device)
        if config.amp:  # the layout for which processors have fast bfloat16 convolutions
            self.model = self.model.to(memory_format=torch.channels_last)
        # Before the optimizers and the first checkpoint: a surrogate that appears later is in neither.
        self.surrogate = self._build_surrogate() if config.penalized else None
        self._build_optimizers()
        self.random = checkpoint.random_state(self._shuffle, self.device)

    def warm_start(self, init_from: Path) -> None:
        """Take the model's weights from another run's directory, or from a checkpoint file.

        Raises:
            CheckpointError: it is missing, damaged or another model's.
        """
        path = init_from / "best.pt" if init_from.is_dir() else init_from
        runs.load_weights(self.model, checkpoint.load(path), path)

    def parts(self) -> dict[str, nn.Module]:
        """The modules by the names they have in a checkpoint."""
        return {
            "encoder": self.model.encoder,
            "defense": self.model.defense,
            "server": self.model.server,
            "surrogate": self.surrogate or NoSurrogate(),
        }

    def save(self, path: Path) -> None:
        """Write all of it, and the random states, to ``path``."""
        self.random = checkpoint.random_state(self._shuffle, self.device)
        checkpoint.save(
            path,
            {
                **{name: part.state_dict() for name, part in self.parts().items()},
                "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
                "scheduler": self.scheduler.state_dict(),
                "random": self.random,
                "config": self.config.to_dict(),
                "data_facts": self.data_facts,
                "data_fingerprint": self.data_fingerprint,
                "history": self.history,
                "skipped": self.skipped,
                "best": self.best,
                "best_epoch": self.best_epoch,
            },
        )

    def restore(self, path: Path) -> None:
        """Inverse of :meth:`save`.

        Raises:
            CheckpointError: ``path`` is missing, damaged or another model's.
            ConfigError: it was written under other options, or on other data.
        """
        content = checkpoint.load(path)
        runs.check_same(TrainConfig.from_dict(content["config"]), self.config, path.parent)
        runs.check_same_data(content.get("data_fingerprint", {}), self.data_fingerprint, path.parent)
        for name, part in self.parts().items():
            checkpoint.load_state(part, content, name, path)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
        self.scheduler.load_state_dict(content["scheduler"])
        self.history, self.skipped = content["history"], content["skipped"]
        self.best, self.best_epoch = content["best"], content["best_epoch"]
        self.random = content["random"]

    def rewind_random(self) -> None:
        """Put all random states where construction or the last :meth:`save` or :meth:`restore` left them."""
        checkpoint.restore_random_state(self.random, self._shuffle, self.device)

    def _load_data(self) -> None:
        config = self.config
        self.data = load_data(
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
            self.data.train,
            config.batch_size,
            shuffle=True,
            generator=self._shuffle,
            num_workers=config.num_workers,
        )
        self.plain_train = in_order(replace(self.data.train, augment=None))
        self.val, self.test = in_order(self.data.val), in_order(self.data.test)
        self.data_facts = {
            "num_classes": self.data.num_classes,
            "image_shape": self.data.image_shape,
            "mean": self.data.mean,
            "std": self.data.std,
        }
        self.data_fingerprint = runs.data_fingerprint(self.data)

    def _build_surrogate(self) -> Surrogate:
        config = self.config
        # Runs of one seed under different surrogates begin with the same weights, order of samples and noise.
        with isolated_random(config.seed, self.device):
            surrogate = build_surrogate(
                config.surrogate,
                feature_shape=self.model.feature_shape,
                num_classes=self.data.num_classes,
                noise_std=config.noise_std,
                var_threshold=config.var_threshold,
                measure=config.measure,
                penalty=config.penalty,
                hinge=config.hinge,
                threshold=config.threshold,
                threshold_value=config.threshold_value,
                threshold_quantile=config.threshold_quantile,
                eps_var=config.eps_var,
                gamma=config.gamma,
                objective=config.surrogate_objective,
                anchor=config.anchor,
                memory_bank=config.memory_bank,
                num_slots=config.num_slots,
                tokens=config.tokens,
                reduce=config.reduce,
                reduce_dim=config.reduce_dim,
                gmm_fit=config.gmm_fit,
                backend=config.backend,
                sigmoid=config.arch.endswith("_sgm"),
            ).to(self.device)
        return surrogate.requires_grad_(config.surrogate_policy != "frozen")

    def _build_optimizers(self) -> None:
        config = self.config
        trained = list(self.model.parameters())
        own = list(self.surrogate.parameters()) if self.surrogate is not None else []
        if config.surrogate_policy == "shared":
            trained += own
        sgd = torch.optim.SGD(trained, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        self.optimizers: dict[str, torch.optim.Optimizer] = {"sgd": sgd}
        if own and config.surrogate_policy == "separate":
            self.optimizers["surrogate"] = torch.optim.Adam(own, lr=config.surrogate_lr)
        self.scheduler = LambdaLR(sgd, lr_factor(config.epochs, len(self.train), config.warmup_epochs))
