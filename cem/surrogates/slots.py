"""Nats that variances around several running slots a class let through the noise: the recommended surrogate."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from cem.options import Options as BaseOptions
from cem.options import option
from cem.surrogates.base import ASSESSED
from cem.surrogates.variance import VarianceSurrogate, flat, spatial
from cem.terms import Batch, Context, Measured
from cem_kernels import ClassGroups, Nats, RunningSlots, backends
from cem_kernels.slot_variance import slot_variance
from cem_kernels.slot_variance.api import size_outside_kernels
from cem_kernels.validation import check_sizes
from cem_kernels.variance import class_variance

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SlotCEM(VarianceSurrogate):
    """What a mixture of Gaussians around a class's running slots tells through the noise, ``½ log(1 + v/σ²)``.

    As :class:`~cem.CentroidCEM`, but a class has several centers, each with variances of its own, and a sample attends
    to them by how well they explain it: a class of several modes need not become one point. One slot is the centroid.
    See :func:`cem_kernels.slot_variance.slot_variance`. A call in training moves the slots: one call a step, and no
    activation checkpointing around it. In ``eval()`` nothing moves, and every class of two samples or more is measured
    around its mean in the batch.

    Args:
        feature_dim: ``D``, width of one sample's flattened features; with ``spatial`` the channels of the map.
        num_classes: ``K``; labels lie in ``[0, K)``.
        noise_std: ``σ``, standard deviation of the noise at the cut, in units of the features.
        num_slots: ``S``, of each class; kernels take 16 at most.
        spatial: every position of a map ``[B, C, H, W]`` is a sample of its image's class.
        backend: see :mod:`cem_kernels.backends`.
        process_group: see :class:`~cem.Term`.

    Attributes:
        centroids, variances: ``[K, S, D]`` fp32, buffers.
        shares: ``[K, S]`` fp32, of the class's samples; a buffer.
        batches: ``[K]`` int64, how many moved each class since it began; a buffer.
        ignored: ``[K]`` int64, how many in a row were outliers and moved nothing; a buffer.

    Features are ``[B, D]`` or ``[B, C, H, W]`` with as many numbers, fp16, bf16, fp32 or fp64; losses are fp32 or
    wider.

    Raises:
        ValueError: a size below 1, ``noise_std`` not positive, or an unknown backend.
        BackendUnavailableError: the backend that is asked for by name is not to be had.

    Example::

        >>> import torch, cem
        >>> surrogate = cem.SlotCEM(feature_dim=4, num_classes=2, noise_std=0.1)
        >>> features = torch.randn(16, 4, requires_grad=True)
        >>> rob_loss, intra_mse = surrogate(features, torch.arange(16) % 2)
        >>> rob_loss.backward()
        >>> features.grad.shape
        torch.Size([16, 4])
    """

    name = "slots"
    summary = "the same around several running slots a class, to which samples attend; recommended"

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of ``--surrogate slots``.

        Attributes:
            num_slots: Slots of each class; one is a centroid.
            spatial: Let every position of the feature map be a sample of its image's class.
        """

        weight: ClassVar[float] = 0.5
        num_slots: int = option(4, least=1)
        spatial: bool = option(False)

    centroids: Tensor
    variances: Tensor
    shares: Tensor
    batches: Tensor
    ignored: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        noise_std: float,
        num_slots: int = 4,
        *,
        spatial: bool = False,
        backend: str = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_classes, None, backend, process_group)
        check_sizes(feature_dim=feature_dim, num_classes=num_classes, num_slots=num_slots)
        backends.check_available(backend, "slot_variance", size_outside_kernels(num_classes, num_slots))
        self.feature_dim, self.num_slots, self.spatial, self.penalty = feature_dim, num_slots, spatial, Nats(noise_std)
        self.register_buffer("centroids", torch.zeros(num_classes, num_slots, feature_dim))
        self.register_buffer("variances", torch.zeros(num_classes, num_slots, feature_dim))
        self.register_buffer("shares", torch.zeros(num_classes, num_slots))
        self.register_buffer("batches", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("ignored", torch.zeros(num_classes, dtype=torch.int64))

    @classmethod
    def build(cls, options: Options, context: Context) -> SlotCEM:
        """See :class:`~cem.Surrogate`."""
        shape = context.feature_shape
        if options.spatial and len(shape) != 3:
            raise ValueError(f"spatial tokens need features (C, H, W), got {shape}")
        width = shape[0] if options.spatial else torch.Size(shape).numel()
        return cls(
            width, context.num_classes, context.noise_std, options.num_slots, spatial=options.spatial,
            backend=context.backend,
        )  # fmt: skip

    def measure(self, batch: Batch) -> Measured:
        """See :class:`~cem.Surrogate`."""
        features = batch.features.to(torch.promote_types(batch.features.dtype, torch.float32))
        tokens = (spatial if self.spatial else flat)(features, self.feature_dim)  # [B, T, D]
        labels = batch.labels.repeat_interleave(tokens.shape[1]) if self.spatial else batch.labels
        groups = ClassGroups.from_labels(labels, self.centroids.shape[0])
        samples = tokens.flatten(0, 1)
        ignored = self.ignored.clone()
        if self.training:
            running = RunningSlots(self.centroids, self.variances, self.shares, self.batches, self.ignored)
            result = slot_variance(samples, groups, running, self.penalty, backend=self.backend)
        else:
            result = class_variance(samples, groups, self.penalty, backend=self.backend)
        outliers = (self.ignored > ignored).sum()
        return Measured(result.rob_loss, {"intra_mse": result.intra_mse, "outliers": outliers})

    @torch.no_grad()
    def assess(self, features: Tensor, labels: Tensor) -> float | None:
        """See :class:`~cem.Surrogate`; around slots that begin with these features and see all of them once before."""
        twin = copy.deepcopy(self).train()
        twin._group.leave()
        for buffer in twin.buffers():
            buffer.zero_()
        batches = torch.randperm(len(labels)).to(features.device).split(ASSESSED)
        for rows in batches:
            twin(features[rows], labels[rows])
        losses = [twin(features[rows], labels[rows])[0].item() * len(rows) for rows in batches]
        return sum(losses) / len(labels)

    def extra_repr(self) -> str:
        return (
            f"{self.feature_dim}, num_classes={self.num_classes}, noise_std={self.penalty.noise_std:g}, "
            f"num_slots={self.num_slots}, spatial={self.spatial}, backend={self.backend!r}"
        )
