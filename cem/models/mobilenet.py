"""torchvision's MobileNetV2 (Sandler et al., 2018) as a flat sequence of stages."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

SMALL_IMAGE = 64  # pixels; below this the first two strides of 2 are dropped


def mobilenet_v2(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Build MobileNetV2 for images of any size.

    The published strides divide the image side by 32, which leaves nothing of a small one. Below 64 pixels
    the stem and the first strided block therefore keep the resolution, and the side is divided by 8.

    Args:
        num_classes: width of the logits.
        image_shape: ``(C, H, W)`` of one image.

    Returns:
        Stages ``stem, block1, ..., block17, conv, head``; the last module of ``head`` is an ``nn.Linear``.
    """
    # Imported where it builds: a command that only shows its help needs no torchvision.
    from torchvision.models import MobileNetV2
    from torchvision.ops import Conv2dNormActivation

    channels, height, width = image_shape
    stride = 1 if min(height, width) < SMALL_IMAGE else 2
    # Rows of table 2 of the paper: expansion, channels, repeats, stride of the first repeat.
    rows = [[1, 16, 1, 1], [6, 24, 2, stride], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2]]
    rows.append([6, 320, 1, 1])
    model = MobileNetV2(num_classes=num_classes, inverted_residual_setting=rows)
    stem = Conv2dNormActivation(channels, 32, stride=stride, activation_layer=nn.ReLU6)
    nn.init.kaiming_normal_(stem[0].weight, mode="fan_out")  # as torchvision for its own stem

    blocks = list(model.features)[1:-1]
    return nn.Sequential(
        OrderedDict(
            stem=stem,
            **{f"block{number}": block for number, block in enumerate(blocks, start=1)},
            conv=model.features[-1],
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *model.classifier),
        )
    )
