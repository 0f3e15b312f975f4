"""Record your own training loop, in any framework, with one line after each epoch.

A tracked folder holds `tracked.json` (labels, number of classes, ids and groups), `predicted.i32`
and `probs.f16` (one row per epoch, appended), `checksums.u32` (their CRCs, two per epoch), and,
if networks are given, `checkpoints/epoch_NNNN.safetensors` of all epochs or of those that `keep`
selects. An epoch counts once its row of `predicted.i32` is complete, so that a loop that is
killed loses no noted epoch.
"""

import dataclasses
import json
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from fmnlib.config import InputError
from fmnlib.files import open_regular, write_whole
from fmnlib.record import RunRecord, as_array, as_names, check_integers
from fmnlib.scores import at_chance, covering

_VERIFIED = 2**31  # most bytes of probabilities whose checksums are verified on loading
_EARLY = 5  # epochs after which accuracy should be above chance


class Tracker:
    """The growing record of a training loop, on disk.

    Args:
        folder: Folder of the record; created by the first `note`.
        labels: True classes `[samples]` of the fixed samples whose outputs are noted.
        start: The epoch that is noted next; above 0 to continue a loop after a crash.
        overwrite: Replace the epochs from `start` on, 1 or later, that the folder already holds.
        outputs: Whether `note` gets "logits" or "probs"; detected if not given.
        ids: As in `RunRecord`, integers or texts `[samples]`.
        groups: Likewise.
        keep: Most checkpoints on the disk at a time, 2 or more. The last, the best and those are
            kept that alone are right about the most samples of the validation half of split 0
            (`fmnlib.scores.covering`); only these epochs can be mixed. The predictions of all
            epochs stay.

    Raises:
        InputError: If the folder holds another loop's epochs, any with `start` 0, fewer than
            `start`, or more without `overwrite`.

    >>> import tempfile
    >>> tracker = Tracker(tempfile.mkdtemp() + "/tracked", labels=[0, 1])
    >>> tracker.note([[2.0, -1.0], [0.5, 0.1]])  # logits or probabilities; returns accuracy
    0.5
    >>> tracker.record().correct.tolist()
    [[True, False]]
    """

    def __init__(
        self,
        folder: Path | str,
        labels: Any,
        *,
        start: int = 0,
        overwrite: bool = False,
        outputs: str | None = None,
        ids: Any = None,
        groups: Any = None,
        keep: int | None = None,
    ) -> None:
        self.folder, self.labels = Path(folder).absolute(), as_array(labels)
        if self.labels.ndim != 1 or not np.issubdtype(self.labels.dtype, np.integer):
            problem = f"labels are {self.labels.dtype} of shape {self.labels.shape}"
            raise InputError(f"{problem}; give one integer class a sample")
        if not self.labels.size or self.labels.min() < 0:
            raise InputError("labels are empty or negative; give one class from 0 on a sample")
        if outputs not in ("logits", "probs", None):
            raise InputError(f'outputs is {outputs!r}; give "logits" or "probs"')
        self.labels, self.outputs = self.labels.astype(np.int64), outputs
        names = {"ids": ids, "groups": groups}
        given = {key: as_names(key, names[key], len(self.labels)) for key in names}
        distinct = len(self.labels if given["groups"] is None else np.unique(given["groups"]))
        integer = isinstance(keep, int | np.integer)
        if keep is not None and (not integer or keep < 2 or distinct < 2):
            problem = f"keep is {keep} with {distinct} {'samples' if groups is None else 'groups'}"
            raise InputError(
                f"{problem}; keep 2 or more checkpoints, chosen by 2 or more of these"
            )
        self.epochs = 0
        self._head = _Head(self.labels, 0, given["ids"], given["groups"], keep and int(keep))
        if is_tracked(self.folder):
            self._head = _read_head(self.folder)
            self.epochs = _epochs(self.folder, len(self._head.labels))
            asked = given | {"labels": self.labels, "keep": keep}
            for name, values in asked.items():
                stored = getattr(self._head, name)
                if values is not None and not np.array_equal(values, stored):
                    raise InputError(f"{folder} was tracked with other {name}; use another folder")
        problem = f"{folder} holds {self.epochs} epochs and start is {start}"
        if start > self.epochs or (start == 0 < self.epochs) or start < 0:
            allowed = f"start at 1 to {self.epochs}" if self.epochs else "leave start out"
            raise InputError(f"{problem}; use another folder, or {allowed}")
        if start < self.epochs and not overwrite:
            lost = f"{self.epochs - start} of them would be lost"
            raise InputError(f"{problem}: {lost}; start at {self.epochs}, or say overwrite=True")
        self.epochs, self._stored = start, self.epochs  # the next epoch; what the folder holds

    def note(self, outputs: Any, model: Any = None, *, epoch: int | None = None) -> float:
        """Record the outputs of the network after an epoch; return its accuracy.

        Warns once if after five epochs no accuracy is above chance (`scores.at_chance`), and if
        outputs look like a softmax of probabilities.

        Args:
            outputs: Logits or probabilities `[samples, classes]`: an array or a tensor of any
                framework, or an object with `logits`. Rows that are not all of sum 1 are logits.
            model: The torch network in evaluation mode, or its state dictionary, for a checkpoint.
            epoch: Number of this epoch, checked so that none is skipped or noted twice.

        Raises:
            InputError: If the shape changes, the outputs are not finite or neither logits nor
                probabilities (such as sigmoids), the network is in training mode, or `epoch` is
                not the next one. Then nothing is written.
        """
        if epoch is not None and epoch != self.epochs:
            problem = f"epoch {epoch} is noted, but it is the turn of epoch {self.epochs}"
            raise InputError(f"{problem}; note each epoch once, in order")
        stored = _epochs(self.folder, len(self.labels)) if is_tracked(self.folder) else 0
        if stored != self._stored:
            problem = f"{self.folder} holds {stored} epochs, {self._stored} are by this loop"
            remedy = "give each loop a folder, and of several processes let one note"
            raise InputError(f"{problem}; {remedy}")
        if self._head.keep and model is None:
            problem = f"keep is {self._head.keep}, but no network is given"
            raise InputError(f"{problem}; note the model as well, or leave keep out")
        state = None if model is None else _state(model)
        probs = as_probs(outputs, self.outputs)
        classes = self._head.classes or probs.shape[1]
        if probs.shape != (len(self.labels), classes):
            shape = f"[{len(self.labels)}, {classes}]"
            raise InputError(f"outputs are {list(probs.shape)}; give {shape}, a row a label")
        check_integers("labels", self.labels, self.labels.shape, classes)
        if not self._head.classes:
            self._head = _write_head(self.folder, self._head, classes)
        predicted = probs.argmax(axis=1).astype("<i4")  # before float16 makes ties
        self._write(predicted, probs.astype("<f2", order="C"), state)  # a checksum is of rows
        if self.outputs is None and _softened_twice(probs):
            problem = 'outputs look like a softmax of a softmax; apply one, or say outputs="probs"'
            warnings.warn(problem, stacklevel=2)
        if self.epochs == _EARLY and at_chance(self.record().predicted, self.labels):
            problem = f"after {_EARLY} epochs no accuracy is above chance"
            check = "have outputs and labels the same order of samples and of classes?"
            warnings.warn(f"{problem}; {check}", stacklevel=2)
        return float((predicted == self.labels).mean())

    def _write(self, predicted: np.ndarray, probs: np.ndarray, state: Any) -> None:
        (self.folder / "fusion.json").unlink(missing_ok=True)  # it was found on other epochs
        _append(self.folder / "predicted.i32", self.epochs, predicted[:0], predicted.nbytes)
        self._stored = self.epochs
        for epoch, file in _checkpoints(self.folder).items():
            if epoch >= self.epochs:  # a loop went further before
                file.unlink()
        if state is not None:
            from fmnlib.checkpoint import save_tensors

            name = f"epoch_{self.epochs:04d}.safetensors"
            save_tensors(self.folder / "checkpoints" / name, state)
        _append(self.folder / "probs.f16", self.epochs, probs, probs.nbytes)
        if self._head.crc is not None:
            crc = [zlib.crc32(predicted.data, self._head.crc), zlib.crc32(probs.data)]
            _append(self.folder / "checksums.u32", self.epochs, np.array(crc, "<u4"), 8)
        _append(self.folder / "predicted.i32", self.epochs, predicted, predicted.nbytes)
        self._stored = self.epochs = self.epochs + 1
        if self._head.keep and self.epochs > self._head.keep:
            rows = _read(self.folder, "predicted.i32", "<i4", (self.epochs, len(predicted)))
            kept = _kept(self.folder, self._head, rows)
            for epoch, file in _checkpoints(self.folder).items():
                if epoch not in kept:
                    file.unlink()

    def record(self) -> RunRecord:
        """The record of the epochs noted so far, its probabilities mapped from disk."""
        return load_tracked(self.folder)


