"""The narrow layer at the cut, written as a string such as ``noRELU_C8S1``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import nn

from cem.errors import UsageError

_GRAMMAR = re.compile(r"(?P<linear>noRELU_)?(?:K(?P<kernel>[0-9]+))?C(?P<channels>[0-9]+)S(?P<stride>[0-9]+)")


@dataclass(frozen=True)
class Bottleneck:
    """A convolution that narrows the map on the client, mirrored by one that restores it on the server.

    Args:
        channels: channels of the map that is sent.
        stride: both sides of the map shrink by this factor, rounded up.
        kernel_size: odd side of both convolutions' kernels.
        relu: a ReLU after each of the two convolutions.

    Raises:
        UsageError: a number below 1 or too large, or an even kernel.
    """

    channels: int
    stride: int
    kernel_size: int = 3
    relu: bool = True

    def __post_init__(self) -> None:
        sizes = (self.channels, self.stride, self.kernel_size)
        if not all(isinstance(size, int) and 1 <= size < 2**31 for size in sizes):
            raise UsageError(f"channels, stride and kernel_size must be at least 1 and below 2**31, got {self}")
        if self.kernel_size % 2 == 0:
            raise UsageError(f"kernel_size must be odd to keep the map centered, got {self.kernel_size}")

    def client(self, channels: int) -> nn.Sequential:
        """``[B, channels, H, W]`` -> ``[B, self.channels, ceil(H / stride), ceil(W / stride)]``."""
        convolution = nn.Conv2d(channels, self.channels, self.kernel_size, self.stride, self.kernel_size // 2)
        return self._layer(convolution, fan_in=channels * self.kernel_size**2)

    def server(self, channels: int, height: int, width: int) -> nn.Sequential:
        """The way back: what :meth:`client` made of a map -> ``[B, channels, height, width]``."""
        convolution: nn.Conv2d | nn.ConvTranspose2d
        if self.stride == 1:
            convolution = nn.Conv2d(self.channels, channels, self.kernel_size, padding=self.kernel_size // 2)
        else:
            convolution = nn.ConvTranspose2d(
                self.channels,
                channels,
                self.kernel_size,
                self.stride,
                self.kernel_size // 2,
                # Several sizes shrink to the same one; this picks the size that was there before.
                output_padding=((height - 1) % self.stride, (width - 1) % self.stride),
            )
        return self._layer(convolution, fan_in=self.channels * (self.kernel_size / self.stride) ** 2)

    def _layer(self, convolution: nn.Conv2d | nn.ConvTranspose2d, fan_in: float) -> nn.Sequential:
        # He et al. (2015): both layers keep the variance of the signal, as if they were not there.
        nn.init.normal_(convolution.weight, std=math.sqrt((2 if self.relu else 1) / fan_in))
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        return nn.Sequential(convolution, nn.ReLU()) if self.relu else nn.Sequential(convolution)


def parse_bottleneck(text: str) -> Bottleneck | None:
    """Read ``[noRELU_][Kk]CcSs``: no ReLU, kernel k (default 3), c channels, stride s; ``"none"`` gives None.

    Raises:
        UsageError: anything else; nothing is guessed.
    """
    if text == "none":
        return None
    match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise UsageError(
            f"bottleneck must be 'none' or [noRELU_][Kk]CcSs (kernel k, channels c, stride s), "
            f"such as C8S1 or noRELU_K5C8S2, got {text!r}"
        )
    channels, stride, kernel = int(match["channels"]), int(match["stride"]), int(match["kernel"] or 3)
    try:
        return Bottleneck(channels, stride, kernel, relu=match["linear"] is None)
    except UsageError as error:
        raise UsageError(f"bottleneck {text!r}: {error}") from error
