"""What would end a run early, found before the first one begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from cem.attacks.base import TRAINED, UNSEEN, VAL, Exposed, Own
from cem.attacks.config import AttackConfig
from cem.attacks.splits import attack_splits
from cem.comparison.config import Comparison
from cem.comparison.grid import Run
from cem.data import DataSplits, load_data
from cem.models import SplitModel
from cem.training.state import TrainState


def rehearse(comparison: Comparison, runs: Sequence[Run]) -> None:
    """Build what every training begins with, share out the images as every attack will, and let attacks look at both.

    Nothing is written but images that are to be downloaded. Of runs that differ in their seed alone one is rehearsed,
    on the CPU: a process that only waits for others needs no memory of a GPU.

    Raises:
        CemError: what ``cem.train`` or ``cem.attack`` would raise; of a variant, with its name.
    """
    load, attack = cache(load_data), comparison.attack_config()
    for run in {run.setting: run for run in runs}.values():
        with comparison.naming(run), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the runs' logs have them
            config = replace(comparison.train_config(run).checked(), device="cpu")
            own = {name: getattr(config, name) for name in ("train_size", "image_size", "augment", "download")}
            data = load(config.data, config.data_root, **own)
            state = TrainState(config, lambda epoch: 0.0, data=data)
            if config.init_from is not None:
                state.warm_start(config.init_from)
            everything = load(config.data, attack.data_root, image_size=config.image_size)
            with comparison.of_attack():
                for each in attack.of_each_knowledge():
                    _check_attacks(each, state.model.requires_grad_(False).eval(), data, everything)


def _check_attacks(config: AttackConfig, model: SplitModel, data: DataSplits, everything: DataSplits) -> None:
    """What attacks refuse, of a model that is not trained and of blank features."""
    splits = attack_splits(
        data, everything, knowledge=config.knowledge[0], aux_size=config.aux_size, trained_size=config.trained_size
    )
    sizes = {UNSEEN: len(splits.test), TRAINED: len(splits.trained), VAL: len(splits.attacker_val)}
    blank = torch.zeros(1, *model.feature_shape)
    sent = {name: blank.expand(size, *model.feature_shape) for name, size in sizes.items() if size}
    others = blank.expand(len(splits.intercepted), *model.feature_shape)
    exposed = Exposed(model, sent, others, data.num_classes, data.image_shape, config.queries, config.seed)
    for member in config.chosen().values():
        member().check(exposed, Own(splits.attacker_train, splits.attacker_val), config.options_of(member.name))
