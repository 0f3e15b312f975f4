"""The data set of a run: its samples chosen, its labels made noisy, its tensors on a device."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmnlib import noise
from fmnlib.config import InputError, RunConfig
from fmnlib.training.dataset import Data, DataSet
from fmnlib.training.sources import data_root, read
from fmnlib.training.streamed import StreamedSet, open_folder

__all__ = ["confused_with", "in_memory", "load"]

# For each of the 100 classes of CIFAR-100, in torchvision's order, its superclass.
_SUPERCLASS = (
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 "
    "11 5 5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 "
    "16 12 9 13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"
)
_CONFUSABLE = {
    "digits": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
    "mnist": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
    "fashion_mnist": {2: 6, 3: 4, 4: 3, 7: 5, 9: 7},
    "cifar10": {2: 0, 3: 5, 4: 7, 5: 3, 9: 1},
}


def load(config: RunConfig, device: str | torch.device = "cpu") -> Data:
    """The data set of a run, its labels made noisy, its images on a device or in their files.

    Raises:
        InputError: If the data set is unknown or not where it should be.
    """
    if config.dataset.startswith("stream:"):
        return _stream(config, torch.device(device))
    return in_memory(config, device)


def in_memory(config: RunConfig, device: str | torch.device = "cpu") -> DataSet:
    """The data set of a run that is not streamed.

    Raises:
        InputError: If it is streamed, unknown, or not where it should be.
    """
    images, labels, eval_images, eval_labels = read(config)
    classes = int(labels.max()) + 1
    chosen = _subset(len(labels), config.train_samples, config.noise_seed)
    if config.evaluate == "heldout":  # their labels are noisy too: noise is drawn over all
        noisy, flipped = _add_noise(config, labels, np.arange(len(labels)), classes)
        rest = np.setdiff1d(np.arange(len(labels)), chosen)
        if not len(rest):
            raise InputError("no training image is held out; set train_samples to fewer than all")
        eval_images, eval_labels = images[rest], noisy[rest]
        noisy, flipped = noisy[chosen], flipped[chosen]
    else:
        noisy, flipped = _add_noise(config, labels, chosen, classes)
    eval_chosen = _subset(len(eval_labels), config.eval_samples, config.noise_seed)
    images, eval_images = images[chosen], eval_images[eval_chosen]
    mean, std = _pixel_statistics(images)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return DataSet(
        images=tensor(images),
        labels=tensor(noisy),
        flipped=tensor(flipped),
        eval_images=tensor(eval_images),
        eval_labels=tensor(eval_labels[eval_chosen]),
        classes=classes,
        mean=tensor(mean),
        std=tensor(std),
    )


def _stream(config: RunConfig, device: torch.device) -> StreamedSet:
    """Labels are made noisy and samples chosen as for images in memory."""
    if config.evaluate != "test" or config.classes != "all":
        raise InputError("streamed images are evaluated on their own folder, with all classes")
    whole = open_folder(
        Path(config.dataset.removeprefix("stream:")),
        device,
        size=config.image_size,
        eval_size=config.eval_size,
        eval_resize=config.eval_resize,
        interpolation=config.interpolation,
        erase=config.erase,
    )
    labels = whole.labels.cpu().numpy()
    chosen = _subset(len(labels), config.train_samples, config.noise_seed)
    evaluated = _subset(len(whole.eval_labels), config.eval_samples, config.noise_seed)
    noisy, flipped = _add_noise(config, labels, chosen, whole.classes)
    return dataclasses.replace(
        whole.subset(chosen, evaluated),
        labels=torch.from_numpy(noisy).to(device),
        flipped=torch.from_numpy(flipped).to(device),
    )


def confused_with(dataset: str, classes: int) -> dict[int, int]:
    """The class that each mistaken class is mistaken for, for asymmetric noise.

    CIFAR-100 takes the next class inside the superclass, the digits, Fashion-MNIST and CIFAR-10
    their usual confusable pairs, other data the next class.

    >>> confused_with("digits", 10)
    {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}
    """
    if dataset == "cifar100":
        superclass = _SUPERCLASS.split()
        members = [[c for c in range(100) if superclass[c] == str(s)] for s in range(20)]
        return {c: five[(i + 1) % 5] for five in members for i, c in enumerate(five)}
    return _CONFUSABLE.get(dataset, {c: (c + 1) % classes for c in range(classes)})


def _add_noise(
    config: RunConfig, every_label: np.ndarray, chosen: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The labels of the chosen samples, made noisy, and which of them are flipped."""
    kind, _, file = config.noise.partition(":")
    labels, rate, seed = every_label[chosen], config.noise_rate, config.noise_seed
    if kind == "symmetric":
        return noise.symmetric(labels, classes, rate, seed)
    if kind == "asymmetric":
        whole = config.dataset if config.classes == "all" else ""
        return noise.asymmetric(labels, confused_with(whole, classes), rate, seed)
    if kind == "matrix":
        return noise.transition(labels, _read_matrix(Path(file), classes), seed)
    if kind == "human":
        path = data_root() / "cifar100n" / "cifar100n_human.npz"
        if config.dataset != "cifar100" or not path.exists():
            raise InputError(f"human noise is of cifar100 and lies in {path}; put it there")
        with np.load(path, allow_pickle=False) as stored:
            noisy, flipped = noise.human(every_label, stored["clean_label"], stored["noisy_label"])
        return noisy[chosen], flipped[chosen]
    return labels, np.zeros(len(labels), bool)


def _read_matrix(path: Path, classes: int) -> np.ndarray:
    try:
        matrix = np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"noise matrix {path}: {error}; give rows of numbers as CSV") from error
    if matrix.shape != (classes, classes):
        told = f"noise matrix {path} is {' x '.join(map(str, matrix.shape))}"
        raise InputError(f"{told}; give {classes} x {classes}, a row for each true class")
    return matrix


def _pixel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation per channel, in units of 255, from exact counts of the 256 values."""
    channels = images.transpose(1, 0, 2, 3)
    share = np.array([np.bincount(c.ravel(), minlength=256) / c.size for c in channels])
    value = np.arange(256) / 255
    mean = share @ value
    std = np.sqrt(np.maximum(share @ value**2 - mean**2, 1e-6))
    return mean.astype(np.float32), std.astype(np.float32)


def _subset(available: int, wanted: int, seed: int) -> np.ndarray:
    if wanted > available:
        raise InputError(
            f"{wanted} samples are wanted of {available}; ask for fewer, or 0 for all"
        )
    if wanted == 0:
        return np.arange(available)
    return np.sort(np.random.default_rng(seed).permutation(available)[:wanted])
