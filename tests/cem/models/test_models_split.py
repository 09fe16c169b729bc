import copy

import pytest
import torch
from torch import nn

from cem.defenses import GaussianNoise
from cem.errors import UsageError
from cem.models import Normalize, SplitModel, build_split_model, split_sequential


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4 * 5 * 5, 7),
    )


@pytest.mark.parametrize("cut_layer", [1, 3, 4, 5])
def test_cutting_leaves_the_composition_unchanged(cut_layer):
    model = small_network().eval()
    x = torch.rand(2, 3, 5, 5)
    split = SplitModel.from_sequential(model, cut_layer, image_shape=(3, 5, 5))
    assert torch.equal(split(x), model(x))


def test_stages_keep_their_names_and_are_not_copied():
    model = small_network()
    encoder, server = split_sequential(model, 2)
    assert list(encoder.state_dict()) + list(server.state_dict()) == list(model.state_dict())
    assert encoder[0] is model[0]
    assert server[-1] is model[-1]


def test_a_module_used_twice_stays_twice():
    _, server = split_sequential(nn.Sequential(*[nn.Linear(2, 2), nn.ReLU()] * 2), 1)
    assert len(server) == 3


@pytest.mark.parametrize("cut_layer", [-1, 0, 6])
def test_a_cut_that_leaves_a_side_empty_is_refused(cut_layer):
    with pytest.raises(UsageError, match=rf"must be in 1\.\.5 \(stages: 1 0, 2 1, .*\), got {cut_layer}"):
        split_sequential(small_network(), cut_layer)


def test_only_sequences_can_be_cut():
    with pytest.raises(TypeError, match=r"nn\.Sequential .* got Linear"):
        split_sequential(nn.Linear(2, 2), 1)


def test_the_server_sees_noisy_features_in_evaluation_too():
    split = SplitModel.from_sequential(small_network(), 3, image_shape=(3, 5, 5), defense=GaussianNoise(0.5)).eval()
    x = torch.rand(2, 3, 5, 5)
    assert torch.equal(split.encoder(x), split.encoder(x))
    assert not torch.equal(split(x), split(x))


@pytest.mark.parametrize("bottleneck", ["none", "C2S1"])
@pytest.mark.parametrize("end", [nn.Sigmoid(), nn.Sequential(nn.BatchNorm2d(4), nn.Sigmoid()), nn.ReLU()], ids=str)
def test_features_are_bounded_where_a_sigmoid_is_the_last_that_happens_to_them(end, bottleneck):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), end, nn.Flatten(), nn.Linear(36, 2))
    split = SplitModel.from_sequential(model, 2, image_shape=(3, 5, 5), bottleneck=bottleneck)
    assert split.bounded == (bottleneck == "none" and not isinstance(end, nn.ReLU))


def test_building_leaves_no_trace():
    model = small_network()
    model[1].eval()  # a user's frozen batch normalization must stay frozen
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    SplitModel.from_sequential(model, 3, image_shape=(3, 5, 5))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True, True]


def test_double_precision_networks_can_be_cut():
    split = SplitModel.from_sequential(small_network().double(), 3, image_shape=(3, 5, 5), bottleneck="C2S2")
    assert split.feature_shape == (2, 3, 3)


def test_a_server_that_overwrites_the_features_is_refused():
    with pytest.raises(UsageError, match="overwrites the features"):
        SplitModel.from_sequential(small_network(), 2, image_shape=(3, 5, 5))


def test_the_encoder_begins_with_normalization_of_each_channel_and_the_checkpoint_holds_it():
    mean, std, x = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7], torch.rand(2, 3, 8, 8)
    model = build_split_model("resnet20", num_classes=2, image_shape=(3, 8, 8), cut_layer=1, mean=mean, std=std)
    assert isinstance(model.encoder[0], Normalize)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(model.encoder[0](x), expected)
    torch.testing.assert_close(model.state_dict()["encoder.normalize.mean"].flatten(), torch.tensor(mean))


@pytest.mark.parametrize(
    "options",
    [
        {"mean": [0.1, 0.2], "std": [1.0, 1.0]},
        {"mean": [0.1], "std": [1.0, 1.0]},
        {"std": [0.0]},
        {"image_shape": (32, 32)},
        {"image_shape": (3, 0, 32)},
        {"num_classes": 0},
        {"centralized": True, "bottleneck": "C8S1"},
        {"centralized": True, "adapter": 1},
        {"adapter": -1},
        {"bottleneck": "narrow"},
        {"cut_layer": 11},
    ],
    ids=str,
)
def test_unusable_arguments_are_refused(options):
    with pytest.raises(UsageError):
        build_split_model("resnet20", **{"num_classes": 10, "image_shape": (3, 8, 8), "cut_layer": 4, **options})
