"""Images too many for memory, read from files while a network trains.

A folder holds `train/CLASS/*` and `val/CLASS/*` (or test/), as ImageNet does.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fmnlib.config import InputError
from fmnlib.training.reader import Reader, Request, usual_workers

__all__ = ["AUGMENTS", "StreamedSet", "open_folder"]

AUGMENTS = ("none", "imagenet", "trivial", "rand")
"""Centred crop; random resized crop and mirror; with TrivialAugmentWide; with RandAugment."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images per channel, in units of 255."""


@dataclasses.dataclass(frozen=True)
class StreamedSet:
    """Training and evaluation images in files; has the labels and views of a `DataSet`.

    Attributes:
        root: The folder.
        files: Training images below it, `[samples]`; bytes, so that a million stay small.
        labels: The labels to train on, noise included, `[samples]`, on the device.
        flipped: Which labels are wrong, `[samples]`.
        eval_files: Images to record.
        eval_labels: Their true classes.
        classes: Number of classes.
        size: Side of a training image in pixels.
        eval_size: Side of an evaluation image.
        eval_resize: Its shorter side before the centre is cut out.
        interpolation: How images are resized.
        erase: Probability that a random rectangle of a training image is erased.
        workers: Processes that decode; 0 decodes in this one.
    """

    root: Path
    files: np.ndarray
    labels: Tensor
    flipped: Tensor
    eval_files: np.ndarray
    eval_labels: Tensor
    classes: int
    size: int
    eval_size: int
    eval_resize: int
    interpolation: Literal["bilinear", "bicubic"]
    erase: float
    workers: int

    @property
    def device(self) -> torch.device:
        """Where labels lie and images arrive."""
        return self.labels.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels and sides of a training image."""
        return 3, self.size, self.size

    def subset(self, train: np.ndarray, evaluation: np.ndarray) -> "StreamedSet":
        """The same folder with some of its images alone.

        Args:
            train: Indices of the training images to keep.
            evaluation: Indices of the evaluation images to keep.
        """
        rows, eval_rows = (torch.from_numpy(i).to(self.device) for i in (train, evaluation))
        return dataclasses.replace(
            self,
            files=self.files[train],
            labels=self.labels[rows],
            flipped=self.flipped[rows],
            eval_files=self.eval_files[evaluation],
            eval_labels=self.eval_labels[eval_rows],
        )

    def views(self, batches: Iterable[Tensor], augment: str, seed: int) -> Iterator[Tensor]:
        """Augmented training images, float, mean 0 and deviation 1, channels last, on the device.

        Args:
            batches: For each batch the indices of its samples.
            augment: One of `AUGMENTS`.
            seed: With an image's index it decides what the image looks like.

        Raises:
            InputError: If the augmentation is unknown or an image cannot be read.
        """
        if augment not in AUGMENTS:
            known = ", ".join(AUGMENTS)
            raise InputError(f"augment is {augment!r}; for images in files choose one of {known}")
        asked = _requests(self.root, self.files, batches, self._training_steps(augment), seed)
        return self._arrivals(asked)

    def eval_views(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Evaluation images, as `views` gives them: resized, and the centre cut out."""
        steps = self._centre(self.eval_resize, self.eval_size)
        return self._arrivals(_requests(self.root, self.eval_files, batches, steps, 0))

    def _arrivals(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """The batches that are asked for, on the device and normalised there."""
        scale = torch.tensor(STD, device=self.device).mul(255).reciprocal()[:, None, None]
        shift = torch.tensor(MEAN, device=self.device).mul(255)[:, None, None] * scale
        for images in self._reader.read(requests):
            here = images.to(self.device, non_blocking=True)
            yield (here * scale - shift).contiguous(memory_format=torch.channels_last)

    @functools.cached_property
    def _reader(self) -> Reader:
        return Reader(self.workers, pinned=self.device.type == "cuda")

    def _training_steps(self, augment: str) -> Any:
        from torchvision.transforms import v2

        if augment == "none":
            return self._centre(self.size * 8 // 7, self.size)
        mode = v2.InterpolationMode(self.interpolation)
        steps = [v2.RandomResizedCrop(self.size, interpolation=mode), v2.RandomHorizontalFlip()]
        if augment == "trivial":
            steps.append(v2.TrivialAugmentWide(interpolation=mode))
        elif augment == "rand":
            steps.append(v2.RandAugment(interpolation=mode))
        steps.append(v2.PILToTensor())
        if self.erase:
            grey = [round(255 * mean) for mean in MEAN]
            steps.append(v2.RandomErasing(self.erase, value=grey))
        return v2.Compose(steps)

    def _centre(self, resize: int, size: int) -> Any:
        from torchvision.transforms import v2

        mode = v2.InterpolationMode(self.interpolation)
        return v2.Compose([v2.Resize(resize, mode), v2.CenterCrop(size), v2.PILToTensor()])


def open_folder(
    root: Path,
    device: str | torch.device = "cpu",
    *,
    size: int = 224,
    eval_size: int = 0,
    eval_resize: int = 0,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    erase: float = 0.0,
    workers: int | None = None,
) -> StreamedSet:
    """The images of `train/CLASS/*` and of `test/CLASS/*` or `val/CLASS/*`; none is read yet.

    The test folder is taken if it has the classes of the training folder: ImageNet's has not.

    Args:
        root: The folder.
        device: Where labels lie and images arrive.
        size: Side of a training image in pixels.
        eval_size: Side of an evaluation image; 0 is `size`.
        eval_resize: Its shorter side before its centre is cut out; 0 is 8/7 of `eval_size`, the
            usual 256 for 224.
        interpolation: How images are resized.
        erase: Probability that a random rectangle of a training image is erased.
        workers: Processes that decode; where not given the environment variable FMN_WORKERS, or
            this process's share of the cores.

    Raises:
        InputError: If the folder does not hold images in this way.

    >>> import tempfile
    >>> from PIL import Image
    >>> from sklearn.datasets import load_sample_images
    >>> folder = Path(tempfile.mkdtemp())
    >>> for part in ("train", "val"):
    ...     for name, pixels in zip(("china", "flower"), load_sample_images().images):
    ...         (folder / part / name).mkdir(parents=True)
    ...         Image.fromarray(pixels).save(folder / part / name / "photo.jpg")
    >>> data = open_folder(folder, size=64, workers=0)
    >>> [view.shape for view in data.views([torch.tensor([1, 0])], "trivial", seed=0)]
    [torch.Size([2, 3, 64, 64])]
    """
    from torchvision.datasets import ImageFolder

    given = [part for part in ("test", "val") if _classes(root / part) == _classes(root / "train")]
    if not given or not _classes(root / "train"):
        raise InputError(
            f"{root} must hold train/CLASS/ and val/CLASS/ (or test/) of the same classes"
        )
    try:
        parts = [ImageFolder(root / part) for part in ("train", given[0])]
    except FileNotFoundError as error:  # a class without images
        raise InputError(f"{root}: {str(error).splitlines()[0]} Remove or fill them") from error
    files = [
        np.array([os.fsencode(Path(f).relative_to(root)) for f, _ in p.samples]) for p in parts
    ]
    labels = [torch.tensor(part.targets, device=device) for part in parts]
    eval_size = eval_size or size
    return StreamedSet(
        root=root,
        files=files[0],
        labels=labels[0],
        flipped=torch.zeros_like(labels[0], dtype=torch.bool),
        eval_files=files[1],
        eval_labels=labels[1],
        classes=len(parts[0].classes),
        size=size,
        eval_size=eval_size,
        eval_resize=eval_resize or eval_size * 8 // 7,
        interpolation=interpolation,
        erase=erase,
        workers=usual_workers() if workers is None else workers,
    )


def _requests(
    root: Path, files: np.ndarray, batches: Iterable[Tensor], steps: Any, seed: int
) -> Iterator[Request]:
    """One for each batch; the indices come from the device at once, before it is at work."""
    chosen = list(batches)
    order = torch.cat(chosen).cpu().numpy()
    for part in np.split(order, np.cumsum([len(batch) for batch in chosen])[:-1]):
        yield Request(root, files[part].tolist(), part.tolist(), steps, seed)


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
