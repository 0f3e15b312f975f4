"""Record a training loop of your own: one line after each epoch, of any framework.

A tracked folder holds `tracked.json` (labels, number of classes), `predicted.i32` and `probs.f16`
(a row an epoch, appended), and `checkpoints/epoch_NNNN.safetensors` where networks are given. An
epoch counts once its row of `predicted.i32` is whole, so that a loop which is killed loses
nothing that it had noted.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from fmnlib.config import InputError
from fmnlib.files import write_whole
from fmnlib.record import RunRecord


class Tracker:
    """The growing record of a training loop, on disk.

    Args:
        folder: Its folder; made at the first note.
        labels: True classes `[samples]` of the fixed samples whose outputs are noted.
        start: The epoch that is noted next, above 0 for a loop that goes on after a crash: the
            epochs before it are kept, and any from it on are noted anew.

    Raises:
        InputError: If the folder holds another loop's epochs, or fewer than `start`.

    >>> import tempfile
    >>> tracker = Tracker(tempfile.mkdtemp() + "/tracked", labels=[0, 1])
    >>> tracker.note([[2.0, -1.0], [0.5, 0.1]])  # logits or probabilities; returns accuracy
    0.5
    >>> tracker.record().correct.tolist()
    [[True, False]]
    """

    def __init__(self, folder: Path | str, labels: Any, *, start: int = 0) -> None:
        self.folder, self.labels = Path(folder), as_array(labels)
        if self.labels.ndim != 1 or not np.issubdtype(self.labels.dtype, np.integer):
            problem = f"labels are {self.labels.dtype} of shape {self.labels.shape}"
            raise InputError(f"{problem}; give one integer class a sample")
        if not self.labels.size or self.labels.min() < 0:
            raise InputError("labels are empty or negative; give one class from 0 on a sample")
        self.labels = self.labels.astype(np.int64)
        self._classes, self.epochs = 0, 0
        if is_tracked(self.folder):
            stored, self._classes = _read_head(self.folder)
            self.epochs = _epochs(self.folder, len(stored))
            if not np.array_equal(stored, self.labels):
                raise InputError(f"{folder} was tracked with other labels; use another folder")
        if start > self.epochs or (start == 0 < self.epochs) or start < 0:
            problem = f"{folder} holds {self.epochs} epochs and start is {start}"
            allowed = f"start at 1 to {self.epochs}" if self.epochs else "leave start out"
            raise InputError(f"{problem}; use another folder, or {allowed}")
        self.epochs = start

    def note(self, outputs: Any, model: Any = None) -> float:
        """Record the outputs of the network after an epoch; return its accuracy.

        Args:
            outputs: Logits or probabilities `[samples, classes]`: an array or a tensor of any
                framework. Rows that are not all of sum 1 are taken for logits.
            model: The network (or its state dictionary), to keep as a checkpoint.

        Raises:
            InputError: If the shape changes or a number is not finite.
        """
        probs = as_probs(outputs)
        classes = self._classes or max(probs.shape[1], int(self.labels.max()) + 1)
        if probs.shape != (len(self.labels), classes):
            shape = f"[{len(self.labels)}, {classes}]"
            raise InputError(f"outputs are {list(probs.shape)}; give {shape}, a row a label")
        if not self._classes:
            head = {"labels": self.labels.tolist(), "classes": classes}
            write_whole(self.folder / "tracked.json", json.dumps(head).encode())
            self._classes = classes
        for file in (self.folder / "checkpoints").glob("epoch_*.safetensors"):
            number = file.stem.removeprefix("epoch_")
            if number.isdigit() and int(number) >= self.epochs:  # a loop went further before
                file.unlink()
        if model is not None:
            _save(self.folder / "checkpoints" / f"epoch_{self.epochs:04d}.safetensors", model)
        predicted = probs.argmax(axis=1).astype("<i4")  # before float16 makes ties
        _truncate(self.folder / "predicted.i32", self.epochs * predicted.nbytes)
        _append(self.folder / "probs.f16", self.epochs, probs.astype("<f2"))
        _append(self.folder / "predicted.i32", self.epochs, predicted)
        self.epochs += 1
        return float((predicted == self.labels).mean())

    def record(self) -> RunRecord:
        """The record of the epochs noted so far, its probabilities mapped from disk."""
        return load_tracked(self.folder)


def load_tracked(folder: Path | str) -> RunRecord:
    """The record of a tracked folder, also of a loop that was killed or still runs.

    Raises:
        InputError: If it is none, is damaged, or holds no epoch.
    """
    folder = Path(folder)
    labels, classes = _read_head(folder)
    shape = (_epochs(folder, len(labels)), len(labels))
    if not shape[0]:
        raise InputError(f"{folder} holds no whole epoch yet; note one with its Tracker")
    try:
        predicted = np.fromfile(folder / "predicted.i32", "<i4", shape[0] * shape[1])
        probs = np.memmap(folder / "probs.f16", "<f2", "r", shape=(*shape, classes))
    except (OSError, ValueError) as error:
        problem = f"{folder} is damaged ({error}); track the loop again, in another folder"
        raise InputError(problem) from error
    record = RunRecord.from_arrays(probs, labels)
    return dataclasses.replace(record, predicted=predicted.reshape(shape).astype(np.int32))


def is_tracked(folder: Path | str) -> bool:
    """Whether a folder is a `Tracker`'s."""
    return (Path(folder) / "tracked.json").exists()


def as_array(values: Any) -> np.ndarray:
    """A numpy array of a list, an array or a tensor of any framework, on any device."""
    if hasattr(values, "detach"):  # a tensor of torch; numpy knows no bfloat16
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def as_probs(outputs: Any) -> Float[np.ndarray, "samples classes"]:
    """Probabilities of rows of logits; of rows of probabilities, themselves.

    >>> as_probs([[0.0, 0.0]]).tolist()
    [[0.5, 0.5]]
    """
    values = as_array(outputs).astype(np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"outputs are {list(values.shape)}; give [samples, classes]")
    if not np.isfinite(values).all():
        raise InputError("the outputs are not finite; look for NaN, lower the learning rate")
    if (values >= 0).all() and np.abs(values.sum(axis=1) - 1).max() <= 0.01:
        return values
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _save(path: Path, model: Any) -> None:
    from fmnlib.checkpoint import save_tensors

    state = model if isinstance(model, Mapping) else model.state_dict()
    save_tensors(path, {name: tensor.clone() for name, tensor in state.items()})


def _append(path: Path, row: int, values: np.ndarray) -> None:
    """Append a row in place of what a killed write left behind, and flush it to the disk."""
    _truncate(path, row * values.nbytes)
    with path.open("ab") as file:
        file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _truncate(path: Path, length: int) -> None:
    if path.exists():
        os.truncate(path, length)


def _epochs(folder: Path, samples: int) -> int:
    file = folder / "predicted.i32"
    return file.stat().st_size // (4 * samples) if file.exists() else 0


def _read_head(folder: Path) -> tuple[Int[np.ndarray, " samples"], int]:
    try:
        head = json.loads((folder / "tracked.json").read_text())
        return np.array(head["labels"], np.int64), int(head["classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is no tracked folder; make one with a Tracker") from error
