"""A finished run, as an attack meets it: the trained model, and whose images are whose."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from cem.attacks.base import TRAINED, UNSEEN, VAL, Exposed, Own
from cem.attacks.config import AttackConfig
from cem.attacks.information import information_report
from cem.attacks.observe import observe
from cem.attacks.splits import attack_splits, pick
from cem.data import DataSplits, load_data, make_loader
from cem.defenses import Chain
from cem.errors import DataError, UsageError
from cem.models import CLIENT_COSTS
from cem.progress import over
from cem.training import checkpoint, runs
from cem.training.evaluation import collect_features, isolated_random

INFORMATION_IMAGES = 12_000  # at most, for the information report
INTERCEPTED = 10_000  # images at most of which an attacker sees the features alone
BATCH = 500  # images


class Target:
    """A run to attack.

    Args:
        run_dir: a finished run of ``python -m cem.train``.
        config: of the attack, with one kind of knowledge: how many images, and where data and device are.

    Attributes:
        run_dir: as given.
        config: the run's options.
        model: with the weights of ``best.pt``, in evaluation mode, its parameters frozen.
        device: the model's.
        num_classes: of the data.
        image_shape: ``(C, H, W)``.
        notes: what there is to say of the data.
        splits: whose images are whose.
        judged: by set, how many of its images are reconstructed, and all that they are looked for among.
        checksum: of ``best.pt``.
        data_checksum: of the images and labels of all sets.

    Raises:
        UsageError: ``run_dir`` holds no finished run, its data are others now, or are not found.
        CheckpointError: ``best.pt`` is damaged or another run's.
        DataError: the data cannot be read.
    """

    def __init__(self, run_dir: Path, config: AttackConfig) -> None:
        self.run_dir = run_dir
        summary = runs.read_summary(run_dir)
        if summary is None:
            hint = f"; to finish it: {runs.resume_command(run_dir)}" if (run_dir / "last.pt").exists() else ""
            raise UsageError(f"{run_dir} holds no finished run: there is no summary.json{hint}")
        self._summary = {name: summary.get(name) for name in ("test_accuracy", *CLIENT_COSTS)}
        self.config, self.model = runs.load_run(run_dir, config.device)
        self._facts = checkpoint.load(run_dir / "best.pt")["data_facts"]
        self.model.requires_grad_(False)
        assert isinstance(self.model.defense, Chain)
        self._defenses = self.model.defense
        self.device = next(self.model.parameters()).device
        self.checksum = zlib.crc32((run_dir / "best.pt").read_bytes())
        data, everything = self._load_data(config.data_root or self.config.data_root)
        self.num_classes, self.image_shape, self.notes = data.num_classes, data.image_shape, data.notes
        (knowledge,) = config.knowledge
        self._trained = data.train
        self.splits = attack_splits(
            data, everything, knowledge=knowledge, aux_size=config.aux_size, trained_size=config.trained_size
        )
        self.data_checksum = 0
        for images in vars(self.splits).values():
            for tensor in (images.images, images.labels):
                self.data_checksum = zlib.crc32(tensor.contiguous().numpy().data, self.data_checksum)
        self.judged = {UNSEEN: (min(config.score_size, len(self.splits.test)), self.splits.test)}
        if len(self.splits.trained):
            self.judged[TRAINED] = (len(self.splits.trained), self.splits.trained)

    @torch.no_grad()
    def exposed(self, queries: int, seed: int) -> tuple[Exposed, Own]:
        """What attackers get of it."""
        splits, shown = self.splits, {name: images.subset(range(n)) for name, (n, images) in self.judged.items()}
        shown[VAL] = splits.attacker_val
        intercepted = splits.intercepted.subset(range(min(INTERCEPTED, len(splits.intercepted))))
        with isolated_random(seed, self.device):
            sent = {
                name: torch.cat(
                    [
                        observe(self.model, batch.to(self.device), queries).cpu()
                        for batch, _ in over(make_loader(images, BATCH, shuffle=False), "features")
                    ]
                    or [torch.empty(0, *self.model.feature_shape)]
                )
                for name, images in (*shown.items(), ("", intercepted))
            }
        others = sent.pop("")
        own = Own(splits.attacker_train, splits.attacker_val)
        return Exposed(self.model, sent, others, self.num_classes, self.image_shape, queries, seed), own

    @property
    def noise_std(self) -> float:
        """Standard deviation of the Gaussian noise on clean features, before anything else is done to them."""
        stds = (member.sigma() for member in self._defenses.members().values())
        return math.hypot(*(std for std in takewhile(lambda std: std is not None, stds) if std))

    def facts(self) -> dict[str, Any]:
        """What tells this run from others, as plain values; ``None`` for what a network in one piece does not have."""
        names = (
            *("data", "arch", "centralized", "cut_layer", "adapter", "bottleneck", "surrogate", "lambd"),
            *("noise_std", "defenses", "seed", "epochs", "train_size"),
        )
        options = self.config.to_dict()
        facts = {name: options[name] for name in names}
        if self.config.centralized:
            facts.update(cut_layer=None, adapter=None, bottleneck=None, noise_std=0.0)
        return {"name": self.run_dir.resolve().name, **facts, **self._summary}

    def information(self, config: AttackConfig) -> dict[str, Any]:
        """What its features say of the images that it was trained on, without an attack: see
        :func:`~cem.attacks.information.information_report`."""
        images = pick(replace(self._trained, augment=None), min(INFORMATION_IMAGES, len(self._trained)))
        loader = make_loader(images, BATCH, shuffle=False)
        batches = over(loader, "features")
        features, labels = collect_features(self.model, batches, self.device, config.seed, noisy=False)
        context = runs.context_of(self.config, self.model, self._facts)
        return information_report(
            features,
            labels,
            context=replace(context, noise_std=self.noise_std, backend="auto"),
            queries=config.queries,
            seed=config.seed,
        )

    def _load_data(self, root: Path | None) -> tuple[DataSplits, DataSplits]:
        """The data as the target saw it, and all of it."""
        config = self.config
        try:
            everything = load_data(config.data, root, image_size=config.image_size)
            data = everything
            if config.train_size is not None:
                data = load_data(config.data, root, image_size=config.image_size, train_size=config.train_size)
        except DataError as error:
            raise DataError(f"{error}; --data-root says where the run's data are now") from error
        # Other data would make the four sets overlap in ways that no index shows.
        before = checkpoint.load(self.run_dir / "best.pt")["data_fingerprint"]
        runs.check_same_data(before, runs.data_fingerprint(data), self.run_dir)
        return data, everything
