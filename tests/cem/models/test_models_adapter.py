"""What the client computes more than its share of the network, and what all of it costs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cem.models import SplitModel, build_adapter, client_budget


def test_a_block_adds_what_its_convolution_finds_to_what_it_gets():
    torch.manual_seed(0)
    adapter = build_adapter(2, 3).double()
    expected = x = torch.randn(4, 3, 5, 7, dtype=torch.double)
    for block in adapter:
        found = F.conv2d(expected, block.convolution.weight, padding=1)
        std, mean = torch.std_mean(found, dim=(0, 2, 3), correction=0, keepdim=True)
        expected = expected + ((found - mean) / (std**2 + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(adapter(x), expected)


@pytest.mark.parametrize(
    ("adapter", "bottleneck", "parameters", "multiply_adds", "sent_bytes"),
    [
        # Of 3 channels to 4, 3x3 at 6x6; two more of 4 to 4 without bias, with two numbers a channel; 4 to 2 at 3x3.
        (0, "none", 108 + 4, 108 * 36, 4 * 4 * 36),
        (2, "none", 112 + 2 * (144 + 8), (108 + 2 * 144) * 36, 4 * 4 * 36),
        (2, "C2S2", 112 + 2 * (144 + 8) + 74, (108 + 2 * 144) * 36 + 72 * 9, 4 * 2 * 9),
    ],
)
def test_a_client_pays_for_its_layers_its_adapter_and_its_half_of_the_bottleneck(
    adapter, bottleneck, parameters, multiply_adds, sent_bytes
):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(144, 5))
    own = {"adapter": adapter, "bottleneck": bottleneck}
    model = SplitModel.from_sequential(network, 1, image_shape=(3, 6, 6), **own)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    costs = {"client_parameters": parameters, "client_multiply_adds": multiply_adds, "sent_bytes": sent_bytes}
    assert client_budget(model, (3, 6, 6)) == costs
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
