"""The data set of a run: read, samples chosen, labels made noisy, images on a device.

Images that fit stay uint8 on the device; a batch is gathered, augmented and normalised there.
Those of a larger folder are read by worker processes, batch by batch (`fmnlib.images`), and then
processed in the same way. The augmentation of an image depends only on its index and the seed.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmnlib import plane
from fmnlib.config import InputError, RunConfig
from fmnlib.files import data_root
from fmnlib.images import ImageFiles, Preprocessing, open_split
from fmnlib.noise import noisy_labels
from fmnlib.record import halves

Images = np.ndarray | ImageFiles
# Training images uint8 `[samples, channels, side, side]`, labels, evaluation images, labels.
Source = tuple[Images, np.ndarray, Images, np.ndarray]

STATISTICS_SAMPLES = 2000  # images of a folder from which pixel mean and deviation are computed

_TORCHVISION = {  # its names of the data sets
    "mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Batch:
    """Training images as a step sees them."""

    images: Tensor  #: Augmented and normalised, float `[batch, channels, side, side]`
    index: Tensor  #: Which training samples they are, `[batch]`
    view: Tensor  #: Which view of the pool each one shows, `[batch]`; 0 without a pool


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Training and evaluation data of a run; labels, and images that fit, lie on its device."""

    #: Training images, uint8 `[samples, channels, side, side]`, or their files
    images: Tensor | ImageFiles
    labels: Tensor  #: The labels to train on, noise included, `[samples]`
    flipped: Tensor  #: Which labels are wrong, `[samples]`
    eval_images: Tensor | ImageFiles  #: Images to record, or their files
    eval_labels: Tensor  #: Their classes; with noise if they are held out of the training data
    classes: int  #: Number of classes
    mean: Tensor  #: Mean of the training images per channel, in units of 255
    std: Tensor  #: Standard deviation likewise
    #: Crops and flips `[views, 3, samples]`, drawn by `sample_crop_flip`, of which each epoch
    #: takes one per image; None draws new ones in each epoch
    view_pool: Tensor | None = None
    files: ImageFiles | None = None  #: Where the training images come from, if from files

    @property
    def device(self) -> torch.device:
        """Where the labels lie, and images arrive."""
        return self.labels.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.images.shape[1:])

    def normalize(self, images: Tensor) -> Tensor:
        """Float images of mean 0 and deviation 1, channels last."""
        scale = 1 / (255 * self.std)
        shifted = images * scale[:, None, None] - (self.mean / self.std)[:, None, None]
        return shifted.contiguous(memory_format=torch.channels_last)

    def batches(self, indices: Sequence[Tensor], augment: str, seed: int) -> Iterator[Batch]:
        """Training images as an epoch shows them: augmented (as in `RunConfig`) and normalised.

        Crop and flip depend on the seed and on the sample's index alone.
        """
        samples, generator = len(self.labels), torch.Generator(self.device).manual_seed(seed)
        view = torch.zeros(samples, dtype=torch.long, device=self.device)
        transforms = None
        if augment != "none" and self.view_pool is not None:
            view.random_(len(self.view_pool), generator=generator)
            transforms = self.view_pool.gather(0, view.expand(1, 3, -1))[0]
        elif augment != "none":
            transforms = sample_crop_flip(augment, self.shape[-1], samples, generator)
        for index, images in zip(indices, self.gather(self.images, indices), strict=True):
            if transforms is not None:
                images = apply_crop_flip(images, transforms[:, index])
            yield Batch(self.normalize(images), index, view[index])

    def gather(self, images: Tensor | ImageFiles, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """Batches of uint8 images, `self.images` or `self.eval_images`, on the device."""
        if isinstance(images, Tensor):
            yield from (images[index] for index in indices)
            return
        order = torch.cat(list(indices)).cpu()  # one synchronisation, before kernels are queued
        for batch in images.read(order.split([len(index) for index in indices])):
            yield batch.to(self.device, non_blocking=True)


def load(config: RunConfig, device: str | torch.device = "cpu") -> DataSet:
    """The data set of a run on a device: its samples chosen, its labels made noisy."""
    images, labels, eval_images, eval_labels = read(config)
    classes = int(labels.max()) + 1
    if classes < 2:
        raise InputError(f"{config.dataset} has one class ({config.classes}); give two or more")
    chosen = _subset(len(labels), config.train_samples, config.noise_seed)
    if config.evaluate == "heldout":  # held-out labels are noisy too: noise is drawn for all
        every = np.arange(len(labels))
        noisy, flipped = noisy_labels(config, labels, every, classes)
        rest = np.setdiff1d(every, chosen)
        if not len(rest):
            raise InputError("no training image is held out; set train_samples to fewer than all")
        eval_images, eval_labels, eval_flipped = images[rest], noisy[rest], flipped[rest]
        noisy, flipped = noisy[chosen], flipped[chosen]
    else:
        noisy, flipped = noisy_labels(config, labels, chosen, classes)
        eval_flipped = np.zeros(len(eval_labels), bool)
    eval_chosen = _subset(len(eval_labels), config.eval_samples, config.noise_seed)
    images, eval_images = images[chosen], eval_images[eval_chosen]
    eval_labels, eval_flipped = eval_labels[eval_chosen], eval_flipped[eval_chosen]
    use, _, split = config.validation_half.partition(":")
    if split:
        if isinstance(images, ImageFiles) or isinstance(eval_images, ImageFiles):
            raise InputError("validation_half is for images in memory; use a data set of arrays")
        half = halves(len(eval_labels), int(split))[0]
        others = slice(0 if use == "alone" else None)  # none or all training samples
        images = np.concatenate([images[others], eval_images[half]])
        noisy = np.concatenate([noisy[others], eval_labels[half]])
        flipped = np.concatenate([flipped[others], eval_flipped[half]])
    mean, std = _pixel_statistics(images)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def on_device(part: Images) -> Tensor | ImageFiles:
        return part.on(device) if isinstance(part, ImageFiles) else tensor(part)

    return DataSet(
        images=on_device(images),
        labels=tensor(noisy),
        flipped=tensor(flipped),
        eval_images=on_device(eval_images),
        eval_labels=tensor(eval_labels),
        classes=classes,
        mean=tensor(mean),
        std=tensor(std),
        files=images if isinstance(images, ImageFiles) else None,
    )


def read(config: RunConfig) -> Source:
    """The whole data set of a run, with its original labels.

    An `InputError` if it is unknown or cannot be found.
    """
    if config.classes != "all":
        return _half(read(dataclasses.replace(config, classes="all")), config.classes)
    if config.dataset == "digits":
        return _digits()
    if config.dataset == "wave":
        return plane.wave()
    if not config.dataset.startswith("folder:"):
        return _from_torchvision(config.dataset)
    preprocessing = Preprocessing(size=config.image_size, resize=config.resize)
    train, test = open_split(Path(config.dataset.removeprefix("folder:")), preprocessing)
    return train, train.labels, test, test.labels


def download(dataset: str) -> Path:
    """Fetch one of torchvision's data sets into `data_root()`."""
    import torchvision.datasets

    name, folder = _torchvision(dataset)
    try:
        getattr(torchvision.datasets, name)(folder, download=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} cannot be fetched ({reason}); is there a network?") from error
    return folder


def sample_crop_flip(augment: str, side: int, samples: int, generator: torch.Generator) -> Tensor:
    """Draw a crop, and a flip, for each sample, on the device of the generator.

    They are integers `[3, samples]`: rows and columns to shift by, in pixels, which count from 0
    to a quarter of the side (an eighth is no shift), and whether to flip.
    """
    transforms = torch.zeros(3, samples, dtype=torch.long, device=generator.device)
    transforms[:2].random_(2 * (side // 8) + 1, generator=generator)
    if augment == "crop_flip":
        transforms[2].random_(2, generator=generator)
    return transforms


def apply_crop_flip(images: Tensor, transforms: Tensor) -> Tensor:
    """Crop and flip images uint8 `[batch, channels, side, side]`, padded with black pixels.

    The transforms `[3, batch]` are as `sample_crop_flip` draws them.

    >>> image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    >>> apply_crop_flip(image, torch.tensor([[2], [1], [0]]))[0, 0, 0, :3].tolist()
    [8, 9, 10]
    """
    count, channels, side, _ = images.shape
    pad = side // 8
    pixel = torch.arange(side, device=images.device)
    down, right, flip = transforms[:, :, None]
    across = torch.where(flip > 0, pixel.flip(0), pixel)
    rows, columns = pixel + down, across + right
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad)).flatten(2)
    plane_index = (rows[:, :, None] * (side + 2 * pad) + columns[:, None, :]).flatten(1)
    chosen = padded.gather(2, plane_index[:, None].expand(-1, channels, -1))
    return chosen.view(count, channels, side, side)


def _subset(available: int, wanted: int, seed: int) -> np.ndarray:
    if wanted > available:
        wish = f"{wanted} samples are wanted of {available}"
        raise InputError(f"{wish}; ask for fewer, or 0 for all")
    return np.sort(np.random.default_rng(seed).permutation(available)[: wanted or available])


def _pixel_statistics(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation per channel, in units of 255, from exact counts of the 256 values."""
    if isinstance(images, ImageFiles):
        spaced = np.linspace(0, len(images) - 1, min(len(images), STATISTICS_SAMPLES))
        images = images[np.unique(spaced.astype(int))].load().numpy()
    channels = images.transpose(1, 0, 2, 3)
    share = np.array([np.bincount(c.ravel(), minlength=256) / c.size for c in channels])
    value = np.arange(256) / 255
    mean = share @ value
    std = np.sqrt(np.maximum(share @ value**2 - mean**2, 1e-6))
    return mean.astype(np.float32), std.astype(np.float32)


def _half(source: Source, half: str) -> Source:
    """The samples of half of the classes, which are counted from 0 again."""
    images, labels, eval_images, eval_labels = source
    middle, end = (int(labels.max()) + 1) // 2, int(labels.max()) + 1
    first, last = (0, middle) if half == "first_half" else (middle, end)
    index, eval_index = (np.flatnonzero((first <= y) & (y < last)) for y in (labels, eval_labels))
    if isinstance(images, ImageFiles) and isinstance(eval_images, ImageFiles):
        images, eval_images = (
            dataclasses.replace(
                files, labels=files.labels - first, classes=files.classes[first:last]
            )
            for files in (images, eval_images)
        )
    train = images[index], labels[index] - first
    return *train, eval_images[eval_index], eval_labels[eval_index] - first


def _digits() -> Source:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))  # the same split in every run
    images = np.round(images[order] * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = labels[order].astype(np.int64)
    return images[:1000], labels[:1000], images[1000:], labels[1000:]


def _torchvision(dataset: str) -> tuple[str, Path]:
    """The name of a data set in torchvision, and the folder where it lies."""
    if dataset not in _TORCHVISION:
        known = ", ".join(["digits", *_TORCHVISION, "wave", "folder:PATH"])
        raise InputError(f"dataset is {dataset!r}; known are {known}")
    return _TORCHVISION[dataset], data_root() / _TORCHVISION[dataset].lower()


def _from_torchvision(dataset: str) -> Source:
    import torchvision.datasets

    name, root = _torchvision(dataset)
    try:
        parts = [getattr(torchvision.datasets, name)(root, train=train) for train in (True, False)]
    except Exception as error:  # torchvision asserts, unpickles and slices what it reads
        if "not found" in str(error):
            where = f"{name} was not found in {root}"
            raise InputError(f"{where}; run `fmn download {dataset}` or set FMN_DATA") from error
        damaged = f"{name} in {root} is damaged ({error!r:.90})"
        raise InputError(f"{damaged}; move it away and run `fmn download {dataset}`") from error
    images = [np.asarray(part.data) for part in parts]
    nchw = [x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) for x in images]
    labels = [np.asarray(part.targets).astype(np.int64) for part in parts]
    return nchw[0], labels[0], nchw[1], labels[1]
