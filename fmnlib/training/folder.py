"""A run's folder: one run's, and one process's at a time."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from fmnlib.config import InputError, RunConfig
from fmnlib.files import write_whole
from fmnlib.record import RunRecord
from fmnlib.training.parallel import ALONE, World

__all__ = ["alone", "check_labels", "once"]


@contextmanager
def alone(config: RunConfig, folder: Path, world: World = ALONE) -> Iterator[None]:
    """Hold a run's folder, made if need be; say so where another process holds it, and wait.

    Args:
        config: The run.
        folder: Its folder.
        world: Processes that hold it together.

    Raises:
        InputError: If the folder is another run's.
    """
    if not world.first:
        world.meet()
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that trains {config.id}", file=sys.stderr)
        lock.acquire()
    try:
        _claim(folder, config)
        for leftover in folder.rglob(".*.part"):  # of a process that was killed while writing
            leftover.unlink(missing_ok=True)
        world.meet()
        yield
    finally:
        lock.release()


def check_labels(folder: Path, labels: np.ndarray) -> None:
    """Refuse to go on, or to answer, with what a run learned from other labels.

    A config names a file of noise or a folder of images, not what is in it.

    Raises:
        InputError: If the labels are not those that the run began with.
    """
    digest, file = hashlib.sha256(labels.tobytes()).hexdigest(), folder / "labels.sha256"
    if not file.exists():
        write_whole(file, digest.encode())
    elif file.read_text() != digest:
        told = f"{folder} was trained on other labels than its settings give now"
        raise InputError(f"{told}; move it away to train anew, or bring the old labels back")


def once(config: RunConfig, folder: Path, make: Callable[[], RunRecord]) -> RunRecord:
    """The record in a folder; made, where it is not there yet, by one process."""
    with alone(config, folder):
        if not (folder / "record.npz").exists():
            make().save(folder / "record.npz")
        return RunRecord.load(folder)


def _claim(folder: Path, config: RunConfig) -> None:
    """Make the folder the run's own, or refuse to touch another run's."""
    file = folder / "config.json"
    if not file.exists():
        write_whole(file, json.dumps(dataclasses.asdict(config), indent=1).encode())
    elif RunConfig.load(file) != config:
        raise InputError(f"{folder} is the folder of another run; choose another folder")
