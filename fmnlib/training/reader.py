"""Processes that read images from files, cut and augment them, batch by batch.

What an image looks like is decided by a seed and the image's index alone: not by how many
processes read, nor by what they read before.
"""

import dataclasses
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fmnlib.config import InputError

__all__ = ["Reader", "Request", "usual_workers"]


@dataclasses.dataclass(frozen=True)
class Request:
    """All that a process must know to make one batch.

    Attributes:
        root: A folder.
        files: Images below it, as bytes.
        indices: Numbers of the images in their data set.
        steps: From a PIL image to an uint8 tensor; torchvision's transforms.
        seed: With an image's index it decides what is random in the steps.
    """

    root: Path
    files: list[bytes]
    indices: list[int]
    steps: Any
    seed: int


class Reader:
    """Answers requests in order, some ahead of the one asked for; one iteration at a time.

    Its processes start with the first iteration and live as long as the reader.

    Args:
        workers: How many processes; 0 reads in this one.
        pinned: Answer in memory that a GPU reads while it works.
    """

    def __init__(self, workers: int, pinned: bool) -> None:
        self.workers, self.pinned = workers, pinned
        self._queue = _Queue()
        self._loader: DataLoader[Any] | None = None

    def read(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """The batches, uint8 `[batch, 3, side, side]`.

        Raises:
            InputError: If an image cannot be read, or a process ended.
        """
        self._queue.requests = requests
        if self._loader is None:  # never ask whether it is true: it would count its batches
            self._loader = self._start()
        try:
            for images in self._loader:
                if isinstance(images, str):
                    self._loader = None  # else the error's traceback would keep the processes
                    raise InputError(images)
                yield images
        except RuntimeError as error:
            told = str(error).partition("\n")[0]
            if "DataLoader worker" not in told:
                raise
            self._loader = None
            hint = "have scripts call from under `if __name__ == '__main__':`, free memory, or"
            raise InputError(f"reading images ended: {told}; {hint} set FMN_WORKERS=0") from error

    def _start(self) -> DataLoader[Any]:
        return DataLoader(
            _Decoder(),
            batch_size=None,  # a request is a batch
            sampler=self._queue,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.pinned,
            multiprocessing_context=_context() if self.workers else None,
            generator=torch.Generator(),  # else it draws from the global random state
        )


def usual_workers() -> int:
    """FMN_WORKERS, or the cores at hand divided among the processes of torchrun."""
    if told := os.environ.get("FMN_WORKERS"):
        if not told.isdecimal():
            raise InputError(f"FMN_WORKERS is {told!r}; make it a count, 0 for this process alone")
        return int(told)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclasses.dataclass
class _Queue:
    """What is asked for in the iteration at hand."""

    requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class _Decoder(Dataset[Any]):
    """What runs in the processes."""

    def __getitem__(self, request: Request) -> Tensor | str:
        """The batch; or, as an error that a process raises has many lines, what is wrong."""
        images = []
        for file, index in zip(request.files, request.indices, strict=True):
            path = request.root / os.fsdecode(file)
            try:
                with Image.open(path) as image:
                    pixels = image.convert("RGB")
            except (OSError, SyntaxError) as error:
                return f"{path} is no image ({error}); replace or remove it"
            mixed = np.random.SeedSequence((request.seed, index)).generate_state(1)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(mixed[0]))
                images.append(request.steps(pixels))
        return torch.stack(images)


def _context() -> Any:
    """Processes start from one that has a single thread: a fork of this one copies held locks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fmnlib.training.reader", "torchvision.transforms.v2"])
    return context
