"""A small convolutional network, as a client without a GPU has it, as a flat sequence of stages."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def convnet(width: int, pool: bool, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Build four convolutions of ``width``, ``2 width``, ``4 width`` and ``4 width`` channels.

    Strides of the first, the second and the last halve the side of the map. With ``pool`` no convolution has a stride,
    and maxima behind the first three do. Cut after two, 28x28 pixels are 7x7 positions either way, at a width of 32 for
    a million multiply-adds or for four.

    Args:
        width: channels of the first convolution.
        pool: halve by max pooling.
        num_classes: width of the logits.
        image_shape: ``(C, H, W)`` of one image.

    Returns:
        Stages ``conv1, ..., conv4, head``; the last module of ``head`` is an ``nn.Linear``.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    channels = image_shape[0]
    for number, out in enumerate([width, 2 * width, 4 * width, 4 * width], start=1):
        stride = 1 if pool or number == 3 else 2
        convolution = nn.Conv2d(channels, out, kernel_size=3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        stage = nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))
        if pool and number < 4:
            stage.append(nn.MaxPool2d(2))
        stages[f"conv{number}"] = stage
        channels = out
    stages["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    return nn.Sequential(stages)
