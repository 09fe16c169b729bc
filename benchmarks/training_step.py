"""One training step of a split model, as ``python -m cem.train`` takes it, under any surrogate and on any device.

VGG-11 with batch normalization, cut after its second pooling, bottleneck ``C8S1``, the ``combined`` gradient injection,
surrogates frozen. ``attention`` is the original, slot and cross attention; ``recommended`` is the default, which has
neither. The batch is random: a step costs the same whatever the images show. The mixture's refit after every
epoch comes on top.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cem import build_surrogate
from cem.models import build_split_model
from cem.surrogates.build import ORIGINAL
from cem.training.capture import CapturedPenalty
from cem.training.injection import combined

CLASSES = 10


def training_step(
    surrogate: str,
    *,
    batch: int,
    image_shape: tuple[int, int, int],
    device: str = "cpu",
    backend: str = "auto",
    captured: bool = False,
) -> Callable[[], Tensor]:
    """One step of a fresh model under the named surrogate; it returns whether the penalty was skipped.

    Args:
        surrogate: ``none``, ``gmm``, ``attention`` or ``recommended``.
        batch: ``B``.
        image_shape: of the images, ``(C, H, W)``.
        device: of everything.
        backend: of the attention operators.
        captured: the surrogate is replayed from a CUDA graph.
    """
    torch.manual_seed(0)
    model = build_split_model(
        "vgg11_bn", num_classes=CLASSES, image_shape=image_shape, cut_layer=4, bottleneck="C8S1", noise_std=0.1
    )
    model = model.to(device).train()
    images = torch.rand(batch, *image_shape, device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    penalty = None
    if surrogate != "none":
        penalty = build_surrogate(
            "gmm" if surrogate == "gmm" else "attention",
            feature_shape=model.feature_shape,
            num_classes=CLASSES,
            noise_std=0.1,
            backend=backend,
            **(ORIGINAL if surrogate == "attention" else {}),
        )
        penalty = penalty.to(device).requires_grad_(False)
    if penalty is not None and penalty.needs_refit:
        with torch.no_grad():
            features = torch.cat([model.encoder(torch.rand_like(images)) for _ in range(4)])
        penalty.refit(features, torch.randint(0, CLASSES, (len(features),), device=device))
    penalize = None
    if captured and penalty is not None:
        penalize = CapturedPenalty(penalty, (batch, *model.feature_shape), torch.device(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        taken = combined(model, penalty, images, labels, 0.1, penalize=penalize)
        optimizer.step()
        return taken.skipped

    return step
