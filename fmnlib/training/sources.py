"""Images and labels as they lie on disk, as arrays."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from fmnlib import plane
from fmnlib.config import InputError, RunConfig

__all__ = ["Arrays", "data_root", "download", "read", "read_image"]

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Training images uint8 `[samples, channels, side, side]`, labels, evaluation images, labels."""

_TORCHVISION = {
    "mnist": ("MNIST", "mnist"),
    "fashion_mnist": ("FashionMNIST", "fashionmnist"),
    "cifar10": ("CIFAR10", "cifar10"),
    "cifar100": ("CIFAR100", "cifar100"),
}


def data_root() -> Path:
    """Where data sets lie: the folder that the environment variable FMN_DATA names, or data/."""
    return Path(os.environ.get("FMN_DATA", "data"))


def download(dataset: str) -> Path:
    """Fetch one of torchvision's data sets into `data_root()`."""
    name, folder = _torchvision(dataset)
    import torchvision.datasets

    try:
        getattr(torchvision.datasets, name)(data_root() / folder, download=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} cannot be fetched ({reason}); is there a network?") from error
    return data_root() / folder


def read(config: RunConfig) -> Arrays:
    """The whole data set of a run, with the labels that it comes with.

    Raises:
        InputError: If the data set is unknown or not where it should be.
    """
    if config.classes != "all":
        return _half(read(dataclasses.replace(config, classes="all")), config.classes)
    if config.dataset == "digits":
        return _digits()
    if config.dataset == "wave":
        return plane.wave()
    if config.dataset == "animal10n":
        return _animal10n(data_root() / "animal10n", config.image_size)
    if config.dataset.startswith("folder:"):
        return _folder(Path(config.dataset.removeprefix("folder:")), config.image_size)
    return _from_torchvision(config.dataset)


def _half(whole: Arrays, half: str) -> Arrays:
    """The samples of half of the classes, which are counted from 0 again."""
    images, labels, eval_images, eval_labels = whole
    middle = (int(labels.max()) + 1) // 2
    first = 0 if half == "first_half" else middle
    last = middle if half == "first_half" else int(labels.max()) + 1
    wanted, eval_wanted = ((first <= y) & (y < last) for y in (labels, eval_labels))
    parts = images[wanted], labels[wanted] - first
    return *parts, eval_images[eval_wanted], eval_labels[eval_wanted] - first


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))  # the same 1,000 for everybody
    images = np.round(images[order] * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = labels[order].astype(np.int64)
    return images[:1000], labels[:1000], images[1000:], labels[1000:]


def _torchvision(dataset: str) -> tuple[str, str]:
    if dataset not in _TORCHVISION:
        known = ", ".join(
            ["digits", *_TORCHVISION, "animal10n", "wave", "folder:PATH", "stream:PATH"]
        )
        raise InputError(f"dataset is {dataset!r}; known are {known}")
    return _TORCHVISION[dataset]


def _from_torchvision(dataset: str) -> Arrays:
    import torchvision.datasets

    name, folder = _torchvision(dataset)
    root = data_root() / folder
    try:
        parts = [getattr(torchvision.datasets, name)(root, train=train) for train in (True, False)]
    except Exception as error:  # torchvision asserts, unpickles and slices what it reads
        if "not found" in str(error):
            where = f"{name} was not found in {root}"
            raise InputError(f"{where}; run `fmn download {dataset}` or set FMN_DATA") from error
        told = f"{name} in {root} is damaged ({error!r:.90})"
        raise InputError(f"{told}; move it away and run `fmn download {dataset}`") from error
    images = [np.asarray(part.data) for part in parts]
    nchw = [x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) for x in images]
    labels = [np.asarray(part.targets).astype(np.int64) for part in parts]
    return nchw[0], labels[0], nchw[1], labels[1]


def _folder(root: Path, side: int) -> Arrays:
    """Read `train/CLASS/*` and `test/CLASS/*` (or val/), cut to a centred square and resized."""
    from torchvision.datasets import ImageFolder

    evaluation = "test" if (root / "test").is_dir() else "val"
    transform = _square(side)
    try:
        parts = [ImageFolder(root / part, transform) for part in ("train", evaluation)]
    except FileNotFoundError as error:
        lies = f"{root} must hold train/CLASS/ and test/CLASS/ with images"
        raise InputError(f"{lies} ({error})") from error
    if parts[0].classes != parts[1].classes:
        raise InputError(
            f"{root}: the classes of train/ and {evaluation}/ differ; make them equal"
        )
    images = [
        np.stack([read_image(file, transform).numpy() for file, _ in part.samples])
        for part in parts
    ]
    labels = [np.array(part.targets, np.int64) for part in parts]
    return images[0], labels[0], images[1], labels[1]


def _animal10n(root: Path, side: int) -> Arrays:
    """Read the folders that the data set unpacks to; a file's first character is its label.

    The training labels are people's, about 8% of them wrong (Song et al., 2019).
    """
    transform, arrays = _square(side), []
    for part in ("training", "testing"):
        files = sorted((root / part).glob("[0-9]*.*"))
        if not files:
            wanted = "files such as 3_1234.jpg, where 3 is the class"
            raise InputError(f"{root / part} holds no images; put there {wanted}")
        arrays.append(np.stack([read_image(file, transform).numpy() for file in files]))
        arrays.append(np.array([int(file.name[0]) for file in files], np.int64))
    return arrays[0], arrays[1], arrays[2], arrays[3]


def read_image(file: Path | str, transform: Callable[..., Tensor]) -> Tensor:
    """An image file through a transform; one that is damaged is named."""
    from torchvision.datasets.folder import default_loader

    try:
        return transform(default_loader(str(file)))
    except (OSError, ValueError) as error:
        told = f"{file} cannot be read as an image ({error})"
        raise InputError(f"{told}; mend it, or move it away") from error


def _square(side: int) -> Callable[..., Tensor]:
    from torchvision.transforms import v2

    steps = [v2.PILToTensor(), v2.Resize(side, antialias=True), v2.CenterCrop(side)]
    transform: Callable[..., Tensor] = v2.Compose([v2.RGB(), *steps])
    return transform
