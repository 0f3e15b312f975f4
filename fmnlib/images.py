"""A folder of images, as a network sees it: one reader, one rule of resizing and cropping.

Decoding, resizing and centre cropping are deterministic; random crops and flips are applied
afterwards, to batches of uint8 images. Worker processes decode while the network computes.
"""

import dataclasses
import multiprocessing
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from joblib import cpu_count
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fmnlib.config import InputError
from fmnlib.files import require_file

IN_MEMORY = 2**30
"""Most bytes of images that are held in memory; more are read from their files in each pass."""

MAX_SERIAL = 500  # up to this many images are loaded without worker processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image file becomes a network's input; the defaults are those of ImageNet."""

    size: int = 224  #: Side of the centre crop that the network sees, in pixels
    #: Shorter side before the centre crop, in pixels; 0 takes 256/224 of `size`
    resize: int = 0
    #: Mean per channel, of pixels from 0 to 1; one number converts the images to grey
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  #: Standard deviation per channel

    def __post_init__(self) -> None:
        numbers = all(isinstance(value, int | float) for value in (*self.mean, *self.std))
        lengths = len(self.mean) in (1, 3) and len(self.std) == len(self.mean)
        if not numbers or not lengths or not all(v > 0 for v in self.std):
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

    def transform(self) -> Any:
        """Torchvision's transform from a PIL image to bytes `[channels, size, size]`."""
        from torchvision.transforms import v2

        colour = v2.RGB() if len(self.mean) == 3 else v2.Grayscale()
        cut = v2.Resize(self.shorter), v2.CenterCrop(self.size)
        return v2.Compose([colour, *cut, v2.PILToTensor()])

    def normalize(
        self, images: UInt8[Tensor, "n channels side side"]
    ) -> Float[Tensor, "n channels side side"]:
        """Normalise images for the network: floats of about mean 0, standard deviation 1."""
        mean, std = (torch.tensor(v, device=images.device) for v in (self.mean, self.std))
        return (images / 255 - mean[:, None, None]) / std[:, None, None]

    def __str__(self) -> str:
        """In words, for people to check."""
        numbers = [" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std)]
        cut = f"shorter side to {self.shorter} pixels, middle {self.size} x {self.size}"
        return f"{cut}, mean {numbers[0]}, std {numbers[1]}"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Labelled images in files, decoded when they are needed."""

    root: Path  #: A folder
    files: np.ndarray  #: Their paths below it, `[samples]`; as bytes, which take little memory
    labels: Int[np.ndarray, " samples"]  #: The class of each one
    classes: list[str]  #: Names of the classes
    preprocessing: Preprocessing  #: How a network sees them
    #: Number of worker processes; 0 decodes in this one. By default the environment variable
    #: FMN_WORKERS, or this process's share of the cores.
    workers: int | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a tensor of all images: samples, channels, height and width."""
        size = self.preprocessing.size
        return len(self.files), len(self.preprocessing.mean), size, size

    @property
    def names(self) -> list[str]:
        """The files' paths below the root."""
        return [os.fsdecode(name) for name in self.files.tolist()]

    def __getitem__(self, index: Int[np.ndarray, " chosen"]) -> "ImageFiles":
        """Some of the images."""
        return dataclasses.replace(self, files=self.files[index], labels=self.labels[index])

    def fits(self) -> bool:
        """Whether the images are to be held in memory: at most `IN_MEMORY` bytes."""
        return int(np.prod(self.shape)) <= IN_MEMORY

    def on(self, device: torch.device | str) -> "Tensor | ImageFiles":
        """The images on a device; where they do not fit in memory, their files."""
        return self.load().to(device) if self.fits() else self

    def load(self) -> Tensor:
        """All images, uint8 `[samples, channels, size, size]`."""
        if len(self) <= MAX_SERIAL and self.workers is None:  # starting processes takes longer
            return dataclasses.replace(self, workers=0).load()
        images = torch.empty(self.shape, dtype=torch.uint8)
        batches = torch.arange(len(self)).split(64)
        with tqdm(desc=f"reading {self.root.name}", total=len(self), unit="image") as bar:
            for index, batch in zip(batches, self.read(batches), strict=True):
                images[index] = batch
                bar.update(len(index))
        return images

    def read(self, batches: Iterable[Tensor | np.ndarray]) -> Iterator[Tensor]:
        """Batches of images in order, uint8 `[batch, channels, size, size]`, some read ahead.

        The worker processes start with the first pass and wait for the next one; there is one
        pass at a time. The indices are on the CPU. An `InputError` if an image cannot be read, or
        a process ended.
        """
        loader = _LOADERS[self] if self in _LOADERS else _LOADERS.setdefault(self, self._open())
        loader.sampler[:] = map(np.asarray, batches)
        problem = ""
        try:
            for images in loader:
                if isinstance(images, str):
                    problem = images
                    break
                yield images
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            if "DataLoader worker" not in reason:
                raise
            hint = "have scripts call from under `if __name__ == '__main__':`, free memory, or"
            problem = f"reading images ended: {reason}; {hint} set FMN_WORKERS=0"
        if problem:  # outside `except`, no traceback refers to the loader: its processes end now
            del loader, _LOADERS[self]
            raise InputError(problem)

    def _open(self) -> Any:
        workers = _usual_workers() if self.workers is None else self.workers
        return DataLoader(
            _Decoder(self.root, self.files, self.preprocessing.transform()),
            batch_size=None,  # an item of the sampler is a batch
            sampler=[],  # the batches of a pass, for the loader outlives it
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=_context() if workers else None,
            generator=torch.Generator(),  # else it draws from the global random state
        )


def open_folder(folder: Path, preprocessing: Preprocessing) -> ImageFiles:
    """The images `folder/CLASS/*`, read later; classes are numbered in alphabetical order.

    An `InputError` if there are none.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (folder / name).mkdir()
    ...     Image.new("RGB", (30, 20)).save(folder / name / "1.png")
    >>> images = open_folder(folder, Preprocessing(size=8))
    >>> images.classes, images.labels.tolist(), images.shape
    (['cat', 'dog'], [0, 1], (2, 3, 8, 8))
    """
    from torchvision.datasets import ImageFolder

    folder = folder.expanduser()
    try:
        listing = ImageFolder(str(folder))
    except (OSError, ValueError) as error:  # no folder, no image, a class without images
        reason = str(error).partition("\n")[0]
        raise InputError(f"{folder} must hold CLASS/ folders of images ({reason})") from error
    names = np.array([os.fsencode(Path(file).relative_to(folder)) for file, _ in listing.samples])
    labels = np.array(listing.targets, np.int64)
    return ImageFiles(folder, names, labels, listing.classes, preprocessing)


def open_split(root: Path, preprocessing: Preprocessing) -> tuple[ImageFiles, ImageFiles]:
    """The images of `train/CLASS/*`, and of `test/CLASS/*` or `val/CLASS/*`.

    The test folder is taken if it has the classes of the training folder (ImageNet's does not),
    else the val folder. An `InputError` if neither has them.
    """
    root = root.expanduser()
    classes, *others = (
        sorted(path.name for path in root.glob(f"{part}/*/")) for part in ("train", "test", "val")
    )
    if not classes or classes not in others:
        wanted = "train/CLASS/ and test/CLASS/ (or val/) of the same classes"
        raise InputError(f"{root} must hold {wanted}")
    held_out = ("test", "val")[others.index(classes)]
    return open_folder(root / "train", preprocessing), open_folder(root / held_out, preprocessing)


def _usual_workers() -> int:
    """FMN_WORKERS, or the cores at hand divided among the processes of torchrun."""
    if count := os.environ.get("FMN_WORKERS"):
        if not count.isdecimal():
            raise InputError(f"FMN_WORKERS is {count!r}; make it a count, 0 for this process only")
        return int(count)
    return max(1, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# Not an attribute of `ImageFiles`: in such a reference cycle each process takes 5 s to end.
_LOADERS: weakref.WeakKeyDictionary[ImageFiles, Any] = weakref.WeakKeyDictionary()


@dataclasses.dataclass
class _Decoder(Dataset[Any]):
    """The data set that worker processes decode batches from."""

    root: Path
    files: np.ndarray
    transform: Any

    def __getitem__(self, index: np.ndarray) -> Tensor | str:
        """The batch, or a message in one line, as an error raised in a worker has many lines."""
        from PIL import Image

        bombs = Image.DecompressionBombWarning, Image.DecompressionBombError
        images = []
        for name in self.files[index].tolist():
            path = self.root / os.fsdecode(name)
            try:
                require_file(path)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of palettes with transparency
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    with Image.open(path) as image:
                        if image.mode[0] in "IF":  # 16 or 32 bits, cut off at 255 by `convert`
                            raise ValueError(f"its mode is {image.mode}; save it with 8 bits")
                        images.append(self.transform(image.convert("RGB")))
            except (OSError, SyntaxError, ValueError, *bombs) as error:
                return f"{path} cannot be read as an image ({error}); fix it, or move it away"
        return torch.stack(images)


def _context() -> Any:
    """How workers start: not by a fork of this process, as its threads may hold locks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fmnlib.images", "torchvision.transforms.v2"])
    return context
