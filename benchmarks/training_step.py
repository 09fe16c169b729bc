"""One training step of a split model, as ``python -m cem.train`` takes it, under any surrogate and on any device.

VGG-11 with batch normalization, cut after its second pooling, bottleneck ``C8S1``, the ``combined`` gradient injection,
surrogates frozen. ``attention`` is the original, slot and cross attention; ``slots`` is the default, ``centroid`` the
same with one slot a class. The batch is random: a step costs the same whatever the images show. The mixture's refit
after every epoch comes on top.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cem import SURROGATES, Context, GaussianNoise
from cem.models import build_split_model
from cem.training.capture import CapturedTerm
from cem.training.injection import combined
from cem.training.weighted import WeightedTerm

CLASSES, NOISE_STD, WEIGHT = 10, 0.1, 0.1


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
        surrogate: ``none`` or that of a surrogate.
        batch: ``B``.
        image_shape: of the images, ``(C, H, W)``.
        device: of everything.
        backend: of the surrogate's operators.
        captured: the surrogate is replayed from a CUDA graph.
    """
    torch.manual_seed(0)
    model = build_split_model("vgg11_bn", num_classes=CLASSES, image_shape=image_shape, cut_layer=4, bottleneck="C8S1")
    model.defense = GaussianNoise(NOISE_STD)
    model = model.to(device).train()
    images = torch.rand(batch, *image_shape, device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    terms: list[WeightedTerm] = []
    if surrogate != "none":
        context = Context(model.feature_shape, image_shape, CLASSES, NOISE_STD, backend=backend)
        term = SURROGATES.build(surrogate, context).to(device)
        if term.needs_epoch_features:
            with torch.no_grad():
                features = torch.cat([model.encoder(torch.rand_like(images)) for _ in range(4)])
            term.after_epoch(features, torch.randint(0, CLASSES, (len(features),), device=device))
        weighted = WeightedTerm("surrogate", surrogate, term, lambda epoch: WEIGHT, 0, torch.device(device))
        weighted.before_epoch(0, 1)
        if captured:
            shapes = (batch, *model.feature_shape), (batch, *image_shape)
            weighted.answer = CapturedTerm(term, *shapes, torch.device(device))
        terms.append(weighted)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        taken = combined(model, terms, images, labels)
        optimizer.step()
        answer = taken.answers.get("surrogate")
        return torch.tensor(False) if answer is None else ~answer.finite

    return step
