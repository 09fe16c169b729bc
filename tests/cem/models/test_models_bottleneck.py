import pytest
import torch
from torch import nn

from cem.errors import UsageError
from cem.models import Bottleneck, SplitModel, parse_bottleneck


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", None),
        ("C16S4", Bottleneck(channels=16, stride=4)),
        ("K5C8S2", Bottleneck(channels=8, stride=2, kernel_size=5)),
        ("noRELU_K5C8S2", Bottleneck(channels=8, stride=2, kernel_size=5, relu=False)),
    ],
)
def test_grammar(text, expected):
    assert parse_bottleneck(text) == expected


@pytest.mark.parametrize(
    ("message", "texts"),
    [
        (
            r"\[noRELU_\]\[Kk\]CcSs",
            ["", "c8s1", "C8", "S1", "C8S1 ", "C8S1_noRELU", "norelu_C8S1", "C-8S1", "C8S1_pruning180", "C٨S1"],
        ),
        ("at least 1", ["C0S1", "C8S0", "K0C8S1"]),
        ("must be odd", ["K4C8S1"]),
    ],
)
def test_anything_else_is_refused(message, texts):
    for text in texts:
        with pytest.raises(UsageError, match=message):
            parse_bottleneck(text)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_server_restores_every_map_size(kernel, stride):
    bottleneck = Bottleneck(channels=2, stride=stride, kernel_size=kernel)
    for height in range(1, 10):
        width = 10 - height
        z = bottleneck.client(3)(torch.randn(2, 3, height, width))
        assert z.shape == (2, 2, -(-height // stride), -(-width // stride))
        assert bottleneck.server(3, height, width)(z).shape == (2, 3, height, width)


def test_relu_ends_both_halves():
    for half in (Bottleneck(3, 1).client(6), Bottleneck(6, 1).server(3, 8, 8)):
        assert half(torch.randn(4, 6, 8, 8)).min() == 0


def test_without_relu_both_halves_are_affine():
    bottleneck = Bottleneck(3, 2, relu=False)
    for half, shape in ((bottleneck.client(6), (6, 8, 8)), (bottleneck.server(6, 8, 8), (3, 4, 4))):
        a, b = torch.randn(2, 1, *shape)
        torch.testing.assert_close(half(a) + half(b), half(a + b) + half(torch.zeros_like(a)))


@pytest.mark.parametrize("text", ["C8S1", "noRELU_C8S1", "C8S2", "noRELU_K5C16S2"])
def test_initial_weights_keep_the_size_of_the_signal(text):
    torch.manual_seed(0)
    bottleneck = parse_bottleneck(text)
    x = torch.randn(16, 64, 16, 16)
    z = bottleneck.client(64)(x)
    for before, after in ((x, z), (z, bottleneck.server(64, 16, 16)(z))):
        assert 0.5 < after.square().mean() / before.square().mean() < 2


@pytest.mark.parametrize("options", [{"bottleneck": "C8S1"}, {"adapter": 1}], ids=str)
def test_flat_features_cannot_have_a_bottleneck_or_an_adapter(options):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    with pytest.raises(UsageError, match=rf"{next(iter(options))} .* needs a map \(C, H, W\) at the cut, got \(4,\)"):
        SplitModel.from_sequential(model, 2, image_shape=(3, 2, 2), **options)
