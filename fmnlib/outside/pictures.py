"""A folder of labelled images, `CLASS/*`, as a network was trained to see them."""

import dataclasses
import math
import os
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from fmnlib.config import InputError
from fmnlib.training.sources import read_image

__all__ = ["Pictures", "View", "read_pictures"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """From an image file to a network's input; the defaults are those of ImageNet.

    Attributes:
        size: Side of the centred square that the network sees, in pixels.
        resize: Shorter side before the square is cut, in pixels; 0 takes 256/224 of `size`.
        mean: Mean a channel, of pixels from 0 to 1; one number makes the images grey.
        std: Standard deviation a channel.
    """

    size: int = 224
    resize: int = 0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean) or min(self.std) <= 0:
            given = f"mean is {self.mean} and std is {self.std}"
            raise InputError(f"{given}; give one or three numbers each, std above 0")
        if not all(0 <= m <= 1 for m in self.mean):
            raise InputError(f"mean is {self.mean}; give it for pixels from 0 to 1")
        if self.size < 1 or self.shorter < self.size:
            given = f"size is {self.size} and resize is {self.resize}"
            raise InputError(f"{given}; give 1 or more, and resize 0 or at least size")

    @property
    def shorter(self) -> int:
        """The shorter side of an image before the square is cut out of its middle, in pixels."""
        return self.resize or round(self.size * 256 / 224)

    def normalize(
        self, images: UInt8[Tensor, "n channels side side"]
    ) -> Float[Tensor, "n channels side side"]:
        """What the network is given: float images of about mean 0 and deviation 1."""
        mean, std = (torch.tensor(v, device=images.device) for v in (self.mean, self.std))
        return (images / 255 - mean[:, None, None]) / std[:, None, None]

    def __str__(self) -> str:
        """In words, for people to check."""
        numbers = [" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std)]
        cut = f"shorter side to {self.shorter} pixels, middle {self.size} x {self.size}"
        return f"{cut}, mean {numbers[0]}, std {numbers[1]}"


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images as bytes `[samples, channels, side, side]`, labels, and the names of the classes."""

    images: UInt8[Tensor, "samples channels side side"]
    labels: Int[Tensor, " samples"]
    classes: list[str]


def read_pictures(folder: Path, view: View) -> Pictures:
    """Read `folder/CLASS/*`; classes are numbered in alphabetical order, as torchvision does.

    All of it is held in memory: a byte a pixel and channel, 0.15 MB an image of 224 pixels.

    Raises:
        InputError: If the folder holds no images in folders of classes, they are more than memory
            holds, or a file is damaged.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    colour = v2.RGB() if len(view.mean) == 3 else v2.Grayscale()
    steps = [v2.Resize(view.shorter, antialias=True), v2.CenterCrop(view.size)]
    transform = v2.Compose([colour, v2.PILToTensor(), *steps])
    try:
        files = ImageFolder(str(folder))
    except (OSError, ValueError) as error:  # no folder, no image
        reason = str(error).partition("\n")[0]
        raise InputError(f"{folder} must hold CLASS/ folders of images ({reason})") from error
    images = torch.empty(_shape(folder, len(files), view), dtype=torch.uint8)
    for i, (path, _) in enumerate(tqdm(files.samples, f"reading {folder.name}", unit="image")):
        images[i] = read_image(path, transform)
    return Pictures(images, torch.tensor(files.targets), files.classes)


def _shape(folder: Path, count: int, view: View) -> tuple[int, ...]:
    """The shape of so many images, if they are at most half of the machine's memory."""
    shape = (count, len(view.mean), view.size, view.size)
    known = hasattr(os, "sysconf")  # not on Windows
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else math.inf
    if math.prod(shape) > whole / 2:
        told = f"{count:,} images of {folder} take {math.prod(shape) / 1e9:.0f} GB"
        raise InputError(f"{told}, memory is {whole / 1e9:.0f} GB; give a folder of fewer")
    return shape
