"""Every option of a training run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from cem.data import DATASETS
from cem.defenses import DEFENSES, NOISE
from cem.errors import UsageError
from cem.options import Composed, differences, option, resolve_device
from cem.surrogates import CONTROL, RECOMMENDED, SURROGATES
from cem.terms import Family
from cem.training.schedule import Shape
from cem_kernels import backends

PENALTY = "penalty"
LARGEST = torch.finfo(torch.float32).max
"""What is computed with in fp32 cannot be beyond it."""

_data = partial(option, group="data")
_model = partial(option, group="model")
_penalty = partial(option, group=PENALTY)
_defense = partial(option, group="defenses")
_training = partial(option, group="training")
_run = partial(option, group="run")


@dataclass(frozen=True)
class TrainConfig(Composed):
    """The options of one training run; those of chosen members are in ``members``, by the member's name.

    Constructing one checks nothing; :meth:`checked` does, and the trainer calls it.

    Attributes:
        data: Data set. digits comes with scikit-learn and needs no download. folder reads yours:
            DATA_ROOT/train/CLASS/* and DATA_ROOT/test/CLASS/* (or val), or DATA_ROOT/CLASS/*, or TinyImageNet as it
            is published.
        data_root: Folder of the data set, or where it is downloaded to. Without it: data/ and the name of the data set.
        download: Fetch the data set if it is not there yet.
        train_size: Train on this many images only, with every class in proportion. cem.attack learns from the others:
            leave it some. Without it all are trained on, and an attacker has only those for validation.
        image_size: Resize images to this height and width, in pixels. Without it, images of a folder keep the size that
            all of them have, and get 64 by 64 where sizes differ.
        augment: Crop and mirror training images at random; for cifar10, cifar100, svhn (crop only) and folder.
        num_workers: Processes that load images; 0 loads them in the training process.
        arch: Network to split: resnet20, resnet32, vgg11, vgg11_bn, vgg13, vgg13_bn, mobilenetv2,
            convnet32, convnet64, convnet32_pool or convnet64_pool. With _sgm appended, the encoder ends in a sigmoid.
        cut_layer: Stages of the network that the client keeps, counted from the image; the server has the rest, and
            features z cross the cut.
        adapter: Residual 3x3 convolutions, with batch normalization and ReLU, that the client has between cut and
            bottleneck, so that the encoder can follow a penalty. The server has nothing in their place.
        bottleneck: Narrow layer at the cut, or none. [noRELU_][Kk]CcSs is a convolution of kernel k to c channels with
            stride s, mirrored on the server. Narrow features are harder to invert.
        centralized: Train the same network in one piece: no cut, so no adapter, no bottleneck and no defenses, but the
            same penalty. NOISE_STD then is only the noise that the penalty reckons with.
        surrogate: Stand-in for the conditional entropy H(x|z), which bounds what an attacker can reconstruct; or
            package.module:Class, one of yours.
        lambd: Weight λ of the penalty; 0 switches it off. Without it: the surrogate's own.
        lambd_schedule: How the weight changes over a run. rising, the original's: λ·1e-3/learning rate, and exactly λ
            at rates below 4.1e-4. constant: λ, in proportion to classification all the time. A good λ for one is a
            bad one for the other. Without it: the surrogate's own. See the column lambda_eff of metrics.csv.
        penalty_from: First epoch with the penalty, and with losses of defenses. Before it, classification has the
            encoder to itself: under a penalty from the first step on, an untrained encoder may learn to send the same
            for every class. Without it: 2, or 1 where there is but one epoch.
        injection: How the penalty's gradient reaches the encoder; both give the same gradient. combined: one backward
            from the cut. two_pass: the original's two, for comparison; it costs more.
        backend: Implementation of the surrogate's operators. auto: triton on CUDA where it applies, otherwise eager.
        capture: Record what terms compute, forward and backward, in a CUDA graph and launch it whole in every step: for
            small batches and networks, where the GPU waits for the host. Needs a CUDA device and --injection combined.
        noise_std: Standard deviation σ of the Gaussian noise on z, in training and in use; 0 for none.
        defenses: What is done to z or to training besides, in this order; or package.module:Class, one of yours.
        epochs: Passes over the training set.
        batch_size: Samples in a step.
        lr: Learning rate of SGD at the beginning.
        lr_schedule: How it falls. steps, the original's: to a fifth after each quarter of the epochs. cosine: evenly,
            step by step, to 0; a rising λ is for a while above its final value then, up to 2.4 times.
        sgd_momentum: Momentum of SGD.
        weight_decay: L2 penalty on everything that SGD trains.
        warmup_epochs: Epochs, fractions allowed, over which the learning rate rises step by step to its full value.
        amp: Train and validate encoder and server under bfloat16 autocast: faster where the processor has the
            instructions. Features at the cut, losses, terms and all weights stay fp32; so are a refit and the test.
        init_from: Start from the weights of this run directory or .pt file; the penalty then applies in full at once.
            To continue an interrupted run, use --resume instead.
        seed: Seed of initial weights, order of samples, noise, and everything else that is random.
        device: Where to train: auto (CUDA if there is one), cpu, cuda, cuda:1, ...
        threads: Threads that PyTorch computes with on the CPU; with another number of them, last digits differ. Without
            it: as many as PyTorch takes by itself, see OMP_NUM_THREADS. Where other programs keep the cores busy, 1 can
            be ten times as fast, as threads wait for each other.
        out: Run directory; one that is not empty is refused. Without it: runs/ and a name made of what tells runs
            apart, or, where that is taken, the first free one of NAME-2, NAME-3, ...
        profile_steps: Trace this many steps, after a short warm-up in the first epoch with the penalty (with --resume,
            in the first one that is left), to OUT/trace.json.gz, for chrome://tracing or https://ui.perfetto.dev.

    Example::

        >>> from cem.training import TrainConfig
        >>> TrainConfig.from_dict({"epochs": 3, "bottleneck": "C4S1"}).checked().epochs
        3
    """

    families: ClassVar[Mapping[str, Family[Any]]] = {"surrogate": SURROGATES, "defenses": DEFENSES}

    data: str = _data("digits", names=lambda: DATASETS)
    data_root: Path | None = _data(None, harmless=True)
    download: bool = _data(False, harmless=True)
    train_size: int | None = _data(None, least=1)
    image_size: int | None = _data(None, least=1)
    augment: bool = _data(False)
    num_workers: int = _data(0, least=0, harmless=True)

    arch: str = _model("resnet20")
    cut_layer: int = _model(4, least=1)
    adapter: int = _model(0, least=0, most=100)
    bottleneck: str = _model("noRELU_C2S2")
    centralized: bool = _model(False)

    surrogate: str = _penalty(RECOMMENDED)
    lambd: float | None = _penalty(None, least=0, most=LARGEST)
    lambd_schedule: Literal["rising", "constant"] | None = _penalty(None)
    penalty_from: int | None = _penalty(None, least=1)
    injection: Literal["combined", "two_pass"] = _penalty("combined")
    backend: Literal["auto", "triton", "eager", "reference"] = _penalty("auto", harmless=True)
    capture: bool = _penalty(False, harmless=True)

    noise_std: float = _defense(0.3, least=0, most=LARGEST)
    defenses: tuple[str, ...] = _defense(())

    epochs: int = _training(20, least=1)
    batch_size: int = _training(128, least=1)
    lr: float = _training(0.05, above=0, most=LARGEST)
    lr_schedule: Shape = _training("steps")
    sgd_momentum: float = _training(0.9, least=0, below=1)
    weight_decay: float = _training(0.0005, least=0, most=LARGEST)
    warmup_epochs: float = _training(1.0, least=0)
    amp: bool = _training(False)
    init_from: Path | None = _training(None)

    seed: int = _run(0, least=0, below=2**32)
    device: str = _run("auto", harmless=True)
    threads: int | None = _run(None, least=1, harmless=True)
    out: Path | None = _run(None, harmless=True)
    profile_steps: int = _run(0, least=0, harmless=True)

    @property
    def weight(self) -> float:
        """``lambd``, or the surrogate's own."""
        return SURROGATES[self.surrogate].Options.weight if self.lambd is None else self.lambd

    @property
    def penalized(self) -> bool:
        """Whether this run has a surrogate with a weight above 0."""
        return self.surrogate_name != CONTROL and self.weight > 0

    @property
    def surrogate_name(self) -> str:
        """What the surrogate is called, also where it was named by its module."""
        name: str = SURROGATES[self.surrogate].name
        return name

    @property
    def first_penalized(self) -> int:
        """``penalty_from``, or what it is where nobody says."""
        return (1 if self.epochs == 1 else 2) if self.penalty_from is None else self.penalty_from

    def resolved(self) -> TrainConfig:
        """The same options, with what holds where ``lambd``, ``lambd_schedule``, ``penalty_from`` are left out."""
        schedule = self.lambd_schedule or SURROGATES[self.surrogate].schedule
        return replace(self, lambd=self.weight, lambd_schedule=schedule, penalty_from=self.first_penalized)

    @property
    def run_dir(self) -> Path:
        """``out``, or the directory named after what most often tells runs apart.

        That is data, network, surrogate with its weight, defenses, options of both that are not at their defaults,
        noise and seed. A new run without ``out`` takes another name if this one is taken: see ``Trainer.run_dir``.
        """
        if self.out is not None:
            return self.out
        parts = [self.data, self.arch]
        for name, member in self.chosen().items():
            own, defaults = self.options_of(name).to_dict(), member.Options().to_dict()
            parts += [name, *(f"{key}{value}" for key, value in own.items() if value != defaults[key])]
            if name == self.surrogate_name and self.penalized:
                parts.append(f"lambd{self.weight:g}")
        parts += [f"noise{self.noise_std:g}", f"seed{self.seed}"]
        return Path("runs") / re.sub(r"[^\w.-]+", "_", "-".join(parts))

    def check(self) -> None:
        """What no option can say alone. Architectures, cut layers and bottlenecks are checked where they are built."""
        if not self.warmup_epochs <= self.epochs:
            raise UsageError(f"--warmup-epochs must be at most --epochs {self.epochs}, got {self.warmup_epochs:g}")
        if (self.penalized or set(self.defenses) - {NOISE}) and self.first_penalized > self.epochs:
            raise UsageError(
                f"--penalty-from must be at most --epochs {self.epochs}, or no epoch has a penalty; "
                f"got {self.penalty_from}"
            )
        if self.surrogate_name == CONTROL and self.weight > 0:
            raise UsageError(f"--lambd {self.weight:g}: --surrogate {CONTROL} has no penalty to weigh")
        if self.centralized and set(self.defenses) - {NOISE}:
            raise UsageError(f"--centralized has no cut for --defenses {' '.join(self.defenses)}")
        if self.centralized and self.adapter:
            raise UsageError(f"--centralized has no cut for --adapter {self.adapter}")
        device = resolve_device(self.device)
        if self.penalized and self.backend == "triton" and device.type != "cuda" and not backends.INTERPRETING:
            raise UsageError(f"--backend triton needs a CUDA device, got {device} (--device {self.device})")
        if self.capture:
            self._check_capture(device)

    def _check_capture(self, device: torch.device) -> None:
        if not (self.penalized or self.defenses):
            raise UsageError(f"--capture: without a penalty there is nothing to capture, got --lambd {self.weight:g}")
        if self.injection != "combined":
            raise UsageError(f"--capture takes --injection combined, got {self.injection}")
        if device.type != "cuda":
            raise UsageError(f"--capture needs a CUDA device, got {device} (--device {self.device})")


HARMLESS_ON_RESUME = frozenset(each.name for each in fields(TrainConfig) if each.metadata.get("harmless"))
"""Options that may change when a run is resumed: they say where or how it is computed, not what. With augmentation
``num_workers`` is not one of them: each worker process draws from a random stream of its own."""


def changed_options(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Describe the options that decide a run's numbers and differ: ``["--lr (was 0.05, got 0.1)"]``."""
    ignored, note = HARMLESS_ON_RESUME, ""
    if after.augment:
        ignored, note = ignored - {"num_workers"}, "; with --augment, worker processes draw other random numbers"
    # Only their numbers are looked at: a device that either was on need not be here.
    harmless: dict[str, Any] = {each.name: each.default for each in fields(TrainConfig) if each.name in ignored}
    before, after = (replace(each, **harmless).checked().resolved() for each in (before, after))
    lines = differences(before, after)
    return [f"{line[:-1]}{note})" if line.startswith("--num-workers") else line for line in lines]


def without_penalty(config: TrainConfig) -> TrainConfig:
    """The control's options: the same but for those of the penalty, which are the defaults.

    Losses of defenses, which the control keeps, begin where they did.
    """
    own: dict[str, Any] = {
        each.name: each.default for each in fields(TrainConfig) if each.metadata.get("group") == PENALTY
    }
    if set(config.defenses) - {NOISE}:
        del own["penalty_from"]
    members = {name: options for name, options in config.members.items() if name != config.surrogate_name}
    return replace(config, **own | {"surrogate": CONTROL}, members=members)
