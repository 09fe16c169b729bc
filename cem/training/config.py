"""Every option of a training run in one flat dataclass, shared by command line, YAML file and API."""

from __future__ import annotations

import math
import types
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml


class ConfigError(ValueError):
    """An option cannot be used as given; the message names it, what it takes and what it got."""


@dataclass
class TrainConfig:
    """The options of one training run.

    Constructing one checks nothing; :meth:`validate` does, and the trainer calls it. ``tyro`` makes the
    command line of ``python -m cem.train`` from these fields, and the text under each of them is its help.
    """

    data: Literal["digits", "fashion-mnist", "mnist", "cifar10", "cifar100", "svhn", "folder"] = "digits"
    """Data set. `digits` comes with scikit-learn and needs no download.
    `folder` reads yours: DATA_ROOT/train/CLASS/* and DATA_ROOT/test/CLASS/*, or DATA_ROOT/CLASS/*.
    It reads TinyImageNet as it is published."""
    data_root: Path | None = None
    """Folder of the data set, or where it is downloaded to. Without it: data/ and the name of the data set."""
    download: bool = False
    """Fetch the data set if it is not there yet."""
    train_size: int | None = None
    """Train on this many images only, with every class in proportion."""
    image_size: int | None = None
    """Resize images to this height and width, in pixels."""
    augment: bool = False
    """Crop and mirror training images at random; for cifar10, cifar100, svhn (crop only) and folder."""
    num_workers: int = 0
    """Processes that load images; 0 loads them in the training process."""

    arch: str = "resnet20"
    """Network to split: resnet20, resnet32, vgg11, vgg11_bn, vgg13, vgg13_bn or mobilenetv2.
    With _sgm appended, the encoder ends in a sigmoid."""
    cut_layer: int = 4
    """Stages that the client keeps. The rest is the server's, and features z cross the cut."""
    bottleneck: str = "noRELU_C8S1"
    """Narrow layer at the cut, or `none`. Narrow features are harder to invert.
    [noRELU_][Kk]CcSs is a convolution of kernel k to c channels with stride s, mirrored on the server."""
    noise_std: float = 0.1
    """Standard deviation σ of the Gaussian noise on z, in training and in use.
    Server and attacker see z + σN(0, I)."""
    centralised: bool = False
    """Train the same network in one piece: no cut, so no bottleneck and no noise, but the same penalty.
    NOISE_STD then only scales the penalty's threshold."""

    surrogate: Literal["attention", "gmm", "none"] = "attention"
    """Stand-in for the conditional entropy H(x|z), which bounds what an attacker can reconstruct.
    attention: slot and cross attention in every class. gmm: a Gaussian mixture, refitted after every epoch.
    none: no penalty, the control."""
    lambd: float = 16.0
    """Weight λ of the penalty; 0 switches it off. At learning rates below 4.1e-4 it applies exactly in full.
    Between that and 1e-3 the original's rule gives up to 2.4 times λ, above 1e-3 less.
    See the column lambda_eff of metrics.csv."""
    penalty_from: int = 2
    """First epoch with the penalty. Before it, classification has the encoder to itself, as in the original:
    under a penalty from the first step on, an untrained encoder may learn to send the same for every class."""
    var_threshold: float = 0.1
    """Variance inside a class above which features are penalised, in units of σ² (σ is NOISE_STD)."""
    surrogate_policy: Literal["frozen", "separate", "shared"] = "frozen"
    """What trains the surrogate's own parameters.
    frozen: nothing; it is a fixed statistic. separate: an Adam of its own. shared: the network's SGD.
    A surrogate that minimises its own penalty can cheat and shrink its output, hence the default."""
    surrogate_lr: float = 1e-4
    """Learning rate of the surrogate's Adam under --surrogate-policy separate."""
    reduce_dim: int | None = None
    """Width to which the attention surrogate projects features first.
    None chooses by their size, 0 never projects."""
    gmm_fit: Literal["kmeans", "full"] = "kmeans"
    """How the gmm surrogate fits its mixtures. kmeans: k-means++ in PyTorch, on the training device.
    full: scikit-learn on the CPU, with a PCA and full covariances; slower."""
    injection: Literal["combined", "two_pass"] = "combined"
    """How the penalty's gradient reaches the encoder; both give the same gradient.
    combined: one backward from the cut. two_pass: the original's two, for comparison; it costs more."""
    backend: Literal["auto", "triton", "eager", "reference"] = "auto"
    """Implementation of the surrogate's operators. auto: triton on CUDA where it applies, otherwise eager."""

    epochs: int = 20
    """Passes over the training set. The learning rate falls to a fifth after each quarter of them."""
    batch_size: int = 128
    """Samples in a step. The penalty needs at least two of a class in a batch to say anything about it."""
    lr: float = 0.05
    """Learning rate of SGD in the first quarter."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """L2 penalty on everything that SGD trains."""
    warmup_epochs: float = 1.0
    """Epochs, fractions allowed, over which the learning rate rises step by step to its full value."""
    init_from: Path | None = None
    """Start from the weights of this run directory or .pt file; the penalty then applies in full at once.
    To continue an interrupted run, use --resume instead."""

    seed: int = 0
    """Seed of initial weights, order of samples, noise, and everything else that is random."""
    device: str = "auto"
    """Where to train: auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """Run directory; one that is not empty is refused.
    Without it: runs/ and a name made of data, arch, surrogate, lambd, noise and seed.
    Where that is taken: the first free one of NAME-2, NAME-3, ..."""

    @property
    def penalised(self) -> bool:
        """Whether this run has a penalty at all: a surrogate, and a weight for it."""
        return self.surrogate != "none" and self.lambd > 0

    @property
    def run_dir(self) -> Path:
        """``out``, or the directory named after the options that most often tell runs apart.

        A new run without ``out`` takes another name if this one is taken: see ``Trainer.run_dir``.
        """
        if self.out is not None:
            return self.out
        name = f"{self.data}-{self.arch}-{self.surrogate}-lambd{self.lambd:g}-noise{self.noise_std:g}"
        return Path("runs") / f"{name}-seed{self.seed}"

    def validate(self) -> None:
        """Check types and ranges of all options that can be judged without loading anything.

        Values of a kindred type become the option's own: text a path, a whole number a float.

        Raises:
            ConfigError: naming the option, what it takes and what it got. Data sets, architectures, cut
                layers and bottlenecks are checked by the modules that know them, when they are built.
        """
        for name, hint in _hints().items():
            setattr(self, name, _convert(name, hint, getattr(self, name)))
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ConfigError(f"{option(name)} must be finite and at least {least}, got {value}")
        for name in ("lr", "surrogate_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{option(name)} must be finite and above 0, got {getattr(self, name)}")
        if not self.momentum < 1:
            raise ConfigError(f"--momentum must be below 1, got {self.momentum}")
        if not self.warmup_epochs <= self.epochs:
            raise ConfigError(f"--warmup-epochs must be at most --epochs {self.epochs}, got {self.warmup_epochs}")
        if self.penalised and self.penalty_from > self.epochs:
            raise ConfigError(
                f"--penalty-from must be at most --epochs {self.epochs}, or no epoch has the penalty; "
                f"got {self.penalty_from}"
            )
        if not self.seed < 2**32:  # NumPy's generators take no more
            raise ConfigError(f"--seed must be below 2**32, got {self.seed}")
        resolve_device(self.device)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain YAML values (paths as strings)."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k in _hints()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Inverse of :meth:`to_dict`; options that are absent keep their defaults.

        Raises:
            ConfigError: if a key is no option, or a value has the wrong type.
        """
        hints = _hints()
        unknown = sorted(str(key) for key in values if key not in hints)
        if unknown:
            raise ConfigError(f"unknown option {', '.join(unknown)}; the options are {', '.join(hints)}")
        return TrainConfig(**{name: _convert(name, hints[name], value) for name, value in values.items()})

    def to_yaml(self, path: Path) -> None:
        """Write all options to ``path``."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def from_yaml(cls, path: Path) -> TrainConfig:
        """Read options from ``path``; those that it does not name keep their defaults.

        Raises:
            ConfigError: if there is no such file, it is not YAML, or :meth:`from_dict` refuses what it holds.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read options from {path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a mapping of option names to values, got {values!r}")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


_AT_LEAST = {
    **dict.fromkeys(("train_size", "image_size", "cut_layer", "epochs", "batch_size", "penalty_from"), 1),
    **dict.fromkeys(("num_workers", "noise_std", "lambd", "var_threshold", "reduce_dim"), 0),
    **dict.fromkeys(("momentum", "weight_decay", "warmup_epochs", "seed"), 0),
}

HARMLESS_ON_RESUME = frozenset({"device", "backend", "num_workers", "data_root", "download"})
"""Options that may change when a run is resumed: they say where it is computed, not what. With augmentation
``num_workers`` is not one of them: each worker process draws from a random stream of its own."""


def changed_options(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Describe the options that decide a run's numbers and differ: ``["--lr (was 0.05, got 0.1)"]``.

    ``out`` is left to the caller: a run directory may be moved.
    """
    ignored, reasons = HARMLESS_ON_RESUME | {"out"}, {}
    if after.augment:
        ignored -= {"num_workers"}
        reasons["num_workers"] = "; with --augment, worker processes draw other random numbers"
    old, new = before.to_dict(), after.to_dict()
    return [
        f"{option(name)} (was {old[name]}, got {new[name]}{reasons.get(name, '')})"
        for name in old
        if name not in ignored and old[name] != new[name]
    ]


def option(name: str) -> str:
    """The command-line spelling of a field: ``"batch_size"`` → ``"--batch-size"``."""
    return "--" + name.replace("_", "-")


def resolve_device(name: str) -> torch.device:
    """The device that ``--device name`` means.

    Raises:
        ConfigError: if it is no device, or one that this machine or this build of PyTorch does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def _hints() -> dict[str, Any]:
    hints = get_type_hints(TrainConfig)
    return {field.name: hints[field.name] for field in fields(TrainConfig)}


def _convert(name: str, hint: Any, value: Any) -> Any:
    """Return ``value`` as the annotated type of option ``name``, or raise :class:`ConfigError`."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            if isinstance(value, str) and value in get_args(kind):
                return value
        elif kind is Path:
            if isinstance(value, str | Path):
                return Path(value)
        elif kind is float:
            # YAML 1.1 reads 1e-4, without a point, as text.
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                try:
                    return float(value)
                except ValueError:
                    pass
        elif type(value) is kind:
            return value
    raise ConfigError(f"{option(name)} takes {' or '.join(map(_describe, kinds))}, got {value!r}")


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(kind, "nothing (null)")
