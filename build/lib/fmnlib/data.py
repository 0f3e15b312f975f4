"""A data set as tensors on a device, its noisy labels, and batched augmentation.

Images stay uint8 and on the device; a batch is gathered, shifted, mirrored and normalised there.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmnlib import noise, plane
from fmnlib.config import InputError, RunConfig

__all__ = ["DataSet", "confused_with", "data_root", "download", "load"]

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

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
_TORCHVISION = {
    "mnist": ("MNIST", "mnist"),
    "fashion_mnist": ("FashionMNIST", "fashionmnist"),
    "cifar10": ("CIFAR10", "cifar10"),
    "cifar100": ("CIFAR100", "cifar100"),
}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Training and evaluation data on one device.

    Attributes:
        images: Training images, uint8 `[samples, channels, side, side]`.
        labels: The labels to train on, noise included, `[samples]`.
        flipped: Which labels are wrong, `[samples]`.
        eval_images: Images to record.
        eval_labels: Their true classes.
        classes: Number of classes.
        mean: Mean of the training images per channel, in units of 255.
        std: Standard deviation likewise.
    """

    images: Tensor
    labels: Tensor
    flipped: Tensor
    eval_images: Tensor
    eval_labels: Tensor
    classes: int
    mean: Tensor
    std: Tensor

    def normalize(self, images: Tensor) -> Tensor:
        """Float images of mean 0 and deviation 1, channels last."""
        scale = 1 / (255 * self.std)
        shifted = images * scale[:, None, None] - (self.mean / self.std)[:, None, None]
        return shifted.contiguous(memory_format=torch.channels_last)

    def augmented(self, index: Tensor, augment: str, generator: torch.Generator) -> Tensor:
        """Normalised training images, each shifted (and mirrored) at random.

        Args:
            index: Which samples, `[batch]`.
            augment: none, crop or crop_flip.
            generator: Source of the randomness, on the data's device.
        """
        if augment == "none":
            return self.normalize(self.images[index])
        side, count = self.images.shape[-1], len(index)
        pad = side // 8
        device = self.images.device
        shift = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator, device=device)
        pixel = torch.arange(side, device=device)
        rows, columns = (pixel + shift).unbind(0)
        if augment == "crop_flip":
            mirror = torch.rand(count, generator=generator, device=device) < 0.5
            columns = torch.where(mirror[:, None], columns.flip(1), columns)
        padded = torch.nn.functional.pad(self.images[index], (pad, pad, pad, pad)).flatten(2)
        plane = (rows[:, :, None] * (side + 2 * pad) + columns[:, None, :]).flatten(1)
        chosen = padded.gather(2, plane[:, None].expand(-1, padded.shape[1], -1))
        return self.normalize(chosen.view(count, -1, side, side))


def data_root() -> Path:
    """Where data sets lie: the folder that the environment variable FMN_DATA names, or data/."""
    return Path(os.environ.get("FMN_DATA", "data"))


def download(dataset: str) -> Path:
    """Fetch one of torchvision's data sets into `data_root()`."""
    name, folder = _torchvision(dataset)
    import torchvision.datasets

    getattr(torchvision.datasets, name)(data_root() / folder, download=True)
    return data_root() / folder


def load(config: RunConfig, device: str | torch.device = "cpu") -> DataSet:
    """The data set of a run, its labels made noisy, its images on a device.

    Raises:
        InputError: If the data set is unknown or not where it should be.
    """
    images, labels, eval_images, eval_labels = _read(config)
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
        return noise.transition(labels, _read_matrix(Path(file)), seed)
    if kind == "human":
        path = data_root() / "cifar100n" / "cifar100n_human.npz"
        if config.dataset != "cifar100" or not path.exists():
            raise InputError(f"human noise is of cifar100 and lies in {path}; put it there")
        with np.load(path, allow_pickle=False) as stored:
            noisy, flipped = noise.human(every_label, stored["clean_label"], stored["noisy_label"])
        return noisy[chosen], flipped[chosen]
    return labels, np.zeros(len(labels), bool)


def _read_matrix(path: Path) -> np.ndarray:
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"noise matrix {path}: {error}; give rows of numbers as CSV") from error


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


def _read(config: RunConfig) -> Arrays:
    if config.classes != "all":
        return _half(_read(dataclasses.replace(config, classes="all")), config.classes)
    if config.dataset == "digits":
        return _digits()
    if config.dataset == "wave":
        return plane.wave()
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
        known = ", ".join(["digits", *_TORCHVISION, "wave", "folder:PATH"])
        raise InputError(f"dataset is {dataset!r}; known are {known}")
    return _TORCHVISION[dataset]


def _from_torchvision(dataset: str) -> Arrays:
    import torchvision.datasets

    name, folder = _torchvision(dataset)
    root = data_root() / folder
    try:
        parts = [getattr(torchvision.datasets, name)(root, train=train) for train in (True, False)]
    except RuntimeError as error:
        where = f"{name} was not found in {root}"
        raise InputError(f"{where}; run `fmn download {dataset}` or set FMN_DATA") from error
    images = [np.asarray(part.data) for part in parts]
    nchw = [x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) for x in images]
    labels = [np.asarray(part.targets).astype(np.int64) for part in parts]
    return nchw[0], labels[0], nchw[1], labels[1]


def _folder(root: Path, side: int) -> Arrays:
    """Read `train/CLASS/*` and `test/CLASS/*` (or val/), cut to a centred square and resized."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    evaluation = "test" if (root / "test").is_dir() else "val"
    steps = [v2.PILToTensor(), v2.Resize(side, antialias=True), v2.CenterCrop(side)]
    transform: Callable[..., Tensor] = v2.Compose([v2.RGB(), *steps])
    try:
        parts = [ImageFolder(root / part, transform) for part in ("train", evaluation)]
    except FileNotFoundError as error:
        lies = f"{root} must hold train/CLASS/ and test/CLASS/ with images"
        raise InputError(f"{lies} ({error})") from error
    if parts[0].classes != parts[1].classes:
        raise InputError(
            f"{root}: the classes of train/ and {evaluation}/ differ; make them equal"
        )
    images = [np.stack([image.numpy() for image, _ in part]) for part in parts]
    labels = [np.array(part.targets, np.int64) for part in parts]
    return images[0], labels[0], images[1], labels[1]
