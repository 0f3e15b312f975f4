import numpy as np
import pytest
import torch
from torch import nn

from fmnlib import InputError
from fmnlib.checkpoint import rounded, rounded_by_autocast
from fmnlib.models import (
    autocast,
    average_weights,
    build,
    load_average,
    mix_probs,
)


@pytest.mark.parametrize(
    ("name", "classes", "millions"), [("resnet18", 100, 11.22), ("resnet20", 10, 0.27)]
)
def test_networks_have_their_published_size(name, classes, millions):
    net = build(name, classes=classes, channels=3, side=32)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


@pytest.mark.parametrize("name", ["convnet", "mlp", "resnet8", "resnet20", "resnet18"])
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32)])
def test_networks_take_any_images(name, channels, side):
    net = build(name, classes=7, channels=channels, side=side)
    assert net(torch.zeros(2, channels, side, side)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet8", "torchvision:swin_t", "torchvision:convnext_tiny"])
def test_checkpoints_in_half_predict_bit_for_bit(name):
    """Tables of positions and layer scales are matrices too, but no pass rounds them."""
    torch.manual_seed(0)
    net, other = (build(name, classes=5, channels=3, side=32).eval() for _ in range(2))
    weights = net.state_dict()
    other.load_state_dict(rounded(weights, rounded_by_autocast(net), torch.bfloat16))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), autocast("bfloat16", torch.device("cpu")):
        assert torch.equal(net(images), other(images))
    assert 0.2 < len(rounded_by_autocast(net)) / len(dict(net.named_parameters())) < 0.5


def test_width_scales_the_channels():
    narrow, wide = (
        build("resnet18", classes=10, channels=3, side=32, width=w) for w in (0.25, 1.0)
    )
    ratio = sum(p.numel() for p in wide.parameters()) / sum(p.numel() for p in narrow.parameters())
    assert 15 < ratio < 16


def test_torchvisions_networks_are_taken_by_name():
    net = build("torchvision:mobilenet_v3_small", classes=7, channels=3, side=64)
    assert net.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "channels", "told"),
    [
        ("resnet81", 3, "model is 'resnet81'; known are convnet"),
        ("torchvision:resnet81", 3, "no network 'resnet81'; did you mean resnet1"),
        ("torchvision:resnet18", 1, "takes images of 3 channels, not 1"),
    ],
)
def test_unknown_networks_are_told_in_one_line(name, channels, told):
    with pytest.raises(InputError, match=told):
        build(name, classes=10, channels=channels, side=32)


def test_the_mean_of_1_2_3_4_is_2_and_a_half():
    states = [({"w": torch.tensor([float(i)])}, 0.25) for i in (1, 2, 3, 4)]
    assert average_weights(states)["w"].item() == 2.5


def test_averaging_leaves_counts_whole_and_equal_networks_as_they_are():
    net = build("convnet", classes=10, channels=1, side=8)
    state = net.state_dict()
    state["1.num_batches_tracked"] += 3
    mean = average_weights([(state, 0.3), (state, 0.7)])
    for key, value in state.items():
        assert mean[key].dtype == value.dtype
        torch.testing.assert_close(mean[key], value)


def test_batchnorm_is_the_mean_over_the_batches():
    net = nn.Sequential(nn.BatchNorm1d(1))
    batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])]
    load_average(net, [(net.state_dict(), 1.0)], batches)
    assert net[0].running_mean.item() == pytest.approx((1 + 6) / 2)
    assert net[0].running_var.item() == pytest.approx((2 + 8) / 2)
    assert net[0].momentum == 0.1
    assert not net.training


def test_mixtures_average_probabilities_and_not_logits():
    images = torch.zeros(1, 1)

    class Fixed(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.tensor([logits])

        def forward(self, x):
            return self.logits

    mixed = mix_probs([(Fixed([0.0, 0.0]), 0.5), (Fixed([0.0, 100.0]), 0.5)], images)
    np.testing.assert_allclose(mixed, [[0.25, 0.75]])
