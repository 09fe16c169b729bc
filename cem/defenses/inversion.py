"""An attacker in training who needs none: images are read off the features of neighbors by softmax attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cem.defenses.base import Defense
from cem.options import Options as BaseOptions
from cem.options import option
from cem.terms import Batch, Context, Measured, Term, attached_zero
from cem_kernels import IGNORED
from cem_kernels.validation import check_not_negative, check_sample_shape, check_sizes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SHARPNESS = 8  # mean squared distances over the bandwidth
WIDEST = 16  # pixels in a row of what is read
ROUNDING = 64  # times a feature's rounding: nearer than that are none


class NeighborAttacker(Term):
    """Minus the error of images that are read off neighbors of the same class, relative to the class mean's.

    Each image, pooled by two and to at most 16×16, is reconstructed from what is sent of it, ``z_i``: the mean over
    the other samples of its class, in the batch and in a memory of samples before, weighted by softmax attention::

        a_ij = softmax over j of (−8 |z_i − z_j|² / mean squared distance inside classes)      x̂_i = Σ_j a_ij x_j
        loss = −Σ |x̂_i − x_i|² / Σ |mean_j x_j − x_i|²

    −1 is an attacker who finds nothing but the class, 0 one who finds everything. Nothing is learned: the estimate,
    that of Nadaraya 1964 and Watson 1964, follows the encoder at once, but for what is remembered of earlier features.
    Distances that are rounding of the features themselves, as where a class has become one point and no noise is
    sent, count as none.

    The memory holds images of the training set, pooled, and is part of ``state_dict``.

    Args:
        feature_dim: ``D``, width of one sample's flattened features.
        image_shape: ``(C, H, W)``.
        memory: how many samples of batches before are neighbors too, without a gradient; 0 for none.
        process_group: see :class:`~cem.Term`.

    Attributes:
        features, pixels, labels: ``[memory, ...]``, a ring of what is remembered; buffers.
        position: where the next sample goes; a buffer.

    Raises:
        ValueError: ``feature_dim`` below 1, ``memory`` below 0 or no whole number, or no image shape; in ``measure``,
            images that are missing or of another shape, or features of another width.

    Example::

        >>> import torch, cem
        >>> from cem.defenses.inversion import NeighborAttacker
        >>> z = torch.randn(8, 4)
        >>> batch = cem.Batch(torch.rand(8, 1, 6, 6), torch.zeros(8, dtype=torch.int64), z, z)
        >>> -1.5 < NeighborAttacker(4, (1, 6, 6)).measure(batch).loss < 0
        tensor(True)
    """

    needs_images = True

    features: Tensor
    pixels: Tensor
    labels: Tensor
    position: Tensor

    def __init__(
        self,
        feature_dim: int,
        image_shape: tuple[int, int, int],
        memory: int = 512,
        *,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(process_group=process_group)
        check_sizes(feature_dim=feature_dim)
        check_not_negative(memory=memory)
        if memory:
            check_sizes(memory=memory)
        check_sample_shape("image_shape", image_shape, ("CHW",))
        self.image_shape = image_shape
        channels, *sides = image_shape
        high, wide = (min(math.ceil(side / 2), WIDEST) for side in sides)
        self.size = high, wide
        width = channels * high * wide
        self.register_buffer("features", torch.zeros(memory, feature_dim))
        self.register_buffer("pixels", torch.zeros(memory, width))
        self.register_buffer("labels", torch.full((memory,), IGNORED))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def measure(self, batch: Batch) -> Measured:
        """See :class:`~cem.Term`; in training mode the batch is remembered."""
        images = self._checked(batch)
        if not len(images):
            loss = attached_zero(batch.sent)
            return Measured(loss, {"error": -loss.detach()})
        with torch.autocast(batch.sent.device.type, enabled=False):
            wide = torch.promote_types(batch.sent.dtype, torch.float32)
            labels = batch.labels.long()
            ignored = (labels == IGNORED)[:, None]
            pixels = F.adaptive_avg_pool2d(images.to(wide), self.size).flatten(1).masked_fill(ignored, 0)
            sent = batch.sent.to(wide).flatten(1).masked_fill(ignored, 0)
            features, values = (
                torch.cat(each) for each in ([sent, self.features.to(wide)], [pixels, self.pixels.to(wide)])
            )
            same = labels[:, None] == torch.cat([labels, self.labels])
            error, chance = self._errors(features, pixels, values, same, ignored)
            loss = -error / chance.clamp(min=torch.finfo(chance.dtype).tiny)
        if self.training:
            self._remember(sent.detach().to(self.features.dtype), pixels.to(self.pixels.dtype), labels)
        return Measured(loss, {"error": -loss})

    def _checked(self, batch: Batch) -> Tensor:
        """The images of a batch that fits."""
        size, width = len(batch.labels), self.features.shape[1]
        if batch.images is None or tuple(batch.images.shape) != (size, *self.image_shape):
            found = None if batch.images is None else list(batch.images.shape)
            raise ValueError(f"images must have shape {[size, *self.image_shape]}, got {found}")
        if math.prod(batch.sent.shape[1:]) != width:
            raise ValueError(f"features must have {width} numbers a sample, got {list(batch.sent.shape)}")
        return batch.images

    def _errors(
        self, features: Tensor, pixels: Tensor, values: Tensor, same: Tensor, ignored: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Squared errors of attention, and of the mean of all peers; both sums over samples that have a peer.

        Args:
            features: ``[N, D]``, of the batch's ``B`` samples and of those remembered.
            pixels: ``[B, P]``.
            values: ``[N, P]``.
            same: ``[B, N]``, who is of whose class.
            ignored: ``[B, 1]``, who is of no class.
        """
        num_samples = len(pixels)
        with torch.no_grad():  # seen from the middle of its class, or differences of large squares would be rounded
            of_batch = same[:, :num_samples].to(features.dtype)
            middles = of_batch @ features[:num_samples] / of_batch.sum(dim=1, keepdim=True)
            origins = middles[same.int().argmax(dim=0)]
            least, eps = torch.finfo(features.dtype).tiny, torch.finfo(features.dtype).eps
            rounding = (ROUNDING * eps) ** 2 * features[:num_samples].square().sum(dim=1).mean()
        keys = features - origins
        queries = keys[:num_samples]
        peers = same & ~ignored
        peers[:, :num_samples].fill_diagonal_(False)
        squares = queries.square().sum(1)[:, None] - 2 * queries @ keys.T + keys.square().sum(1)
        pairs = peers.sum().clamp(min=1)
        bandwidth = torch.where(peers, squares.detach(), 0).sum() / pairs / SHARPNESS
        logits = torch.where(peers, -squares / bandwidth.clamp(min=rounding.clamp(min=least)), -torch.inf)
        lone = ~peers.any(dim=1, keepdim=True)
        attention = torch.softmax(logits.masked_fill(lone, 0.0), dim=1)
        uniform = peers.to(values.dtype) / peers.sum(dim=1, keepdim=True).clamp(min=1)
        found, mean = ((weights @ values - pixels).square().sum(dim=1) for weights in (attention, uniform))
        return torch.where(lone[:, 0], 0, found).sum(), torch.where(lone[:, 0], 0, mean).sum()

    @torch.no_grad()
    def _remember(self, features: Tensor, pixels: Tensor, labels: Tensor) -> None:
        """Puts samples over the oldest; one that is not finite is in no class, or it would spoil batches to come."""
        size = len(self.labels)
        features, pixels, labels = features[-size:], pixels[-size:], labels[-size:]
        if not size or not len(labels):
            return
        at = (self.position + torch.arange(len(labels), device=labels.device)) % size
        finite = features.square().sum(dim=1).isfinite() & pixels.isfinite().all(dim=1)  # distances are squares
        self.features.index_copy_(0, at, torch.where(finite[:, None], features, 0))
        self.pixels.index_copy_(0, at, torch.where(finite[:, None], pixels, 0))
        self.labels.index_copy_(0, at, torch.where(finite, labels, IGNORED))
        self.position.copy_((self.position + len(labels)) % size)


class AttentionInversion(Defense):
    """The encoder works against :class:`NeighborAttacker`; features are sent as they are."""

    name = "inversion"
    summary = "an attacker in training, who reads images off neighbors' features by attention"

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of ``--defenses inversion``.

        Attributes:
            weight: Weight of the attacker's error, relative to the class mean's.
            memory: Samples of batches before that the attacker reads off too.
        """

        weight: float = option(0.25, least=0)
        memory: int = option(512, least=0)

    def __init__(self, attacker: NeighborAttacker) -> None:
        super().__init__()
        self._attacker = (attacker,)  # no module of the model: who gets that gets none of the images remembered

    @classmethod
    def build(cls, options: Options, context: Context) -> AttentionInversion:
        """See :class:`~cem.Defense`."""
        return cls(NeighborAttacker(torch.Size(context.feature_shape).numel(), context.image_shape, options.memory))

    def term(self) -> NeighborAttacker:
        """See :class:`~cem.Defense`."""
        return self._attacker[0]
