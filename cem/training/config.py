"""Every option of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

from cem.options import ConfigError, Options, option, resolve_device
from cem_kernels import backends


@dataclass
class TrainConfig(Options):
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
    centralized: bool = False
    """Train the same network in one piece: no cut, so no bottleneck and no noise, but the same penalty.
    NOISE_STD then is only the noise that the penalty reckons with."""

    surrogate: Literal["attention", "gmm", "none"] = "attention"
    """Stand-in for the conditional entropy H(x|z), which bounds what an attacker can reconstruct.
    attention: variance inside every class, around running centroids or after slot and cross attention (MEASURE).
    gmm: a Gaussian mixture, refitted after every epoch. none: no penalty, the control."""
    lambd: float | None = None
    """Weight λ of the penalty; 0 switches it off. Without it: 0.5 for attention, 16 for gmm, whose penalties differ in
    scale, and in LAMBD_SCHEDULE."""
    lambd_schedule: Literal["rising", "constant"] | None = None
    """How the weight changes over a run. rising, the original's: λ · 1e-3 / learning rate, and exactly λ at rates below
    4.1e-4: the penalty moves the encoder as far in a late epoch as in an early one. constant: λ, in proportion to
    classification all the time, so that most is done while steps are large. A λ for one is none for the other.
    Without it: constant for attention, rising for gmm. See the column lambda_eff of metrics.csv."""
    penalty_from: int = 2
    """First epoch with the penalty. Before it, classification has the encoder to itself, as in the original:
    under a penalty from the first step on, an untrained encoder may learn to send the same for every class."""
    var_threshold: float = 0.1
    """Variance inside a class above which --penalty hinge and the mixture penalize features, in units of σ²
    (σ is NOISE_STD)."""
    measure: Literal["enhanced", "slots"] = "slots"
    """Variance that the attention surrogate penalizes. enhanced: of normalized features that have read the slots of
    their class, as the original does, which as a whole is --preset seed. slots: of the features as they are sent,
    around the centroids of the slots, which say little before they are trained (SURROGATE_POLICY,
    SURROGATE_OBJECTIVE)."""
    penalty: Literal["hinge", "entropy"] = "entropy"
    """How a variance v becomes a penalty of the attention surrogate. entropy: ½ log(1 + v/σ²), the nats that cross the
    noise. hinge: log v above the log of a threshold, the original's."""
    hinge: Literal["relu", "softplus", "identity"] = "relu"
    """What --penalty hinge counts of log v − log threshold: what is above zero, a smooth form of that, or all of it."""
    threshold: Literal["coupled", "fixed", "ramp", "quantile"] = "coupled"
    """Where --penalty hinge begins. coupled: VAR_THRESHOLD times σ². fixed: THRESHOLD_VALUE. ramp: from THRESHOLD_VALUE
    in the first epoch with a penalty down to the coupled one in the last: accuracy first, robustness later.
    quantile: THRESHOLD_QUANTILE of the variances that features have, never below the coupled one; not with slots."""
    threshold_value: float = 0.05
    """Threshold of `fixed`, and first one of `ramp`: a variance."""
    threshold_quantile: float = 0.5
    """Share of all variances that `quantile` leaves alone."""
    eps_var: float = 1e-8
    """Floor of a variance under --penalty hinge of the attention surrogate. Below it nothing is made smaller."""
    gamma: float = 0.01
    """Variance γ that --penalty hinge adds inside both logarithms, in the attention surrogate. Well below γ the penalty
    is nearly linear in a variance, well above it grows with the logarithm. The mixture's is 0.01."""
    anchor: float = 0.99
    """Momentum, such as 0.99, of running class centroids that variances are measured around in training, instead of a
    batch's own: then an encoder cannot lower them by making all features smaller. For --measure slots --num-slots 1;
    0: none."""
    memory_bank: int = 0
    """Recent features of every class that the attention surrogate remembers and measures a batch with, such as 64;
    for many classes and small batches, where most classes have no two samples. With --anchor 0, which does without.
    0: none."""
    tokens: Literal["flat", "spatial"] = "flat"
    """What the attention surrogate attends to, if it does (NUM_SLOTS). flat: a sample's features are one token.
    spatial: every position of the feature map is one, which needs far smaller matrices."""
    reduce: Literal["linear", "conv1x1"] = "linear"
    """What REDUCE_DIM is. linear: a width to project flat features to. conv1x1: a number of channels."""
    num_slots: int = 1
    """Slots of every class in the attention surrogate. 1 with --measure slots is the class itself: nothing is attended
    to, and there are no parameters. More of them go with --anchor 0."""
    surrogate_policy: Literal["frozen", "separate", "shared"] = "frozen"
    """What trains the surrogate's own parameters, if it has any (NUM_SLOTS).
    frozen: nothing; it is a fixed statistic. separate: an Adam of its own. shared: the network's SGD.
    A surrogate that minimizes its own penalty can cheat and shrink its output, hence the default."""
    surrogate_objective: Literal["penalty", "likelihood", "reconstruction"] = "penalty"
    """What the attention surrogate's own parameters minimize under the policies separate and shared.
    penalty: what the encoder minimizes. likelihood: slots as centers of a mixture of their class's features.
    reconstruction: features from the slots that they belong to."""
    surrogate_lr: float = 1e-4
    """Learning rate of the surrogate's Adam under --surrogate-policy separate."""
    reduce_dim: int | None = None
    """Width, or channels, to which the attention surrogate projects features before it attends to them.
    None chooses by their size, 0 never projects."""
    gmm_fit: Literal["kmeans", "full"] = "kmeans"
    """How the gmm surrogate fits its mixtures. kmeans: k-means++ in PyTorch, on the training device.
    full: scikit-learn on the CPU, with a PCA and full covariances; slower."""
    injection: Literal["combined", "two_pass"] = "combined"
    """How the penalty's gradient reaches the encoder; both give the same gradient.
    combined: one backward from the cut. two_pass: the original's two, for comparison; it costs more."""
    backend: Literal["auto", "triton", "eager", "reference"] = "auto"
    """Implementation of the surrogate's operators. auto: triton on CUDA where it applies, otherwise eager."""
    capture: bool = False
    """Record the attention surrogate, forward and backward, in a CUDA graph and launch it whole in every step.
    Meant for small batches and networks, where the GPU waits for the host. A last, smaller batch is launched as always.
    Needs a CUDA device, --injection combined, and a surrogate that never waits for the device: with kernels for all of
    its operators, or around running centroids (--anchor)."""

    epochs: int = 20
    """Passes over the training set. The learning rate falls to a fifth after each quarter of them."""
    batch_size: int = 128
    """Samples in a step. Without ANCHOR the penalty says nothing about a class with fewer than two of them."""
    lr: float = 0.05
    """Learning rate of SGD in the first quarter."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """L2 penalty on everything that SGD trains."""
    warmup_epochs: float = 1.0
    """Epochs, fractions allowed, over which the learning rate rises step by step to its full value."""
    amp: bool = False
    """Train and validate encoder and server under bfloat16 autocast: faster where the processor has the instructions.
    In training, features at the cut, losses, the penalty and all weights stay fp32; a refit and the test are fp32."""
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
    profile_steps: int = 0
    """Trace this many steps, after a short warm-up in the first epoch with the penalty; with --resume, in the first
    one that is left. The trace is OUT/trace.json.gz, for chrome://tracing or https://ui.perfetto.dev.
    No number changes but times, which include the tracing."""

    @property
    def weight(self) -> float:
        """``lambd``, or the surrogate's own."""
        return OWN_WEIGHT[self.surrogate] if self.lambd is None else self.lambd

    def resolved(self) -> TrainConfig:
        """The same options, with the surrogate's own where ``lambd`` and ``lambd_schedule`` are left to it."""
        schedule = self.lambd_schedule or OWN_SCHEDULE[self.surrogate]
        return replace(self, lambd=self.weight, lambd_schedule=schedule)

    @property
    def penalized(self) -> bool:
        """Whether this run has a penalty at all: a surrogate, and a weight for it."""
        return self.surrogate != "none" and self.weight > 0

    @property
    def run_dir(self) -> Path:
        """``out``, or the directory named after the options that most often tell runs apart.

        A new run without ``out`` takes another name if this one is taken: see ``Trainer.run_dir``.
        """
        if self.out is not None:
            return self.out
        surrogate = "none" if self.surrogate == "none" else f"{self.surrogate}-lambd{self.weight:g}"
        return Path("runs") / f"{self.data}-{self.arch}-{surrogate}-noise{self.noise_std:g}-seed{self.seed}"

    def validate(self) -> None:
        """Check types and ranges of all options that can be judged without loading anything.

        Values of a kindred type become the option's own: text a path, a whole number a float.

        Raises:
            ConfigError: naming the option, what it takes and what it got. Data sets, architectures, cut
                layers and bottlenecks are checked by the modules that know them, when they are built.
        """
        self.convert()
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ConfigError(f"{option(name)} must be finite and at least {least}, got {value}")
        for name in ("lr", "surrogate_lr", "threshold_value", "eps_var", "gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{option(name)} must be finite and above 0, got {getattr(self, name)}")
        if not self.momentum < 1:
            raise ConfigError(f"--momentum must be below 1, got {self.momentum}")
        if not self.warmup_epochs <= self.epochs:
            raise ConfigError(f"--warmup-epochs must be at most --epochs {self.epochs}, got {self.warmup_epochs}")
        if self.penalized and self.penalty_from > self.epochs:
            raise ConfigError(
                f"--penalty-from must be at most --epochs {self.epochs}, or no epoch has the penalty; "
                f"got {self.penalty_from}"
            )
        if not self.seed < 2**32:  # NumPy's generators take no more
            raise ConfigError(f"--seed must be below 2**32, got {self.seed}")
        if not 0 < self.threshold_quantile < 1:
            raise ConfigError(f"--threshold-quantile must be between 0 and 1, got {self.threshold_quantile}")
        if not 0 <= self.anchor < 1:
            raise ConfigError(f"--anchor must be at least 0 and below 1, got {self.anchor}")
        device = resolve_device(self.device)
        if self.surrogate == "attention":
            self._check_attention(device)
        if self.capture:
            self._check_capture(device)

    def _check_attention(self, device: torch.device) -> None:
        """Whether the options of the attention surrogate go together."""
        slots = self.measure == "slots"
        if self.anchor and not (slots and self.num_slots == 1 and not self.memory_bank):
            raise ConfigError(
                "--anchor goes with --measure slots --num-slots 1 and without --memory-bank; with more slots or a "
                f"memory give --anchor 0, for the original --preset seed, got --anchor {self.anchor:g}"
            )
        if self.penalized and self.penalty == "entropy":
            if not self.noise_std:
                raise ConfigError(
                    "--penalty entropy counts what crosses the noise, so --noise-std must be above 0, got 0; without "
                    "noise give --surrogate none, or --penalty hinge with --threshold fixed"
                )
            if self.threshold != "coupled" or self.hinge != "relu":
                raise ConfigError(
                    "--penalty entropy has neither --threshold nor --hinge: give --penalty hinge with them, "
                    f"got --threshold {self.threshold} --hinge {self.hinge}"
                )
        trained = self.surrogate_policy != "frozen"
        asked = trained or self.surrogate_objective != "penalty" or self.reduce_dim or self.reduce != "linear"
        if slots and self.num_slots == 1 and asked:
            raise ConfigError(
                "--measure slots --num-slots 1 has no parameters, so neither --surrogate-policy, "
                "--surrogate-objective, --reduce nor --reduce-dim: give --num-slots 8 --anchor 0 with them, or "
                "--preset seed"
            )
        if slots and trained and self.surrogate_objective == "penalty":
            raise ConfigError(
                "--measure slots has no gradient for its slots: with --surrogate-policy "
                f"{self.surrogate_policy} give --surrogate-objective likelihood or reconstruction, got penalty"
            )
        if self.surrogate_objective != "penalty" and self.injection != "combined":
            raise ConfigError(
                f"--surrogate-objective {self.surrogate_objective} takes --injection combined, got {self.injection}"
            )
        if self.reduce == "conv1x1" and not self.reduce_dim:
            raise ConfigError(f"--reduce conv1x1 needs --reduce-dim, a number of channels, got {self.reduce_dim}")
        if slots and self.threshold == "quantile":
            raise ConfigError(
                "--threshold quantile follows the variances of classes, which --measure slots does not have; give "
                "--measure enhanced"
            )
        if self.backend == "triton" and device.type != "cuda" and not backends.INTERPRETING:
            raise ConfigError(f"--backend triton needs a CUDA device, got {device} (--device {self.device})")
        if self.backend == "triton" and slots and self.num_slots != 1:
            raise ConfigError(
                "--backend triton has no kernel for the variance around several slots, got --measure slots and "
                f"--num-slots {self.num_slots}; give --backend auto"
            )

    def _check_capture(self, device: torch.device) -> None:
        if self.surrogate != "attention":
            raise ConfigError(f"--capture: only the attention surrogate can be captured, got {self.surrogate}")
        if not self.penalized:
            raise ConfigError(f"--capture: without a penalty there is nothing to capture, got --lambd {self.weight:g}")
        if self.injection != "combined":
            raise ConfigError(f"--capture takes --injection combined, got {self.injection}")
        if self.backend == "reference" or (self.backend == "eager" and not self.anchor):
            takes = "auto, triton or eager" if self.anchor else "auto or triton"
            raise ConfigError(
                f"--capture takes --backend {takes}, got {self.backend}: "
                "it asks the device how large the classes of a batch are, and waits, which a CUDA graph cannot"
            )
        if self.measure == "slots" and self.num_slots != 1:
            raise ConfigError(
                "--capture takes --measure enhanced, or --measure slots with one slot: the variance around several "
                f"has no kernel, got --measure {self.measure} and --num-slots {self.num_slots}"
            )
        if device.type != "cuda":
            raise ConfigError(f"--capture needs a CUDA device, got {device} (--device {self.device})")


