"""ResNet for small images (He et al., 2015, section 4.2), as a flat sequence of stages."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def resnet(depth: int, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Build the CIFAR ResNet of ``depth = 6n + 2`` layers: ``n`` blocks each at 16, 32 and 64 channels.

    Where the paper's shortcut pads with zeros (option A), torchvision's block has a 1x1 convolution (option
    B): with ten classes, ResNet-20 has 0.2725M parameters instead of 0.2697M.

    Args:
        depth: 20 or 32 (any ``6n + 2``).
        num_classes: width of the logits.
        image_shape: ``(C, H, W)`` of one image.

    Returns:
        Stages ``stem, block1, ..., head``; the last module of ``head`` is an ``nn.Linear``.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(
            nn.Conv2d(image_shape[0], 16, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
        )
    )
    channels = 16
    for width in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            stages[f"block{len(stages)}"] = _block(channels, width)
            channels = width
    stages["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

    model = nn.Sequential(stages)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _block(in_channels: int, out_channels: int) -> nn.Module:
    # Imported where it builds: a command that only shows its help needs no torchvision.
    from torchvision.models.resnet import BasicBlock

    if in_channels == out_channels:
        return BasicBlock(in_channels, out_channels)
    shortcut = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=2, bias=False), nn.BatchNorm2d(out_channels)
    )
    return BasicBlock(in_channels, out_channels, stride=2, downsample=shortcut)
