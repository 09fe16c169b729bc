"""Nats that variances around running class centroids let through the noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from cem.options import Options as BaseOptions
from cem.options import option
from cem.surrogates.variance import VarianceSurrogate, flat
from cem.terms import Batch, Context, Measured
from cem_kernels import Nats, RunningMoments, backends
from cem_kernels.validation import check_sizes
from cem_kernels.variance import centroid_variance, class_variance
from cem_kernels.variance.running import MOMENTUM

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CentroidCEM(VarianceSurrogate):
    """What a Gaussian of the variance around running class centroids tells through the noise, ``½ log(1 + v/σ²)``.

    The mean over columns, in nats, weighted by the classes' samples: Eq. 7 of arXiv:2503.00383v2 but for the terms
    without a gradient, in the space that the noise is added in. Around centroids that move slowly an encoder cannot
    lower variances by making all features smaller; see :func:`cem_kernels.variance.centroid_variance`. A call in
    training moves the moments: one call a step, and no activation checkpointing around it. In ``eval()`` nothing moves,
    and every class of two samples or more is measured around its mean in the batch.

    Args:
        feature_dim: ``D``, width of one sample's flattened features.
        num_classes: ``K``; labels lie in ``[0, K)``.
        noise_std: ``σ``, standard deviation of the noise at the cut, in units of the features.
        momentum: in (0, 1); ``1 / (1 − momentum)`` batches is how far centroids look back. The default was a little
            better than the .99 that is usual, begun with the mean of the batches there are: behind a small client an
            attacker erred 1.06 times as much at equal accuracy (95 %: .97 to 1.17); on digits it gained nothing.
        backend: see :mod:`cem_kernels.backends`.
        process_group: see :class:`~cem.Term`.

    Attributes:
        centroids, variances: ``[K, D]`` fp32, buffers.
        batches: ``[K]`` int64, how many moved each class since it began; a buffer.
        ignored: ``[K]`` int64, how many in a row were outliers and moved nothing; a buffer.

    Features are ``[B, D]`` or ``[B, C, H, W]`` with as many numbers, fp16, bf16, fp32 or fp64; losses are fp32 or
    wider.

    Raises:
        ValueError: a size below 1, ``noise_std`` not positive, ``momentum`` out of range, or an unknown backend.
        BackendUnavailableError: the backend that is asked for by name is not to be had.

    Example::

        >>> import torch, cem
        >>> surrogate = cem.CentroidCEM(feature_dim=4, num_classes=2, noise_std=0.1)
        >>> features = torch.randn(8, 4, requires_grad=True)
        >>> rob_loss, intra_mse = surrogate(features, torch.arange(8) % 2)
        >>> rob_loss.backward()
        >>> features.grad.shape
        torch.Size([8, 4])
    """

    name = "centroid"
    summary = "nats that variances around running class centroids let through the noise"

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of ``--surrogate centroid``.

        Attributes:
            momentum: Centroids look back over 1/(1 - momentum) batches.
        """

        weight: ClassVar[float] = 0.5
        momentum: float = option(MOMENTUM, above=0, below=1)

    centroids: Tensor
    variances: Tensor
    batches: Tensor
    ignored: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        noise_std: float,
        momentum: float = MOMENTUM,
        *,
        backend: str = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_classes, None, backend, process_group)
        check_sizes(feature_dim=feature_dim, num_classes=num_classes)
        if not 0 < momentum < 1:
            raise ValueError(f"momentum must lie between 0 and 1, got {momentum}")
        backends.check_available(backend, "centroid_variance")
        self.feature_dim, self.penalty, self.momentum = feature_dim, Nats(noise_std), momentum
        self.register_buffer("centroids", torch.zeros(num_classes, feature_dim))
        self.register_buffer("variances", torch.zeros(num_classes, feature_dim))
        self.register_buffer("batches", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("ignored", torch.zeros(num_classes, dtype=torch.int64))

    @classmethod
    def build(cls, options: Options, context: Context) -> CentroidCEM:
        """See :class:`~cem.Surrogate`."""
        width = torch.Size(context.feature_shape).numel()
        return cls(width, context.num_classes, context.noise_std, options.momentum, backend=context.backend)

    def measure(self, batch: Batch) -> Measured:
        """See :class:`~cem.Surrogate`."""
        features, groups = self.grouped(batch)
        tokens = flat(features, self.feature_dim)
        ignored = self.ignored.clone()
        if self.training:
            running = RunningMoments(self.centroids, self.variances, self.batches, self.ignored)
            result = centroid_variance(
                tokens, groups, running, self.penalty, momentum=self.momentum, backend=self.backend
            )
        else:
            result = class_variance(tokens, groups, self.penalty, backend=self.backend)
        outliers = (self.ignored > ignored).sum()
        return Measured(result.rob_loss, {"intra_mse": result.intra_mse, "outliers": outliers})

    def extra_repr(self) -> str:
        return (
            f"{self.feature_dim}, num_classes={self.num_classes}, noise_std={self.penalty.noise_std:g}, "
            f"momentum={self.momentum:g}, backend={self.backend!r}"
        )
