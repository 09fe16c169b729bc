"""A small convolutional network, as a client without a GPU has it, as a flat sequence of stages."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def convnet(width: int, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Build four convolutions of ``width``, ``2 width``, ``4 width`` and ``4 width`` channels.

    All but the third halve the side of the map by a stride: cut after two, 28x28 pixels are 7x7 positions, for a
    million multiply-adds at a width of 32.

    Args:
        width: channels of the first convolution.
        num_classes: width of the logits.
        image_shape: ``(C, H, W)`` of one image.

    Returns:
        Stages ``conv1, ..., conv4, head``; the last module of ``head`` is an ``nn.Linear``.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    channels = image_shape[0]
    for number, (out, stride) in enumerate([(width, 2), (2 * width, 2), (4 * width, 1), (4 * width, 2)], start=1):
        convolution = nn.Conv2d(channels, out, kernel_size=3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        stages[f"conv{number}"] = nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))
        channels = out
    stages["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    return nn.Sequential(stages)
