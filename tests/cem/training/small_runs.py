"""A small network, small runs of it and what may happen to them, and readers of what they leave."""

import csv
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import cem
from cem.training import TrainConfig, Trainer, read_config, train
from cem.training import checkpoint as checkpoints
from cem.training.injection import INJECTIONS

cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m gpu")]
STEPS = 3
"""Training steps in an epoch of a small run: two of 32 samples and one of 26."""


def small(out, **options):
    """Options of a run that takes a third of a second, of which most is reading digits and writing files."""
    few = {"train_size": 90, "batch_size": 32, "epochs": 3, "penalty_from": 1}
    return TrainConfig(out=out, **{"arch": "tiny", "cut_layer": 1, "device": "cpu", "noise_std": 0.1, **few, **options})


def tiny(num_classes, image_shape):
    """Two convolutions with batch normalization, the second down to one pixel, dropout and a linear layer."""
    stem = nn.Sequential(nn.Conv2d(image_shape[0], 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    body = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Conv2d(8, 32, 4), nn.BatchNorm2d(32), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, num_classes))
    return nn.Sequential(OrderedDict(stem=stem, body=body, head=head))


@contextmanager
def in_each_step(do):
    """Let ``do`` have what each step of a training measured, with its number from 0, before the trainer has it."""
    with pytest.MonkeyPatch.context() as patch:
        numbers = count()
        for name, inject in INJECTIONS.items():

            def injected(*args, inject=inject, **options):
                return do(next(numbers), inject(*args, **options))

            patch.setitem(INJECTIONS, name, injected)
        yield


def interrupt(config, step, *, resume=False):
    """Train until Ctrl-C comes in the middle of step ``step``, counted from 0."""

    def stop(number, measured):
        if number == step:
            raise KeyboardInterrupt
        return measured

    with in_each_step(stop), pytest.raises(KeyboardInterrupt):
        train(config, resume=resume)
    return config.run_dir


def resume(run_dir, **options):
    """Continue a run to its end; return its summary."""
    return fitted(replace(read_config(run_dir), out=run_dir, **options), resume=True).finished


def fitted(config, *, resume=False):
    """A trainer after its training, with what :meth:`Trainer.fit` returned as ``finished``."""
    trainer = Trainer(config, resume=resume)
    trainer.finished = trainer.fit()
    return trainer


def attention(**options):
    """Options of a run under the attention surrogate, narrow, with these of its own."""
    own = cem.SURROGATES["attention"].Options(reduction="linear16", **options)
    return {"surrogate": "attention", "members": {"attention": own}}


def tensors(answer):
    """All tensors of a term's answer."""
    found = [answer.loss, *answer.monitors.values(), answer.finite, answer.features_grad, answer.sent_grad]
    return [each for each in (*found, *answer.own_grads) if each is not None]


def rows(run_dir):
    """``metrics.csv``, without cells that are empty."""
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def weights(run_dir, *parts):
    """All tensors of parts of ``last.pt``, of the network if none is named."""
    content = checkpoints.load(run_dir / "last.pt")
    return [tensor for part in parts or ("encoder", "server") for tensor in content[part].values()]


def content(run_dir):
    """All of a run's ``last.pt`` that must repeat: everything but the times, in plain values and their structure."""
    whole = checkpoints.load(run_dir / "last.pt")
    whole["history"] = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in whole["history"]]
    del whole["config"]["out"], whole["config"]["threads"]
    leaves, structure = tree_flatten(whole)
    return structure, [(each.dtype, each.tolist()) if isinstance(each, Tensor) else each for each in leaves]


def log(run_dir):
    """``train.log``."""
    return (run_dir / "train.log").read_text()


def board(run_dir):
    """Steps of every scalar that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