@dataclasses.dataclass(frozen=True)
class _Head:
    """What `tracked.json` holds, and its own CRC; None in a folder without checksums."""

    labels: Int[np.ndarray, " samples"]
    classes: int
    ids: np.ndarray | None = None
    groups: np.ndarray | None = None
    keep: int | None = None
    crc: int | None = None


def load_tracked(folder: Path | str) -> RunRecord:
    """The record of a tracked folder, also of a loop that was killed or still runs.

    Labels and predictions are checked against their checksums, and the probabilities too where
    they take 2 GiB or less; beyond that those of the last epoch alone. An `InputError` if the
    folder is not a tracked folder, is damaged, or holds no epoch.
    """
    folder = Path(folder)
    head = _read_head(folder)
    epochs = _epochs(folder, len(head.labels))
    if not epochs:
        raise InputError(f"{folder} holds no whole epoch yet; note one with its Tracker")
    shape = epochs, len(head.labels), head.classes
    predicted = _read(folder, "predicted.i32", "<i4", shape[:2])
    probs = _read(folder, "probs.f16", "<f2", shape)
    if head.crc is not None:
        first = 0 if probs.nbytes <= _VERIFIED else epochs - 1
        expected = _read(folder, "checksums.u32", "<u4", (epochs, 2))
        for epoch in range(epochs):
            found = [zlib.crc32(predicted[epoch].data, head.crc)]
            found += [zlib.crc32(probs[epoch].data)] if epoch >= first else []
            if found != expected[epoch, : len(found)].tolist():
                problem = f"{folder} is damaged: epoch {epoch} or tracked.json is not as written"
                raise InputError(f"{problem}; track the loop again, in another folder")
    record = _record(head, predicted, probs)
    return record if head.keep is None else record.keep(_kept(folder, head, predicted))


