"""The original surrogate: slots summarize each class, samples read them, and what still varies is penalized."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from cem.errors import UsageError
from cem.options import Options as BaseOptions
from cem.options import option
from cem.surrogates.modules import CrossAttention, Normalized, SlotAttention
from cem.surrogates.threshold import Ramp, coupled_threshold, warn_if_swamped
from cem.surrogates.variance import HALF, VarianceSurrogate, flat, spatial
from cem.terms import Batch, Context, Measured
from cem_kernels import LogHinge
from cem_kernels.validation import check_positive, check_sample_shape, check_sizes
from cem_kernels.variance import class_variance

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Attention over flat features of width D holds some 25 D² parameters: 6.6 million at 512, 25 million at 1024.
WIDEST_UNREDUCED = 512
REDUCED_WIDTH = 128
GAMMA = 1e-6


class SlotCrossAttentionCEM(VarianceSurrogate):
    """Slot attention, gated cross attention, and class variance over a log threshold.

    Every sample's features are normalized, slot attention summarizes each class's samples into slots, gated cross
    attention lets every sample read its class's slots, and the penalty is how far the log-variance of the result
    exceeds the threshold, inside each class. It is taken of normalized features, so that it does not know how large
    they are against the noise: :class:`~cem.CentroidCEM` does.

    Args:
        feature_dim: ``D``, width of a token: of one sample's flattened features, or of what ``reduction`` makes of
            them; with ``spatial`` the channels of the map.
        num_slots: ``S``.
        num_heads: ``H``; divides ``feature_dim``.
        num_iterations: ``J``.
        eps_var: floor of a variance; below it there is no gradient.
        var_threshold: ``τ``.
        reg_strength: ``σ``, the noise's standard deviation; the threshold is ``max(τσ², 1e-8)``.
        num_classes: ``K``; labels lie in ``[0, K)``. None reads the classes off the labels, which costs a host
            synchronization a call.
        max_class_size: static bound on the samples of one class in a batch; spares eager its host synchronization.
        min_samples: classes with fewer samples are left out.
        reduction: a module that is applied to the features first, because flat features of width ``D`` need ``D × D``
            matrices: see :func:`linear_reduction` and :func:`conv_reduction`. A bias would change no variance.
        spatial: every position of a map ``[B, C, H, W]`` is a token, and variances are those of a channel at a
            position, over the class's samples; else a sample is one token.
        threshold: the threshold itself, a number or a :class:`~cem.Ramp`, in place of ``max(τσ², 1e-8)``.
        gamma: ``γ``, inside both logarithms. Where a variance is well below ``γ``, its penalty is nearly linear in it.
        hinge: ``relu``, or ``softplus``, a smooth form of it.
        dropout: on the attention's output, in training.
        backend: see :mod:`cem_kernels.backends`.
        process_group: see :class:`~cem.Term`.

    Features are ``[B, D]`` or ``[B, C, H, W]``, fp16, bf16, fp32 or fp64. Of half-precision features kernels multiply
    matrices in that dtype; all else is in fp32, and so are the losses. They are zero and attached to the graph where no
    class has ``min_samples``.

    Raises:
        ValueError: a size, number or name is out of range, or ``feature_dim`` is no multiple of ``num_heads``.
        BackendUnavailableError: the backend that is asked for by name is not to be had.

    Warns:
        UserWarning: ``eps_var``, or the ``gamma`` that nobody chose, swamps the threshold (as they do at
            ``reg_strength=0``, the default).

    Example::

        >>> import torch, cem
        >>> surrogate = cem.SlotCrossAttentionCEM(feature_dim=16, num_classes=2, reg_strength=0.1)
        >>> features = torch.randn(8, 16, requires_grad=True)
        >>> rob_loss, intra_mse = surrogate(features, torch.arange(8) % 2)
        >>> rob_loss.backward()

    Source: Locatello et al. 2020 (slot attention), Alayrac et al. 2022 (gated cross attention).
    """

    name = "attention"
    summary = "slot attention, gated cross attention, class variance over a log threshold: the original"

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of ``--surrogate attention``.

        Attributes:
            num_slots: Slots of every class.
            reduction: What features are projected to before they are attended to: none, linear128 (a width) or conv4
                (channels of a 1x1 convolution). auto is linear128 for flat features wider than 512, else none.
            spatial: Let every position of the feature map be a token; without, a sample is one.
            var_threshold: Variance inside a class that is tolerated, in units of the noise's variance.
            threshold: The tolerated variance itself, whatever the noise is.
            ramp_from: Begin with this threshold and move to the other one until the last epoch.
            eps_var: Floor of a variance; below it nothing is made smaller.
            gamma: Variance added inside both logarithms. Well below it the penalty is nearly linear in a variance.
            hinge: What counts of log variance over log threshold.
            dropout: Dropout on the attention's output, in training.
            trained: What trains its own parameters: nothing, the network's optimizer, or an Adam of its own of this
                learning rate, such as 1e-4. One that minimizes its own penalty can cheat and shrink its output.
        """

        weight: ClassVar[float] = 0.05
        num_slots: int = option(8, least=1)
        reduction: str = option("auto")
        spatial: bool = option(False)
        var_threshold: float = option(0.1, least=0)
        threshold: float | None = option(None, above=0)
        ramp_from: float | None = option(None, above=0)
        eps_var: float = option(0.0001, above=0)
        gamma: float = option(1e-06, above=0)
        hinge: Literal["relu", "softplus"] = option("relu")
        dropout: float = option(0.0, least=0, below=1)
        trained: float | Literal["frozen", "shared"] = option("frozen", above=0)

        def check(self) -> None:
            """The reduction can be read."""
            parsed_reduction(self.reduction)

    trained: float | Literal["frozen", "shared"] = "frozen"

    def __init__(
        self,
        feature_dim: int,
        num_slots: int = 8,
        num_heads: int = 4,
        num_iterations: int = 3,
        eps_var: float = 1e-4,
        var_threshold: float = 0.1,
        reg_strength: float = 0.0,
        *,
        num_classes: int | None = None,
        max_class_size: int | None = None,
        min_samples: int = 2,
        reduction: nn.Module | None = None,
        spatial: bool = False,
        threshold: float | Ramp | None = None,
        gamma: float = GAMMA,
        hinge: Literal["relu", "softplus"] = "relu",
        dropout: float = 0.0,
        backend: str = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_classes, max_class_size, backend, process_group)
        check_sizes(feature_dim=feature_dim)
        check_positive(eps_var=eps_var)
        if min_samples < 2:
            raise ValueError(f"min_samples must be at least 2, got {min_samples}: one sample has no variance")
        self.feature_dim, self.spatial, self.min_samples = feature_dim, spatial, min_samples
        coupled = coupled_threshold(var_threshold, reg_strength)
        given = coupled if threshold is None else threshold
        self.threshold = given if isinstance(given, Ramp) else float(given)
        lowest = min(given.start, given.end) if isinstance(given, Ramp) else float(given)
        self.penalty = LogHinge(lowest, eps_var, gamma, hinge)
        warn_if_swamped(lowest, eps_var, gamma if gamma == GAMMA else 0.0)
        self.reduction = reduction
        self.slot_attention = SlotAttention(num_slots, feature_dim, num_iterations, backend=backend)
        self.cross_attention = CrossAttention(feature_dim, num_heads, dropout, backend=backend)

    @classmethod
    def build(cls, options: Options, context: Context) -> SlotCrossAttentionCEM:
        """See :class:`~cem.Surrogate`; as many heads as the width of a token allows, four at most."""
        shape, (kind, size) = context.feature_shape, parsed_reduction(options.reduction)
        if kind == "auto":
            wide = math.prod(shape) > WIDEST_UNREDUCED and not options.spatial
            kind, size = ("linear", REDUCED_WIDTH) if wide else ("none", 0)
        if len(shape) != 3 and (kind == "conv" or options.spatial):
            raise UsageError(f"spatial tokens and conv reductions need features (C, H, W), got {shape}")
        reduction: nn.Module | None = None
        if kind == "linear":
            reduction, shape = linear_reduction(math.prod(shape), size), (size,)
        elif kind == "conv":
            reduction, shape = conv_reduction(shape, size), (size, *shape[1:])
        if len(shape) != 3 and options.spatial:
            raise UsageError(f"--attention.spatial needs a map, which --attention.reduction {options.reduction} is not")
        width = shape[0] if options.spatial else math.prod(shape)
        threshold: float | Ramp | None = options.threshold
        if options.ramp_from is not None:
            end = options.threshold or coupled_threshold(options.var_threshold, context.noise_std)
            threshold = Ramp(options.ramp_from, end)
        same = ("num_slots", "eps_var", "var_threshold", "spatial", "gamma", "hinge", "dropout")
        surrogate = cls(
            width, num_heads=math.gcd(4, width), reg_strength=context.noise_std, num_classes=context.num_classes,
            reduction=reduction, threshold=threshold, backend=context.backend,
            **{name: getattr(options, name) for name in same},
        )  # fmt: skip
        surrogate.trained = options.trained
        return surrogate.requires_grad_(options.trained != "frozen")

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        """Whether all of its operators run as kernels: the others ask the device for the largest class."""
        return self.backend in ("auto", "triton")

    def measure(self, batch: Batch, *, slot_noise: Tensor | None = None) -> Measured:
        """See :class:`~cem.Surrogate`.

        Args:
            batch: labels and clean features are used.
            slot_noise: the slots' draw ``ε [K, S, D]``, for reproductions.
        """
        features, groups = self.grouped(batch)
        features = groups.kept(features)  # a norm of what is not finite has no gradient of zero
        product_dtype = batch.features.dtype if batch.features.dtype in HALF else None
        if self.reduction is not None:
            with torch.autocast(features.device.type, enabled=False):
                features = self.reduction(features)
        tokens, _ = Normalized.apply((spatial if self.spatial else flat)(features, self.feature_dim))
        slots = self.slot_attention(tokens, groups, slot_noise, product_dtype)
        enhanced = self.cross_attention(tokens, slots, groups, product_dtype)
        penalty = self.penalty
        if isinstance(self.threshold, Ramp):
            penalty = replace(penalty, threshold=self.threshold())
        result = class_variance(enhanced, groups, penalty, min_samples=self.min_samples, backend=self.backend)
        own_loss = None if self.trained == "frozen" else result.rob_loss
        return self.measured(result)._replace(own_loss=own_loss)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See :class:`~cem.Term`."""
        if not isinstance(self.trained, float):
            return {}
        return {"adam": torch.optim.Adam(self.parameters(), lr=self.trained)}

    def shared_parameters(self) -> list[nn.Parameter]:
        """See :class:`~cem.Term`."""
        return list(self.parameters()) if self.trained == "shared" else []

    def before_epoch(self, epoch: int, epochs: int) -> None:
        """See :class:`~cem.Term`: moves a ramp."""
        if isinstance(self.threshold, Ramp):
            self.threshold.before_epoch(epoch, epochs)

    def extra_repr(self) -> str:
        threshold = f", threshold={self.threshold:g}" if isinstance(self.threshold, float) else ""
        return (
            f"{self.feature_dim}, num_classes={self.num_classes}, spatial={self.spatial}{threshold}, "
            f"hinge={self.penalty.hinge!r}, backend={self.backend!r}"
        )


def linear_reduction(feature_dim: int, width: int) -> nn.Module:
    """A linear map of flattened features, for ``reduction``.

    Args:
        feature_dim: width of one sample's flattened features.
        width: what it projects to: the surrogate's ``feature_dim``.

    Returns:
        A module ``[B, ...]`` → ``[B, width]``, without a bias.

    Raises:
        ValueError: a size below 1.

    Example::

        >>> import cem
        >>> surrogate = cem.SlotCrossAttentionCEM(
        ...     32, num_classes=10, reg_strength=0.1, reduction=cem.linear_reduction(128, 32)
        ... )
    """
    check_sizes(feature_dim=feature_dim, width=width)
    return nn.Sequential(nn.Flatten(), nn.Linear(feature_dim, width, bias=False))


def conv_reduction(feature_shape: tuple[int, ...], channels: int) -> nn.Module:
    """A 1×1 convolution of maps, for ``reduction``.

    Args:
        feature_shape: ``(C, H, W)`` of one sample's features.
        channels: what it leaves of ``C``: the surrogate's ``feature_dim`` with ``spatial``, else that is
            ``channels·H·W``.

    Returns:
        A module ``[B, C, H, W]`` or ``[B, C·H·W]`` → ``[B, channels, H, W]``, without a bias.

    Raises:
        ValueError: a size below 1.

    Example::

        >>> import cem
        >>> surrogate = cem.SlotCrossAttentionCEM(
        ...     4, num_classes=10, reg_strength=0.1, spatial=True, reduction=cem.conv_reduction((8, 7, 7), 4)
        ... )
    """
    check_sample_shape("feature_shape", feature_shape, ("CHW",))
    check_sizes(channels=channels)
    convolution = _Pointwise(feature_shape[0], channels, kernel_size=1, bias=False)
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, feature_shape), convolution)


class _Pointwise(nn.Conv2d):
    """A 1×1 convolution as the product of matrices that it is: convolutions have a TF32 switch of their own, which is
    on by default."""

    def forward(self, input: Tensor) -> Tensor:
        return (self.weight.flatten(1) @ input.flatten(2)).unflatten(2, input.shape[2:])


def parsed_reduction(text: str) -> tuple[str, int]:
    """``"linear128"`` → ``("linear", 128)``; ``auto`` and ``none`` have no number.

    Raises:
        UsageError: it is neither.
    """
    found = re.fullmatch(r"(linear|conv)([1-9][0-9]*)", text)
    if found is None and text not in ("auto", "none"):
        raise UsageError(f"--attention.reduction takes auto, none, linearN or convN, got {text!r}")
    return (found[1], int(found[2])) if found else (text, 0)
