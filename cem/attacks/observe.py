"""What an attacker gets to see."""

from __future__ import annotations

import torch
from torch import Tensor

from cem.data import ImageSet, make_loader
from cem.models import SplitModel
from cem.progress import over

CACHE_BYTES = 2**30
"""Features of a set of images are kept rather than computed anew in every pass where they are smaller than this."""

_BATCH = 500  # images


@torch.no_grad()
def observe(model: SplitModel, images: Tensor, queries: int = 1) -> Tensor:
    """Features of images as they cross the cut, after the defense; see :func:`defended`.

    Args:
        model: in evaluation mode, as it is in use.
        images: ``[B, C, H, W]``, in [0, 1].
        queries: how often each image is sent.

    Returns:
        ``[B, *feature_shape]``.
    """
    return defended(model, model.encoder(images), queries)


@torch.no_grad()
def defended(model: SplitModel, z: Tensor, queries: int = 1) -> Tensor:
    """Clean features ``z [B, *feature_shape]`` after the defense, averaged over repeated queries.

    The client computes the same ``z`` every time and the defense draws anew, so independent noise of variance
    ``σ²`` falls to ``σ²/queries`` for whoever sees an image several times.
    """
    # Summed one by one: a stack of hundreds of answers would not fit.
    total = model.defense(z)
    for _ in range(queries - 1):
        total = total + model.defense(z)
    return total / queries


@torch.no_grad()
def clean_features(model: SplitModel, images: ImageSet) -> Tensor | None:
    """Features ``[N, *feature_shape]`` of all images before the defense, on the model's device.

    ``None`` if they would take more than :data:`CACHE_BYTES`. The encoder is deterministic and may cost as much
    as a small decoder: computing them once can halve an attack's time.
    """
    if 4 * len(images) * torch.Size(model.feature_shape).numel() > CACHE_BYTES:
        return None
    device = next(model.parameters()).device
    batches = over(make_loader(images, _BATCH, shuffle=False), "features")
    return torch.cat([model.encoder(batch.to(device, non_blocking=True)) for batch, _ in batches])
