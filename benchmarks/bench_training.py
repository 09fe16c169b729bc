"""One training step of a split model: what each surrogate adds to it.

VGG-11 with batch normalisation, cut after its second pooling, bottleneck ``C8S1``, 28×28 grey images, batch 128, the
``combined`` gradient injection, surrogates frozen, as ``python -m cem.train`` trains them. The batch is random: a step
costs the same whatever the images show. The mixture's refit after every epoch comes on top.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.interleaved import times_slower
from cem import build_surrogate
from cem.models import build_split_model
from cem.training.injection import combined

BATCH, CLASSES = 128, 10


def training_step(surrogate: str) -> Callable[[], None]:
    """One step of a fresh model under the named surrogate."""
    torch.manual_seed(0)
    model = build_split_model(
        "vgg11_bn", num_classes=CLASSES, image_shape=(1, 28, 28), cut_layer=4, bottleneck="C8S1", noise_std=0.1
    ).train()
    penalty = None
    if surrogate != "none":
        penalty = build_surrogate(
            surrogate, feature_shape=model.feature_shape, num_classes=CLASSES, noise_std=0.1, var_threshold=0.1
        ).requires_grad_(False)
    images, labels = torch.rand(BATCH, 1, 28, 28), torch.randint(0, CLASSES, (BATCH,))
    if penalty is not None and penalty.needs_refit:
        with torch.no_grad():
            features = torch.cat([model.encoder(torch.rand(BATCH, 1, 28, 28)) for _ in range(4)])
        penalty.refit(features, torch.randint(0, CLASSES, (len(features),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        taken = combined(model, penalty, images, labels, 0.1)
        optimizer.step()
        assert not taken.skipped

    return step


@pytest.mark.parametrize("surrogate", ["none", "attention", "gmm"])
def test_training_step_of_vgg11(benchmark, surrogate):
    step = training_step(surrogate)
    benchmark.group = "training step vgg11_bn C8S1 B128"
    benchmark.pedantic(step, rounds=15, warmup_rounds=2)
    if benchmark.enabled and surrogate != "none":
        benchmark.extra_info["times_slower_than_none"] = times_slower(step, training_step("none"), 2, rounds=11)