def is_tracked(folder: Path | str) -> bool:
    """Whether a folder is a `Tracker`'s."""
    return (Path(folder) / "tracked.json").exists()


def as_probs(outputs: Any, kind: str | None = None) -> Float[np.ndarray, "samples classes"]:
    """Convert rows of logits to probabilities; return rows of probabilities unchanged.

    `outputs` is an array `[samples, classes]`, or has one as attribute or key "logits". If `kind`,
    "logits" or "probs", is not given, rows that all sum to 1 are taken for probabilities. An
    `InputError` if the rows are neither.

    >>> as_probs([[0.0, 0.0]]).tolist()
    [[0.5, 0.5]]
    """
    if isinstance(outputs, Mapping) and "logits" in outputs:
        outputs = outputs["logits"]
    values = as_array(getattr(outputs, "logits", outputs))
    if values.dtype.kind not in "biufV" or values.dtype.names:  # bfloat16 of JAX is a void
        raise InputError(f"outputs are {values.dtype}; give floats")
    values = values.astype(np.float64)
    if values.ndim != 2 or 0 in values.shape or values.shape[1] == 1:
        two = "; of two classes give both, 1 - p and p, or the logits 0 and m of a margin m"
        one_number = values.ndim == 1 or values.shape[1:] == (1,)
        problem = f"outputs are {list(values.shape)}; give [samples, classes]"
        raise InputError(problem + (two if one_number else ""))
    if not np.isfinite(values).all():
        raise InputError("the outputs are not finite; look for NaN, lower the learning rate")
    sum_to_1 = values.min() >= 0 and np.abs(values.sum(axis=1) - 1).max() <= 0.01
    if kind == "probs" and not sum_to_1:
        raise InputError("outputs are said to be probs but are negative or not of sum 1")
    if sum_to_1 and kind != "logits":
        return values
    if kind is None and (fault := _why_not_logits(values)):
        problem = f"outputs look like {fault}, neither logits nor probabilities"
        raise InputError(f'{problem}; give one of them, or say Tracker(..., outputs="logits")')
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _why_not_logits(values: np.ndarray) -> str:
    """What rows that do not sum to 1 look like; empty if they may be logits."""
    if values.min() < 0 or not np.ptp(values, axis=1).any():  # zeros of a fresh layer are logits
        return ""
    least, most = values.sum(axis=1).min(), values.sum(axis=1).max()
    if 98 <= least and most <= 102:
        return "percentages"
    if 0.5 <= least and most <= 1.5:
        return f"probabilities of sum {least:.3f} to {most:.3f}"
    return "sigmoids, or a softmax over the samples" if values.max() <= 1 else ""


