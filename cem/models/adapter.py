"""More convolutions for the client: a penalty helps as far as the encoder can follow it."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from cem.errors import UsageError


class ResidualConvolution(nn.Module):
    """``x + ReLU(BatchNorm(convolution(x)))``, for maps ``[B, channels, H, W]`` of any size; the kernel is 3×3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.normalization = nn.BatchNorm2d(channels)
        # He et al. (2015), as the networks around it; what follows makes the size of the weights immaterial.
        nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.normalization(self.convolution(x)).relu()


def build_adapter(number: int, channels: int) -> nn.Sequential:
    """``number`` residual convolutions, maps ``[B, channels, H, W]`` to maps of the same shape.

    Raises:
        UsageError: ``number`` is below 0, or no whole number.
    """
    if type(number) is not int or number < 0:
        raise UsageError(f"adapter must be a whole number of at least 0, got {number!r}")
    return nn.Sequential(OrderedDict((f"block{each}", ResidualConvolution(channels)) for each in range(1, number + 1)))
