import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cem.errors import UsageError
from cem.models import Bottleneck, SplitModel, build_split_model, parse_bottleneck


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", None),
        ("C8S1", Bottleneck(channels=8, stride=1)),
        ("C16S4", Bottleneck(channels=16, stride=4)),
        ("K5C8S2", Bottleneck(channels=8, stride=2, kernel_size=5)),
        ("noRELU_C8S1", Bottleneck(channels=8, stride=1, relu=False)),
        ("noRELU_K5C8S2", Bottleneck(channels=8, stride=2, kernel_size=5, relu=False)),
    ],
)
def test_grammar(text: str, expected: Bottleneck | None) -> None:
    assert parse_bottleneck(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "c8s1", "C8", "S1", "C8S1 ", "C8S1_noRELU", "norelu_C8S1", "C-8S1", "C8S1_pruning180", "C٨S1"],
)
def test_anything_else_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(UsageError, match=r"\[noRELU_\]\[Kk\]CcSs"):
        parse_bottleneck(text)


@pytest.mark.parametrize("text", ["C0S1", "C8S0", "K0C8S1"])
def test_zero_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        parse_bottleneck(text)


def test_even_kernel_is_refused() -> None:
    with pytest.raises(UsageError, match="must be odd"):
        parse_bottleneck("K4C8S1")


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
def test_server_restores_every_map_size(kernel: int, stride: int, height: int, width: int) -> None:
    bottleneck = Bottleneck(channels=2, stride=stride, kernel_size=kernel)
    z = bottleneck.client(3)(torch.randn(2, 3, height, width))
    assert z.shape == (2, 2, -(-height // stride), -(-width // stride))
    assert bottleneck.server(3, height, width)(z).shape == (2, 3, height, width)


def test_relu_ends_both_halves() -> None:
    x = torch.randn(4, 6, 8, 8)
    z = Bottleneck(3, 1).client(6)(x)
    assert z.min() == 0
    assert Bottleneck(3, 1).server(6, 8, 8)(z).min() == 0


def test_without_relu_both_halves_are_affine() -> None:
    bottleneck = Bottleneck(3, 2, relu=False)
    for half, shape in ((bottleneck.client(6), (6, 8, 8)), (bottleneck.server(6, 8, 8), (3, 4, 4))):
        a, b = torch.randn(2, 1, *shape)
        torch.testing.assert_close(half(a) + half(b), half(a + b) + half(torch.zeros_like(a)))


@pytest.mark.parametrize("text", ["C8S1", "noRELU_C8S1", "C8S2", "noRELU_K5C16S2"])
def test_initial_weights_keep_the_size_of_the_signal(text: str) -> None:
    torch.manual_seed(0)
    bottleneck = parse_bottleneck(text)
    assert bottleneck is not None
    x = torch.randn(64, 64, 16, 16)
    z = bottleneck.client(64)(x)
    for before, after in ((x, z), (z, bottleneck.server(64, 16, 16)(z))):
        assert 0.5 < after.square().mean() / before.square().mean() < 2


def test_flat_features_cannot_have_a_bottleneck() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    with pytest.raises(UsageError, match=r"needs a map \(C, H, W\) at the cut, got \(4,\)"):
        SplitModel.from_sequential(model, 2, image_shape=(3, 2, 2), bottleneck="C8S1")


@pytest.mark.parametrize(("bottleneck", "shape"), [("C8S1", (8, 7, 7)), ("C8S2", (8, 4, 4))])
def test_odd_maps_pass_through_a_whole_model(bottleneck: str, shape: tuple[int, ...]) -> None:
    model = build_split_model("vgg11", num_classes=10, image_shape=(1, 28, 28), cut_layer=4, bottleneck=bottleneck)
    assert model.feature_shape == shape
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
