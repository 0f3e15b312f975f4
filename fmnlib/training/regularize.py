"""What the recipes for large images add to a step: mixed images, parameters that do not decay.

The ImageNet recipes of torchvision's references use both; a network on small images needs neither.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["NoDecay", "cutmix_box", "mix", "parameter_groups"]

NoDecay = Literal["none", "norms", "norms_and_biases", "embeddings"]
"""Which parameters weight decay leaves alone."""

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_EMBEDDINGS = ("class_token", "pos_embedding", "relative_position_bias_table")


def mix(
    images: Tensor, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor, float]:
    """Mix every image of a batch with its partner, and say how the labels mix.

    Mixup (Zhang et al., 2018) takes the mean of two images with weights lam and 1 - lam; CutMix
    (Yun et al., 2019) puts a rectangle of the one into the other and lets lam be the share of
    pixels that is left. lam comes from Beta(alpha, alpha). With both on, each batch takes one of
    them at even odds. The loss of a sample is then lam CE(z, y) + (1 - lam) CE(z, y[partner]),
    which equals the cross-entropy with mixed targets.

    What is drawn are numbers of the host: the device is neither asked nor waited for.

    Args:
        images: `[batch, channels, height, width]`; left as they are.
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of CutMix; 0 is off.
        rng: Source of the randomness.

    Returns:
        The mixed images, the index of each image's partner in the batch, and lam.

    >>> rng = np.random.default_rng(0)
    >>> images, partner, lam = mix(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), 1.0, 0.0, rng)
    >>> partner.tolist(), torch.allclose(images.flatten(), torch.tensor([1 - lam, lam]))
    ([1, 0], True)
    """
    # Batches are in random order, so that the neighbour is a random partner.
    partner = torch.arange(len(images), device=images.device).roll(1)
    alphas = [("mixup", mixup), ("cutmix", cutmix)]
    on = [(kind, alpha) for kind, alpha in alphas if alpha > 0]
    if not on:
        return images, partner, 1.0
    kind, alpha = on[rng.integers(len(on))]
    lam = float(rng.beta(alpha, alpha))
    others = images.roll(1, 0)
    if kind == "mixup":
        return torch.lerp(others, images, lam), partner, lam
    height, width = images.shape[-2:]
    rows, columns = cutmix_box(lam, (height, width), rng.uniform(size=2))
    mixed = images.clone()
    mixed[..., rows, columns] = others[..., rows, columns]
    cut = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, partner, 1 - cut / (height * width)


def cutmix_box(
    lam: float, shape: tuple[int, int], place: tuple[float, float] | np.ndarray
) -> tuple[slice, slice]:
    """The rows and columns of the rectangle that CutMix takes from the partner.

    It has the image's proportions and 1 - lam of its pixels, less what lies outside the image.

    Args:
        lam: Share of the image that is to be left, 0 to 1.
        shape: Height and width of the image.
        place: Where its middle lies, as shares of height and width below 1.

    >>> cutmix_box(0.75, (8, 8), (0.5, 0.0))
    (slice(2, 6, None), slice(0, 2, None))
    """
    half = 0.5 * (1 - lam) ** 0.5
    ends = []
    for side, share in zip(shape, place, strict=True):
        middle, reach = int(share * side), int(half * side)
        ends.append(slice(max(middle - reach, 0), min(middle + reach, side)))
    return ends[0], ends[1]


def parameter_groups(
    model: nn.Module, weight_decay: float, no_decay: NoDecay
) -> list[dict[str, list[nn.Parameter] | float]]:
    """The parameters for an optimiser: those that decay, then those that do not, if there are any.

    Args:
        model: The network.
        weight_decay: Of the first group.
        no_decay: norms leaves scale and shift of normalisation layers alone, norms_and_biases
            every bias as well, embeddings the class token and the tables of positions.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    >>> groups = parameter_groups(net, 0.1, "norms")
    >>> [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups]
    [(0.1, [(4, 3, 1, 1), (4,)]), (0.0, [(4,), (4,)])]
    """
    decaying: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            exempt = {
                "none": False,
                "norms": isinstance(module, _NORMS),
                "norms_and_biases": isinstance(module, _NORMS) or name.endswith("bias"),
                "embeddings": name in _EMBEDDINGS,
            }[no_decay]
            (free if exempt else decaying).append(parameter)
    groups = [(decaying, weight_decay), (free, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]
