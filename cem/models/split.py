"""Cut a network into the client's encoder and the server's rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cem.defenses.base import Defense
from cem.errors import UsageError
from cem.models.adapter import build_adapter
from cem.models.bottleneck import parse_bottleneck
from cem.models.convnet import convnet
from cem.models.mobilenet import mobilenet_v2
from cem.models.resnet import resnet
from cem.models.vgg import vgg
from cem_kernels.validation import check_sample_shape, check_sizes

ImageShape = tuple[int, int, int]

_BUILDERS: dict[str, Callable[..., nn.Sequential]] = {
    "vgg11": partial(vgg, 11, batch_norm=False),
    "vgg11_bn": partial(vgg, 11, batch_norm=True),
    "vgg13": partial(vgg, 13, batch_norm=False),
    "vgg13_bn": partial(vgg, 13, batch_norm=True),
    "resnet20": partial(resnet, 20),
    "resnet32": partial(resnet, 32),
    "mobilenetv2": mobilenet_v2,
    "convnet32": partial(convnet, 32, False),
    "convnet64": partial(convnet, 64, False),
    "convnet32_pool": partial(convnet, 32, True),
    "convnet64_pool": partial(convnet, 64, True),
}
_SIGMOID = "_sgm"

#: Names that :func:`build_split_model` takes; with ``_sgm`` the encoder ends in a sigmoid.
ARCHITECTURES: tuple[str, ...] = tuple(name + end for name in _BUILDERS for end in ("", _SIGMOID))


class SplitModel(nn.Module):
    """``server(defense(encoder(x)))``: the client's part, what happens on the way, the server's part.

    Args:
        encoder: images ``[B, *image_shape]`` -> features ``z [B, *feature_shape]``.
        server: features -> logits ``[B, num_classes]``.
        image_shape: ``(C, H, W)`` of one image.
        defense: features -> features of the same shape, such as a :class:`cem.Defense`; by default nothing is done.

    Attributes:
        feature_shape: shape of one sample's features, without the batch dimension.
        bounded: whether every feature lies in [0, 1], because the encoder ends in a sigmoid.

    Raises:
        UsageError: the server overwrites its input, and with it the features that the losses look at.
        ValueError: ``image_shape`` is no such shape.
    """

    def __init__(
        self, encoder: nn.Sequential, server: nn.Sequential, *, image_shape: ImageShape, defense: Defense | None = None
    ) -> None:
        super().__init__()
        check_sample_shape("image_shape", image_shape, ("CHW",))
        self.encoder = encoder
        self.defense = Defense() if defense is None else defense
        self.server = server

        z = dry_run(encoder, blank_image(encoder, image_shape))
        self.feature_shape: tuple[int, ...] = tuple(z.shape[1:])
        last: nn.Module = encoder
        while isinstance(last, nn.Sequential) and len(last) > 0:
            last = last[-1]
        self.bounded = isinstance(last, nn.Sigmoid)
        version = z._version
        dry_run(server, z)
        if z._version != version:
            raise UsageError(
                "the server overwrites the features: it begins with an operation in place, such as "
                "nn.ReLU(inplace=True); set inplace=False there, or move the cut behind it"
            )

    @classmethod
    def from_sequential(
        cls,
        model: nn.Sequential,
        cut_layer: int,
        *,
        image_shape: ImageShape,
        adapter: int = 0,
        bottleneck: str = "none",
        defense: Defense | None = None,
    ) -> SplitModel:
        """Cut any network that is a sequence of stages; the stages are shared with ``model``, not copied.

        Args:
            model: the whole network, images to logits.
            cut_layer: how many stages the client computes, see :func:`split_sequential`.
            image_shape: ``(C, H, W)`` of one image.
            adapter: residual convolutions that the client has behind the cut, see :func:`cem.models.build_adapter`.
            bottleneck: see :func:`cem.models.parse_bottleneck`.
            defense: see :class:`SplitModel`.

        Raises:
            UsageError: ``cut_layer``, ``adapter`` or ``bottleneck`` cannot be used.
        """
        encoder, server = _extended(*split_sequential(model, cut_layer), adapter, bottleneck, image_shape)
        return cls(encoder, server, image_shape=image_shape, defense=defense)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]``, floating -> logits ``[B, num_classes]``."""
        return self.server(self.defense(self.encoder(x)))


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, for images ``[B, C, H, W]``.

    torchvision's ``v2.Normalize`` copies both constants from host to device in every call, which makes the
    host wait and cannot be captured in a CUDA graph. Here they are buffers, and part of a checkpoint.

    Args:
        mean, std: one value per channel, or one for all channels.

    Raises:
        UsageError: the two differ in length, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise UsageError(f"expected as many mean values as positive std values, got {mean=} and {std=}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def split_sequential(model: nn.Sequential, cut_layer: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut ``model`` after its first ``cut_layer`` stages into ``(encoder, server)``; stages keep their names.

    Raises:
        TypeError: ``model`` is no ``nn.Sequential``.
        UsageError: ``cut_layer`` leaves one side without a stage.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"only an nn.Sequential of stages can be cut, got {type(model).__name__}")
    stages = list(model._modules.items())  # named_children would drop a module that occurs twice
    if not 1 <= cut_layer < len(stages):
        listing = ", ".join(f"{number} {name}" for number, (name, _) in enumerate(stages, start=1))
        raise UsageError(f"cut_layer must be in 1..{len(stages) - 1} (stages: {listing}), got {cut_layer}")
    return nn.Sequential(OrderedDict(stages[:cut_layer])), nn.Sequential(OrderedDict(stages[cut_layer:]))


