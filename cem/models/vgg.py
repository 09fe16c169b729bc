"""VGG for small images (Simonyan and Zisserman, 2014), as a flat sequence of stages."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

# One entry, one stage: a number is a 3x3 convolution to so many channels, "M" a 2x2 max-pooling.
CONFIGURATIONS: dict[int, tuple[int | str, ...]] = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
}


def vgg(depth: int, num_classes: int, image_shape: tuple[int, int, int], *, batch_norm: bool) -> nn.Sequential:
    """Build VGG-11 or VGG-13.

    A pooling whose input is already narrower than its 2x2 window becomes the identity, so that images below
    32x32 work and stage numbers mean the same whatever the image size.

    Args:
        depth: 11 or 13.
        num_classes: width of the logits.
        image_shape: ``(C, H, W)`` of one image.
        batch_norm: batch normalization between convolution and ReLU.

    Returns:
        Stages ``conv1, pool1, ..., head``; the last module of ``head`` is an ``nn.Linear``.
    """
    channels, height, width = image_shape
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    convolutions = pools = 0
    for entry in CONFIGURATIONS[depth]:
        if isinstance(entry, int):
            convolutions += 1
            stages[f"conv{convolutions}"] = _convolution(channels, entry, height, width, batch_norm)
            channels = entry
        else:
            pools += 1
            fits = min(height, width) >= 2
            stages[f"pool{pools}"] = nn.MaxPool2d(2) if fits else nn.Identity()
            if fits:
                height, width = height // 2, width // 2
    stages["head"] = nn.Sequential(
        nn.AdaptiveAvgPool2d(1),  # 32x32 images are at 1x1 here; larger ones get a head of the same size
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(channels, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Linear(512, num_classes),
    )
    return nn.Sequential(stages)


def _convolution(in_channels: int, out_channels: int, height: int, width: int, batch_norm: bool) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    # He et al. (2015), without which ten layers do not train unless batch-normalized; but the fan-out counts only
    # what falls on the map, not on its padding: on the 1x1 maps of a small image that is one weight in nine.
    # (With the fan-in, plain VGG-11 diverges at a learning rate of 0.05.)
    fan_out = out_channels * (3 - 2 / height) * (3 - 2 / width)
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / fan_out))
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    normalization = [nn.BatchNorm2d(out_channels)] if batch_norm else []
    return nn.Sequential(convolution, *normalization, nn.ReLU(inplace=True))
