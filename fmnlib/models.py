"""Networks by name, and averages of their weights."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from fmnlib.config import InputError

State = Mapping[str, Tensor]


def build(name: str, *, classes: int, channels: int, side: int, width: float = 1.0) -> nn.Module:
    """A network by name, with fresh weights from torch's global random state.

    Names and `width` are as in `RunConfig`; images have this number of channels, and `side` pixels
    in height and width.

    >>> net = build("convnet", classes=10, channels=1, side=8)
    >>> net(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    kind, _, torchvision_name = name.partition(":")
    if kind == "torchvision":
        return _from_torchvision(torchvision_name, classes, channels, side)
    if name == "convnet":
        return _convnet(channels, classes, max(1, round(16 * width)))
    if name == "mlp":
        hidden = max(1, round(256 * width))
        layers = [nn.Linear(channels * side**2, hidden), nn.ReLU(), nn.Linear(hidden, hidden)]
        return nn.Sequential(nn.Flatten(), *layers, nn.ReLU(), nn.Linear(hidden, classes))
    stages = {"resnet8": (16, [1] * 3), "resnet20": (16, [3] * 3), "resnet18": (64, [2] * 4)}
    if name not in stages:
        known = ", ".join(["convnet", "mlp", *stages, "torchvision:NAME"])
        raise InputError(f"model is {name!r}; known are {known}")
    first, blocks = stages[name]
    return _resnet(channels, classes, max(1, round(first * width)), blocks)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context for a device; precision is as in `RunConfig`."""
    dtype = number_format(precision, device)
    half = dtype != torch.float32
    # No cache: each weight is cast once per pass, and a graph must not refer to a freed cache.
    return torch.autocast(device.type, dtype if half else None, half, cache_enabled=False)


def number_format(precision: str, device: torch.device) -> torch.dtype:
    """The requested format; auto avoids bfloat16 on GPUs before 8.0, which emulate it."""
    if precision != "auto":
        return getattr(torch, precision)
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32


def average_weights(members: Iterable[tuple[State, float]]) -> dict[str, Tensor]:
    """The weighted mean of state dictionaries (weights of sum 1): "Averaged KF", SWA.

    Sums run in float64, one member in memory at a time. An integer, such as the count of batches
    that a BatchNorm has seen, has no mean and is the last member's.

    >>> states = [({"w": torch.tensor([float(i)])}, 0.25) for i in (1, 2, 3, 4)]
    >>> average_weights(states)["w"].item()
    2.5
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for state, weight in members:
        for key, value in state.items():
            dtypes[key] = value.dtype
            if not value.is_floating_point():
                total[key] = value
            elif key in total:
                total[key] += weight * value.double()
            else:
                total[key] = weight * value.double()
    return {key: value.to(dtypes[key]) for key, value in total.items()}


def load_average(
    model: nn.Module, members: Iterable[tuple[State, float]], batches: Iterable[Tensor]
) -> nn.Module:
    """Load the mean of `average_weights` into a model, and set it to evaluation mode.

    BatchNorm's statistics, if there are any, are estimated again, on batches of training images:
    those of averaged weights are not the average of the statistics.
    """
    model.load_state_dict(average_weights(members))
    update_bn(batches, model)
    return model.eval()


@torch.no_grad()
def mix_probs(members: Iterable[tuple[Callable[[Any], Tensor], float]], images: Any) -> Tensor:
    """The weighted sum of the networks' class probabilities `[batch, classes]`.

    >>> mix_probs([(nn.Identity(), 1.0)], torch.zeros(1, 2)).tolist()
    [[0.5, 0.5]]
    """
    mixed = [weight * model(images).float().softmax(1) for model, weight in members]
    return torch.stack(mixed).sum(0)


def _convnet(channels: int, classes: int, width: int) -> nn.Module:
    """Three convolutions of stride 1, 2, 2, made for 8 x 8 images; larger ones work as well."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(channels, width, 1), *block(width, 2 * width, 2)]
    layers += block(2 * width, 2 * width, 2)
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, classes)]
    return nn.Sequential(*layers, *head)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def _resnet(channels: int, classes: int, width: int, blocks: list[int]) -> nn.Module:
    """A residual network for small images: 3x3 stem of stride 1, no pooling before the blocks."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    inputs = width
    for stage, count in enumerate(blocks):
        outputs = width * 2**stage
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(_BasicBlock(inputs, outputs, stride))
            inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers, *head)


def _from_torchvision(name: str, classes: int, channels: int, side: int) -> nn.Module:
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1) or ["resnet18"]
        raise InputError(f"torchvision has no network {name!r}; did you mean {near[0]}?")
    if channels != 3:
        raise InputError(
            f"{name} takes images of 3 channels, not {channels}; choose another model"
        )
    sized: dict[str, Any] = {}
    if name.startswith("vit_"):
        sized = {"image_size": side}
    elif name.startswith("maxvit_"):
        sized = {"input_size": (side, side)}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **sized)
