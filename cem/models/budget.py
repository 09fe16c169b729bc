"""What the client pays for an image."""

from __future__ import annotations

import math

import torch

from cem.models.split import ImageShape, SplitModel, blank_image, dry_run

CLIENT_COSTS = ("client_parameters", "client_multiply_adds", "sent_bytes")
"""Names of what the client pays."""


def client_budget(model: SplitModel, image_shape: ImageShape) -> dict[str, int]:
    """Cost of the encoder, with adapter and the client's half of the bottleneck; the model stays as it is.

    Args:
        model: on any device.
        image_shape: ``(C, H, W)`` of one image.

    Returns:
        ``client_parameters``; ``client_multiply_adds`` of an image, those of convolutions and matrix products, as
        PyTorch's ``FlopCounterMode`` counts them; ``sent_bytes`` of an image, at four bytes a feature.
    """
    from torch.utils.flop_counter import FlopCounterMode  # only here: it brings Triton, half a second

    with FlopCounterMode(display=False) as counter:
        dry_run(model.encoder, blank_image(model.encoder, image_shape))
    parameters = sum(each.numel() for each in model.encoder.parameters())
    sent_bytes = torch.float32.itemsize * math.prod(model.feature_shape)
    return dict(zip(CLIENT_COSTS, (parameters, counter.get_total_flops() // 2, sent_bytes), strict=True))
