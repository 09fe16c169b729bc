"""Networks that turn features back into images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from cem.models.split import ImageShape
from cem_kernels.validation import check_sample_shape

NETWORK_NAMES = (
    "preactN8C64 (N pre-activation residual blocks of C channels, any numbers), res_normN8C64 (the published one), "
    "deconvC64 (transposed convolutions only)"
)
"""What networks are called, for messages."""

SMALLEST_SIDE = 7  # pixels; flat features become a map of at most this size, and grow from there


def build_network(name: str, feature_shape: tuple[int, ...], image_shape: ImageShape) -> nn.Module:
    """Build an untrained decoder, features ``[B, *feature_shape]`` → images ``[B, C, H, W]`` in [0, 1].

    ``preactN8C64``, ours: standardized features, 8 residual blocks of 64 channels with normalization before the
    activation (He et al. 2016) at the features' own resolution, then a transposed convolution for each doubling of the
    side. ``deconvC64`` has no blocks. ``res_normN8C64`` is the network of the published attack, layer for layer: see
    :class:`_Published`. Features may be a map or a vector, of any size: sides that no doubling hits are overshot and
    resized in the end.

    Args:
        name: see :data:`NETWORK_NAMES`.
        feature_shape: ``(C, H, W)`` or ``(D,)``.
        image_shape: ``(C, H, W)``.

    Raises:
        ValueError: an unknown name, or features that are neither a map nor a vector.
    """
    check_sample_shape("feature_shape", feature_shape, ("CHW", "D"))
    check_sample_shape("image_shape", image_shape, ("CHW",))
    blocks, channels, body = parse_network(name)
    colors, *size = image_shape
    start: list[nn.Module] = []
    if len(feature_shape) == 3:
        channels_in, *side = feature_shape
    else:
        side, channels_in = [_halved(length) for length in size], channels
        start = [nn.Linear(feature_shape[0], channels * math.prod(side)), nn.Unflatten(1, (channels, *side))]
    # Sides that are no power of two times the map's are overshot: what is not drawn finely enough before the
    # last resizing is lost.
    doublings = max(0, *(math.ceil(math.log2(image / own)) for image, own in zip(size, side, strict=True)))
    return _Decoder([*start, *body(channels_in, blocks, channels, doublings, colors)], size)


class Average(nn.Module):
    """The mean of what networks of one shape answer.

    Args:
        members: the best one first.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, z: Tensor) -> Tensor:
        answers = [member(z) for member in self.members]
        return answers[0] if len(answers) == 1 else sum(answers[1:], answers[0]) / len(answers)


def parse_network(name: str) -> tuple[int, int, Callable[..., list[nn.Module]]]:
    """Blocks and channels of the network ``name``, and what builds its layers between map and pixels.

    Raises:
        ValueError: an unknown name.
    """
    for pattern, body in _BODIES.items():
        match = re.fullmatch(pattern, name)
        if match:
            numbers = {key: int(value) for key, value in match.groupdict().items()}
            if numbers["channels"] >= 1:
                return numbers.get("blocks", 0), numbers["channels"], body
    raise ValueError(f"a network must be one of {NETWORK_NAMES}, got {name!r}")


class _Decoder(nn.Module):
    """Layers from features to pixels, resized where no doubling hits the side, and a sigmoid."""

    def __init__(self, layers: list[nn.Module], size: list[int]) -> None:
        super().__init__()
        self.layers, self.size = nn.Sequential(*layers), size

    def forward(self, z: Tensor) -> Tensor:
        x = self.layers(z)
        if list(x.shape[-2:]) != self.size:
            x = F.interpolate(x.float(), self.size, mode="bilinear", antialias=True)  # not defined for bfloat16
        return x.sigmoid()


class ResidualBlock(nn.Module):
    """``shortcut(x) + conv(relu(norm(conv(relu(norm(x))))))``; He et al. 2016.

    Args:
        channels_in: of ``x``.
        channels: of what comes out; where they differ, the shortcut is a 1×1 convolution.
        published: as the published attack's decoder has it: both convolutions with a bias, the shortcut normalized.
    """

    def __init__(self, channels_in: int, channels: int, *, published: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            nn.ReLU(),
            nn.Conv2d(channels_in, channels, 3, padding=1, bias=published),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels:
            narrow = nn.Conv2d(channels_in, channels, 1, bias=False)
            self.shortcut = nn.Sequential(narrow, nn.BatchNorm2d(channels)) if published else narrow

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def _preactivation(channels_in: int, blocks: int, channels: int, doublings: int, colors: int) -> list[nn.Module]:
    """Ours; see :func:`build_network`."""
    double = lambda: [  # noqa: E731
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False),
    ]
    return [
        # Channels that hardly vary must be readable too: features are standardized before anything else.
        nn.BatchNorm2d(channels_in),
        nn.Conv2d(channels_in, channels, 3, padding=1),
        *(ResidualBlock(channels, channels) for _ in range(blocks)),
        *(layer for _ in range(doublings) for layer in double()),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, colors, 3, padding=1),
    ]


def _published(channels_in: int, blocks: int, channels: int, doublings: int, colors: int) -> list[nn.Module]:
    """``res_normN_AE`` of the published code: one block into ``channels``, ``blocks`` more, two that double the side
    (or are plain blocks where no doubling is needed), and one out of them; ReLU behind each but the last."""
    block = lambda a, b: ResidualBlock(a, b, published=True)  # noqa: E731
    layers: list[nn.Module] = [block(channels_in, channels), nn.ReLU()]
    for _ in range(blocks):
        layers += [block(channels, channels), nn.ReLU()]
    for number in range(max(2, doublings)):
        if number < doublings:
            upsample = nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1)
            layers += [upsample, nn.BatchNorm2d(channels), nn.ReLU()]
        else:
            layers += [block(channels, channels), nn.ReLU()]
    return [*layers, block(channels, colors)]


def _halved(length: int) -> int:
    """``length`` halved until it is no more than ``SMALLEST_SIDE``."""
    while length > SMALLEST_SIDE:
        length = math.ceil(length / 2)
    return length


_BODIES: dict[str, Callable[..., list[nn.Module]]] = {
    r"preactN(?P<blocks>\d+)C(?P<channels>\d+)": _preactivation,
    r"deconvC(?P<channels>\d+)": _preactivation,
    r"res_normN(?P<blocks>\d+)C(?P<channels>\d+)": _published,
}
