import numpy as np
import pytest
import torch
import torchvision.models
from torch import nn
from torch.nn import functional as F

from fmnlib.config import RunConfig
from fmnlib.training.data import load
from fmnlib.training.regularize import cutmix_box, mix, parameter_groups


def batch(count=6, side=8):
    images = load(RunConfig()).images[:count].float()
    assert images.shape[-1] == side
    return images.contiguous(memory_format=torch.channels_last)


def test_mixup_is_the_weighted_mean_of_neighbours():
    images = batch()
    mixed, partner, lam = mix(images, 0.2, 0.0, np.random.default_rng(5))
    assert partner.tolist() == [5, 0, 1, 2, 3, 4]
    assert lam == np.random.default_rng(5).beta(0.2, 0.2)
    for n, m in enumerate(partner.tolist()):
        torch.testing.assert_close(mixed[n], lam * images[n] + (1 - lam) * images[m])
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_cutmix_swaps_one_rectangle_and_lam_is_the_share_that_is_left():
    images = batch()
    for seed in range(20):
        mixed, partner, lam = mix(images, 0.0, 1.0, np.random.default_rng(seed))
        theirs = (mixed == images[partner]).all(0).all(0)
        ours = (mixed == images).all(0).all(0)
        assert (theirs | ours).all()
        rows, columns = (~ours).any(1).nonzero(), (~ours).any(0).nonzero()
        if len(rows):  # a pixel where all agree cannot be told, such as the digits' dark corners
            box = theirs[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.all()
            assert box.numel() <= round((1 - lam) * 64)
        assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_cutmix_of_constant_images_shows_lam_exactly():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 10, 12).clone()
    before = images.clone()
    for seed in range(20):
        mixed, partner, lam = mix(images, 0.0, 1.0, np.random.default_rng(seed))
        left = (mixed == before).float().mean((1, 2, 3))
        np.testing.assert_allclose(left, lam, atol=1e-6)
        taken = mixed != before
        others = before[partner].expand_as(mixed)
        assert torch.equal(mixed[taken], others[taken])
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("lam", "shape", "place", "rows", "columns"),
    [
        (0.75, (8, 8), (0.5, 0.5), (2, 6), (2, 6)),  # half the sides, in the middle
        (0.75, (8, 16), (0.0, 0.99), (0, 2), (11, 16)),  # over two edges
        (1.0, (8, 8), (0.3, 0.3), (2, 2), (2, 2)),  # nothing
        (0.0, (8, 8), (0.5, 0.5), (0, 8), (0, 8)),  # everything
    ],
)
def test_boxes_worked_out_by_hand(lam, shape, place, rows, columns):
    assert cutmix_box(lam, shape, place) == (slice(*rows), slice(*columns))


def test_both_take_turns_and_none_changes_nothing():
    images, rng = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 32, 32), np.random.default_rng(0)
    kinds = [len(mix(images, 0.2, 1.0, rng)[0][1].unique()) for _ in range(300)]
    cut = sum(kind == 2 for kind in kinds)  # a rectangle shows two values; a mean shows one
    assert 105 < cut < 190
    same, partner, lam = mix(images, 0.0, 0.0, rng)
    assert same is images
    assert (partner.tolist(), lam) == ([1, 0], 1.0)


def test_two_cross_entropies_equal_one_with_mixed_targets():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 10, dtype=torch.double), torch.tensor([1, 2, 3, 4, 5, 6])
    _, partner, lam = mix(batch(), 0.2, 0.0, np.random.default_rng(1))
    both = [F.cross_entropy(logits, y, label_smoothing=0.1) for y in (labels, labels[partner])]
    hot = F.one_hot(labels, 10).double()
    targets = lam * hot + (1 - lam) * hot[partner]
    wanted = F.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(lam * both[0] + (1 - lam) * both[1], wanted)


def test_groups_of_a_small_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    conv, norm, _, linear = net
    norms = [norm.weight, norm.bias]

    def free(no_decay):
        groups = parameter_groups(net, 0.1, no_decay)
        assert groups[0]["weight_decay"] == 0.1
        assert sum(len(group["params"]) for group in groups) == 6
        return {id(p) for group in groups[1:] for p in group["params"]}

    assert free("none") == free("embeddings") == set()
    assert free("norms") == {id(p) for p in norms}
    assert free("norms_and_biases") == {id(p) for p in [conv.bias, *norms, linear.bias]}


@pytest.mark.parametrize(
    ("name", "no_decay", "tensors"),
    [
        ("resnet50", "norms", 106),  # 53 BatchNorms
        ("convnext_tiny", "norms", 46),  # 18 blocks, stem, 3 downsamplings, head
        ("vit_b_16", "embeddings", 2),
        ("maxvit_t", "embeddings", 22),  # two attentions in each of 11 layers
    ],
)
def test_groups_of_the_networks_of_the_recipes(name, no_decay, tensors):
    with torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None)
    decaying, free = parameter_groups(net, 0.05, no_decay)
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert len(free["params"]) == tensors
    together = [id(p) for group in (decaying, free) for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in net.parameters())