_AT_LEAST = {
    **dict.fromkeys(("train_size", "image_size", "cut_layer", "epochs", "batch_size", "penalty_from", "num_slots"), 1),
    **dict.fromkeys(("num_workers", "noise_std", "lambd", "var_threshold", "reduce_dim", "profile_steps"), 0),
    "memory_bank": 0,
    **dict.fromkeys(("momentum", "weight_decay", "warmup_epochs", "seed"), 0),
}

OWN_WEIGHT = {"attention": 0.5, "gmm": 16.0, "none": 0.0}
"""λ where ``lambd`` is left to the surrogate."""
OWN_SCHEDULE: dict[str, Literal["rising", "constant"]] = {"attention": "constant", "gmm": "rising", "none": "rising"}
"""How it changes where ``lambd_schedule`` is left to the surrogate."""

_NAMES = [each.name for each in fields(TrainConfig)]
# Options of one thing stand together.
OF_THE_PENALTY = frozenset(_NAMES[_NAMES.index("surrogate") : _NAMES.index("epochs")])
"""Options of the defense, by which a run and the control beside it may differ."""
_OF_ATTENTION = frozenset(_NAMES[_NAMES.index("measure") : _NAMES.index("gmm_fit")])
NOT_OF = {"attention": {"gmm_fit"}, "gmm": _OF_ATTENTION, "none": OF_THE_PENALTY - {"surrogate", "penalty_from"}}
"""Options that a surrogate does not have: they change nothing. (Before ``penalty_from`` no epoch is the best one,
without a penalty either.)"""

HARMLESS_ON_RESUME = frozenset(
    {"device", "backend", "capture", "num_workers", "data_root", "download", "profile_steps"}
)
"""Options that may change when a run is resumed: they say where or how it is computed, not what. With augmentation
``num_workers`` is not one of them: each worker process draws from a random stream of its own."""


def changed_options(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Describe the options that decide a run's numbers and differ: ``["--lr (was 0.05, got 0.1)"]``.

    ``out`` is left to the caller: a run directory may be moved.
    """
    ignored, reasons = HARMLESS_ON_RESUME | {"out"}, {}
    if before.surrogate == after.surrogate:
        ignored |= NOT_OF[after.surrogate]
    if after.augment:
        ignored -= {"num_workers"}
        reasons["num_workers"] = "; with --augment, worker processes draw other random numbers"
    old, new = before.resolved().to_dict(), after.resolved().to_dict()
    return [
        f"{option(name)} (was {old[name]}, got {new[name]}{reasons.get(name, '')})"
        for name in old
        if name not in ignored and old[name] != new[name]
    ]