def _softened_twice(probs: Float[np.ndarray, "samples classes"]) -> bool:
    """Whether rows p are a softmax of probabilities q that are confident in several classes.

    If p = softmax(q) and q sums to 1, then q = log p + c with c = (1 - sum log p) / classes. A
    network early in training is not confident, nor is gradient boosting.
    """
    logs = np.log(probs[:: 1 + len(probs) // 2000].clip(1e-300))  # at most 2000 rows are enough
    inner = logs + (1 - logs.sum(axis=1, keepdims=True)) / probs.shape[1]
    if inner.min() < -1e-3:
        return False
    largest, answers = inner.max(axis=1), inner.argmax(axis=1)
    sure = [largest[answers == answer].mean() > 0.9 for answer in np.unique(answers)]
    return bool(largest.mean() > 0.9 and sum(sure) > 1)


def _state(model: Any) -> dict[str, Any]:
    """Copies of the tensors of a torch network, for a checkpoint."""
    if getattr(model, "training", False) is True:
        problem = "the network is in training mode, where dropout and batch normalisation differ"
        raise InputError(f"{problem}; call model.eval() before you predict, model.train() after")
    found = model.state_dict() if hasattr(model, "state_dict") else model
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and hasattr(tensor, "detach") for name, tensor in found.items()
    ):
        kind = f"a {type(model).__name__} is neither a torch network nor a state_dict of tensors"
        raise InputError(f"{kind}; only those are kept as checkpoints, leave model out")
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _append(path: Path, row: int, values: np.ndarray, size: int) -> None:
    """Write row number `row`, of `size` bytes, drop all later rows, and flush to the disk."""
    try:
        with open_regular(path, "ab") as file:
            file.truncate(row * size)
            file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{path} is a link or not a file; use another folder") from error
        raise


def _read(folder: Path, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The rows in a file, mapped."""
    try:
        with open_regular(folder / name) as file:
            return np.memmap(file, dtype, "r", shape=shape)
    except (OSError, ValueError) as error:
        problem = f"{folder} is damaged ({error}); track the loop again, in another folder"
        raise InputError(problem) from error


def _checkpoints(folder: Path) -> dict[int, Path]:
    files = (folder / "checkpoints").glob("epoch_*.safetensors")
    numbers = {file.stem.removeprefix("epoch_"): file for file in files}
    return {int(number): file for number, file in numbers.items() if number.isdecimal()}


def _kept(folder: Path, head: _Head, predicted: np.ndarray) -> np.ndarray:
    """The epochs whose checkpoints exist and are kept under the limit `keep`."""
    assert head.keep is not None
    stored = np.array(sorted(e for e in _checkpoints(folder) if e < len(predicted)))
    if not stored.size:
        raise InputError(f"{folder} has lost its checkpoints; bring them back, or track it again")
    val = _record(head, predicted[stored]).split(0)[0]
    return stored[covering(val.correct, head.keep)]


def _record(head: _Head, predicted: np.ndarray, probs: np.ndarray | None = None) -> RunRecord:
    """The record of some epochs, light where no probabilities are given."""
    named: Any = {name: getattr(head, name) for name in ("labels", "classes", "ids", "groups")}
    kept = np.arange(0 if probs is None else len(probs))
    named |= {"provenance": {"keep_best": head.keep}} if head.keep else {}
    return RunRecord(predicted=predicted.astype(np.int32), kept=kept, probs=probs, **named)


def _epochs(folder: Path, samples: int) -> int:
    file = folder / "predicted.i32"
    return file.stat().st_size // (4 * samples) if file.exists() else 0


def _write_head(folder: Path, head: _Head, classes: int) -> _Head:
    fields = vars(head) | {"classes": classes, "checksums": True}
    present = {name: value for name, value in fields.items() if value is not None}
    content = json.dumps(present, default=np.ndarray.tolist).encode()
    write_whole(folder / "tracked.json", content)
    return dataclasses.replace(head, classes=classes, crc=zlib.crc32(content))


def _read_head(folder: Path) -> _Head:
    try:
        with open_regular(folder / "tracked.json") as file:
            content = file.read()
        fields = json.loads(content)
        if not fields.keys() <= {"labels", "classes", "ids", "groups", "keep", "checksums"}:
            raise ValueError("unknown key")
        labels, classes = np.array(fields["labels"]), int(fields["classes"])
        check_integers("labels", labels, (max(1, labels.size),), classes)
        names = {key: as_names(key, fields.get(key), labels.size) for key in ("ids", "groups")}
        crc = zlib.crc32(content) if fields.get("checksums") else None
        keep = fields.get("keep")
        if keep is not None and not (type(keep) is int and keep >= 2):
            raise ValueError("keep is not an integer of 2 or more")
        return _Head(labels.astype(np.int64), classes, **names, keep=keep, crc=crc)
    except Exception as error:  # files, JSON and numpy raise half a dozen kinds between them
        raise InputError(f"{folder} is not a tracked folder; make one with a Tracker") from error
