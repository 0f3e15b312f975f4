"""The runs that are timed, and their data."""

import dataclasses

import numpy as np
import torch

from fmnlib import InputError, RunConfig
from fmnlib import data as datasets
from fmnlib.data import DataSet

__all__ = ["WARM_UP", "Case", "affordable", "cases", "load"]

WARM_UP = 2
"""Epochs that are not timed: kernels are chosen, graphs captured, caches filled."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to time.

    Attributes:
        name: In words.
        config: The run, with as many epochs as are trained to time it.
        length: Epochs of the whole run of its profile.
    """

    name: str
    config: RunConfig
    length: int


def cases(device: torch.device, small: bool = False) -> list[Case]:
    """What is timed on a device; a ResNet-18 only on a GPU."""
    cuda = device.type == "cuda"
    quick = RunConfig(epochs=20)
    part = {} if cuda else {"train_samples": 1000, "eval_samples": 500}
    standard = RunConfig.of_profile("standard", epochs=12 if cuda else 4, **part)
    if small:
        quick = RunConfig(epochs=4, train_samples=200, eval_samples=100)
        standard = dataclasses.replace(standard, train_samples=200, eval_samples=100, epochs=4)
    found = [
        Case("convnet, digits", quick, RunConfig().epochs),
        Case("ResNet-8, Fashion-MNIST", standard, RunConfig.of_profile("standard").epochs),
    ]
    if cuda:
        paper = RunConfig.of_profile("paper")
        timed = dataclasses.replace(paper, epochs=10)
        found.append(Case("ResNet-18, CIFAR-100", timed, paper.epochs))
    return found if cuda or not small else found[:1]


def affordable(device: torch.device, small: bool) -> list[Case]:
    """The cases that are trained many times over: on a CPU the smallest alone."""
    found = cases(device, small)
    return found if device.type == "cuda" else found[:1]


def load(config: RunConfig, device: torch.device) -> tuple[DataSet, str]:
    """The data of a run, or as many random pixels where they are not at hand; and a word of it.

    How long a step takes does not depend on what the images show.
    """
    try:
        return datasets.load(config, device), ""
    except InputError:
        grey = config.dataset == "fashion_mnist"
        shape, classes = ((1, 28, 28), 10) if grey else ((3, 32, 32), 100)
    counts = config.train_samples or 50_000, config.eval_samples or 10_000
    rng = np.random.default_rng(0)
    images, eval_images = (
        torch.from_numpy(rng.integers(0, 256, (count, *shape), dtype=np.uint8)).to(device)
        for count in counts
    )
    labels, eval_labels = (
        torch.from_numpy(rng.integers(0, classes, count)).to(device) for count in counts
    )
    half = torch.full((shape[0],), 0.5, device=device)
    drawn = DataSet(
        images=images,
        labels=labels,
        flipped=torch.zeros_like(labels, dtype=torch.bool),
        eval_images=eval_images,
        eval_labels=eval_labels,
        classes=classes,
        mean=half,
        std=half,
    )
    return drawn, "random pixels"