def build_split_model(
    arch: str,
    *,
    num_classes: int,
    image_shape: ImageShape,
    cut_layer: int,
    adapter: int = 0,
    bottleneck: str = "none",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    centralized: bool = False,
) -> SplitModel:
    """Build one of :data:`ARCHITECTURES` and cut it.

    Args:
        arch: a name from :data:`ARCHITECTURES`.
        num_classes: width of the logits.
        image_shape: ``(C, H, W)`` of one image.
        cut_layer: how many stages the client computes. The stages are named in each architecture's builder.
        adapter: residual convolutions that the client has behind the cut, see :func:`cem.models.build_adapter`.
        bottleneck: narrow layer behind both, see :func:`cem.models.parse_bottleneck`.
        mean, std: the encoder, which takes images in [0, 1], begins with ``(x - mean) / std`` per channel.
        centralized: the network is not meant to be split: the encoder is all but the final linear layer, the
            features are that layer's input ``[B, D]``, and ``cut_layer`` is not used.

    Raises:
        UsageError: an argument cannot be used (the message says what it takes), or ``centralized`` comes with an
            adapter or a bottleneck.
    """
    if arch not in ARCHITECTURES:
        raise UsageError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    try:
        check_sample_shape("image_shape", image_shape, ("CHW",))
        check_sizes(num_classes=num_classes)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if centralized and (adapter or bottleneck != "none"):
        raise UsageError(f"a centralized model has no cut for {adapter=} and {bottleneck=}")
    if len(mean) not in (1, image_shape[0]):
        raise UsageError(f"mean and std need 1 or C values each, got {len(mean)} for {image_shape=}")

    model = _BUILDERS[arch.removesuffix(_SIGMOID)](num_classes=num_classes, image_shape=image_shape)
    if centralized:
        *stages, head = model
        assert isinstance(head, nn.Sequential)
        model = nn.Sequential(*stages, *head)
        cut_layer = len(model) - 1

    encoder, server = _extended(*split_sequential(model, cut_layer), adapter, bottleneck, image_shape)
    encoder = nn.Sequential(OrderedDict(normalize=Normalize(mean, std), **encoder._modules))
    if arch.endswith(_SIGMOID):
        encoder.add_module("sigmoid", nn.Sigmoid())
    return SplitModel(encoder, server, image_shape=image_shape)


def _extended(
    encoder: nn.Sequential, server: nn.Sequential, adapter: int, bottleneck: str, image_shape: ImageShape
) -> tuple[nn.Sequential, nn.Sequential]:
    """Put adapter and the client's half of the bottleneck behind the encoder, the server's half before the server."""
    narrow = parse_bottleneck(bottleneck)
    client: dict[str, nn.Module] = {"stages": encoder}
    rest: dict[str, nn.Module] = {"stages": server}
    if adapter or narrow is not None:
        z = dry_run(encoder, blank_image(encoder, image_shape))
        if z.ndim != 4:
            named = f"adapter {adapter}" if adapter else f"bottleneck {bottleneck!r}"
            raise UsageError(f"{named} needs a map (C, H, W) at the cut, got {tuple(z.shape[1:])}")
        _, channels, height, width = z.shape
        if adapter:
            client["adapter"] = build_adapter(adapter, channels).to(z)
        if narrow is not None:
            client["bottleneck"] = narrow.client(channels).to(z)
            rest = {"bottleneck": narrow.server(channels, height, width).to(z), **rest}
    return nn.Sequential(OrderedDict(client)), nn.Sequential(OrderedDict(rest))


def blank_image(module: nn.Module, image_shape: ImageShape) -> Tensor:
    """A batch of one black image, with the device and dtype of the module's parameters."""
    like = next(module.parameters(), torch.empty(0))
    return torch.zeros(1, *image_shape, dtype=like.dtype, device=like.device)


@torch.no_grad()
def dry_run(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` without a trace: evaluation mode for the time of the call, random state put back."""
    training = {part: part.training for part in module.modules()}
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        try:
            return module.eval()(x)
        finally:
            for part, mode in training.items():
                part.training = mode
