"""Networks that turn features back into images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from cem.models.split import ImageShape
from cem_kernels.validation import check_sample_shape

DECODER_NAMES = "res_normN8C64 (N residual blocks of C channels, any numbers), deconvC64 (transposed convolutions only)"
"""What decoder names look like, for messages."""

SMALLEST_SIDE = 7  # pixels; flat features become a map of at most this size, and grow from there


def build_decoder(name: str, feature_shape: tuple[int, ...], image_shape: ImageShape) -> nn.Module:
    """Build an untrained decoder, features ``[B, *feature_shape]`` → images ``[B, C, H, W]`` in [0, 1].

    Names are those of the original code: ``res_normN8C64`` has 8 residual blocks of 64 channels with batch
    normalization at the features' own resolution, then a transposed convolution for each doubling of the
    side. ``deconvC64`` is the transposed convolutions alone. Features may be a map or a vector, of any size:
    sides that no doubling hits are overshot and resized in the end.

    Args:
        name: see :data:`DECODER_NAMES`.
        feature_shape: ``(C, H, W)`` or ``(D,)``.
        image_shape: ``(C, H, W)``.

    Raises:
        ValueError: an unknown name, or features that are neither a map nor a vector.
    """
    check_sample_shape("feature_shape", feature_shape, ("CHW", "D"))
    check_sample_shape("image_shape", image_shape, ("CHW",))
    channels, body = parse_decoder(name)
    return _Decoder(feature_shape, image_shape, channels, body())


def parse_decoder(name: str) -> tuple[int, Callable[[], list[nn.Module]]]:
    """The channels of the decoder ``name``, and what builds the layers that set it apart.

    Raises:
        ValueError: an unknown name.
    """
    for pattern, body in _BODIES.items():
        match = re.fullmatch(pattern, name)
        if match:
            numbers = {key: int(value) for key, value in match.groupdict().items()}
            if numbers["channels"] < 1:
                break
            return numbers["channels"], partial(body, **numbers)
    raise ValueError(f"decoder must be one of {DECODER_NAMES}, got {name!r}")


class ResidualBlock(nn.Module):
    """``x + conv(relu(norm(conv(relu(norm(x))))))``, with a 1×1 shortcut where channels change; He et al. 2016."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            nn.ReLU(),
            nn.Conv2d(channels_in, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        same = channels_in == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


class _Decoder(nn.Module):
    """Features to a map, ``body`` at that resolution, doublings, and a convolution to pixels."""

    def __init__(
        self, feature_shape: tuple[int, ...], image_shape: ImageShape, channels: int, body: list[nn.Module]
    ) -> None:
        super().__init__()
        colors, *self.size = image_shape
        if len(feature_shape) == 3:
            channels_in, *side = feature_shape
            start: list[nn.Module] = []
        else:
            side = [_halved(length) for length in self.size]
            channels_in = channels
            start = [nn.Linear(feature_shape[0], channels * math.prod(side)), nn.Unflatten(1, (channels, *side))]
        # Sides that are no power of two times the map's are overshot: what is not drawn finely enough before the
        # last resizing is lost.
        doublings = max(0, *(math.ceil(math.log2(image / own)) for image, own in zip(self.size, side, strict=True)))
        self.layers = nn.Sequential(
            *start,
            # Channels that hardly vary must be readable too: features are standardized before anything else.
            nn.BatchNorm2d(channels_in),
            nn.Conv2d(channels_in, channels, 3, padding=1),
            *body,
            *(layer for _ in range(doublings) for layer in _doubling(channels)),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, colors, 3, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        x = self.layers(z)
        if list(x.shape[-2:]) != self.size:
            x = F.interpolate(x.float(), self.size, mode="bilinear", antialias=True)  # not defined for bfloat16
        return x.sigmoid()


def _doubling(channels: int) -> list[nn.Module]:
    """Twice the height and width."""
    upsample = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False)
    return [nn.BatchNorm2d(channels), nn.ReLU(), upsample]


def _halved(length: int) -> int:
    """``length`` halved until it is no more than ``SMALLEST_SIDE``."""
    while length > SMALLEST_SIDE:
        length = math.ceil(length / 2)
    return length


_BODIES: dict[str, Callable[..., list[nn.Module]]] = {
    r"res_normN(?P<blocks>\d+)C(?P<channels>\d+)": lambda blocks, channels: [
        ResidualBlock(channels, channels) for _ in range(blocks)
    ],
    r"deconvC(?P<channels>\d+)": lambda channels: [],
}
