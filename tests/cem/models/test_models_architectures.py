"""What holds for every architecture."""

import pytest
import torch
from torch import nn

from cem.models import ARCHITECTURES, build_split_model

PLAIN = [arch for arch in ARCHITECTURES if not arch.endswith("_sgm")]


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def build(arch, image_shape=(3, 32, 32), cut_layer=4, **options):
    torch.manual_seed(0)
    return build_split_model(arch, num_classes=10, image_shape=image_shape, cut_layer=cut_layer, **options)


@pytest.mark.parametrize("arch", PLAIN)
def test_forward_and_backward_reach_everything(arch):
    image_shape = (1, 8, 8) if arch == "vgg13" else (1, 28, 28)
    model = build(arch, image_shape, adapter=1, bottleneck="noRELU_C8S1")
    assert [*model.encoder._modules] == ["normalize", "stages", "adapter", "bottleneck"]
    z = model.encoder(torch.rand(3, *image_shape))
    assert z.shape == (3, *model.feature_shape)
    logits = model.server(model.defense(z))
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("arch", ["vgg11_bn", "vgg11_bn_sgm", "resnet20", "resnet20_sgm", "mobilenetv2_sgm"])
def test_a_sigmoid_bounds_the_features_of_sgm_variants_only(arch):
    model = build(arch, (1, 8, 8), bottleneck="noRELU_C8S1").eval()
    z = model.encoder(torch.rand(8, 1, 8, 8))
    assert bool(z.min() > 0 and z.max() < 1) == model.bounded == arch.endswith("_sgm")


@pytest.mark.parametrize("arch", ["vgg11_bn", "resnet20", "mobilenetv2"])
def test_neither_the_place_of_the_cut_nor_centralizing_changes_the_network(arch):
    x = torch.rand(2, 3, 8, 8)
    early, late = (build(arch, (3, 8, 8), cut_layer=cut_layer).eval() for cut_layer in (1, 4))
    whole = build(arch, (3, 8, 8), centralized=True).eval()
    logits = early(x)
    torch.testing.assert_close(late(x), logits, rtol=0, atol=0)
    torch.testing.assert_close(whole(x), logits, rtol=0, atol=0)
    (linear,) = whole.server.stages  # whose input is what the centralized server gets
    assert isinstance(linear, nn.Linear)
    assert whole.feature_shape == (linear.in_features,)


@pytest.mark.parametrize(
    ("arch", "image_shape", "bottleneck", "feature_shape"),
    [
        ("vgg11", (1, 28, 28), "C8S2", (8, 4, 4)),
        ("vgg13", (3, 32, 32), "none", (128, 16, 16)),
        ("resnet20", (3, 32, 32), "none", (16, 32, 32)),
        ("mobilenetv2", (3, 64, 64), "none", (24, 16, 16)),
        ("convnet32", (1, 28, 28), "none", (128, 4, 4)),
        ("convnet32_pool", (1, 28, 28), "none", (128, 3, 3)),
    ],
)
def test_features_after_four_stages(arch, image_shape, bottleneck, feature_shape):
    assert build(arch, image_shape, bottleneck=bottleneck).feature_shape == feature_shape


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        # Tables of the papers, in millions; MobileNetV2 without the 1000-way classifier.
        ("resnet20", 0.27e6),
        ("resnet32", 0.46e6),
        ("mobilenetv2", 2.24e6),
        ("vgg11", 9.75e6),
    ],
)
def test_number_of_parameters(arch, count):
    model = build(arch)
    assert parameters(model) == pytest.approx(count, rel=0.02)
    if arch.startswith("resnet"):  # the depth counts layers with weights
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) or getattr(m, "kernel_size", 0) == (3, 3)]
        assert arch == f"resnet{len(layers)}"


def test_the_papers_client_has_85_thousand_parameters():
    assert parameters(build("vgg11_bn", bottleneck="C8S1").encoder) == pytest.approx(0.085e6, rel=0.01)


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 32, 32)], ids=str)
def test_vgg_without_batch_norm_carries_the_signal_to_its_end(image_shape):
    model = build("vgg13", image_shape, cut_layer=14).eval()  # everything before the last pooling
    assert 0.1 < model.encoder(torch.randn(8, *image_shape)).square().mean().sqrt() < 1
