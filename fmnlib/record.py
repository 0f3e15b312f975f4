"""The record of a run and the score of a method, and how both are stored.

Axes are always `epochs, samples, classes`. Epochs count from 0; the last one is the final model.
"""

import dataclasses
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from fmnlib import __version__
from fmnlib.config import InputError, RunConfig
from fmnlib.files import write_whole

LOSS_EDGES = np.append(np.linspace(0.0, 10.0, 41), np.inf)
"""Bin edges, in nats, of the recorded histograms of training losses; the last bin is open."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The predictions of one training run: the object that every score and method reads.

    Attributes:
        labels: True class of each evaluation sample.
        predicted: Class predicted after each epoch.
        kept: Epochs whose probabilities are kept, ascending.
        probs: Their class probabilities, or None in a light record.
        classes: Number of classes.
        curves: Named numbers per epoch, such as train_loss.
        loss_histogram: Training losses per epoch, of points with [clean, flipped] labels, in
            the bins of `LOSS_EDGES`.
        config: How the run was trained; None for arrays from elsewhere.
        provenance: Versions, commit, device, seconds.
        half: Which part of the evaluation data this is; what selects refuses "test".
        index: Which samples of the whole record a half holds; None for the whole record.
    """

    labels: Int[np.ndarray, " samples"]
    predicted: Int[np.ndarray, "epochs samples"]
    kept: Int[np.ndarray, " kept"]
    probs: Float[np.ndarray, "kept samples classes"] | None
    classes: int
    curves: Mapping[str, Float[np.ndarray, " epochs"]] = dataclasses.field(default_factory=dict)
    loss_histogram: Int[np.ndarray, "epochs 2 bins"] | None = None
    config: RunConfig | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    half: Literal["all", "val", "test"] = "all"
    index: Int[np.ndarray, " samples"] | None = None

    @classmethod
    def from_arrays(cls, probs: np.ndarray, labels: Sequence[int] | np.ndarray) -> "RunRecord":
        """Make a record from the outputs of any framework.

        Args:
            probs: Class probabilities `[epochs, samples, classes]`.
            labels: True classes `[samples]`, from 0 to classes - 1.

        Raises:
            InputError: If shapes disagree, a label is outside the classes, or a row of
                probabilities is not finite, is negative or does not sum to 1.

            >>> record = RunRecord.from_arrays(np.array([[[0.9, 0.1]], [[0.4, 0.6]]]), [0])
        >>> record.correct.tolist()
        [[True], [False]]
        """
        probs, labels = np.asarray(probs), np.asarray(labels)
        if probs.ndim != 3 or labels.shape != probs.shape[1:2] or 0 in probs.shape:
            shapes = f"probs {probs.shape} and labels {labels.shape}"
            raise InputError(f"{shapes}; give probs [epochs, samples, classes], labels [samples]")
        if not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"labels are {labels.dtype}; give integer classes")
        classes = probs.shape[2]
        if labels.min() < 0 or labels.max() >= classes:
            span = f"from {labels.min()} to {labels.max()}"
            raise InputError(f"labels run {span}; with {classes} classes allow 0 to {classes - 1}")
        for epoch, rows in enumerate(probs):
            if not (rows >= 0).all() or abs(rows.sum(axis=1, dtype=np.float64) - 1).max() > 0.01:
                faults = f"epoch {epoch} are not finite, negative or not of sum 1"
                raise InputError(f"the probabilities of {faults}; apply a softmax, look for NaN")
        predicted = probs.argmax(axis=2).astype(np.int32)  # before float16 makes ties
        labels, kept = labels.astype(np.int64), np.arange(len(probs))
        return cls(labels=labels, predicted=predicted, kept=kept, probs=probs, classes=classes)

    @property
    def epochs(self) -> int:
        """Number of epochs recorded."""
        return len(self.predicted)

    @property
    def correct(self) -> Bool[np.ndarray, "epochs samples"]:
        """Which samples are classified correctly after each epoch."""
        return self.predicted == self.labels

    @property
    def accuracy(self) -> Float[np.ndarray, " epochs"]:
        """Accuracy after each epoch, from 0 to 1."""
        return self.correct.mean(axis=1)

    def take(self, index: Int[np.ndarray, " chosen"], half: Literal["val", "test"]) -> "RunRecord":
        """The record of some of the samples."""
        return dataclasses.replace(
            self,
            labels=self.labels[index],
            predicted=self.predicted[:, index],
            probs=None if self.probs is None else self.probs[:, index],
            half=half,
            index=index if self.index is None else self.index[index],
        )

    def split(self, seed: int) -> tuple["RunRecord", "RunRecord"]:
        """Draw a validation half, to select on, and a test half, to report on (papers, sec. 5).

        Raises:
            InputError: If this is already a half, or the validation half misses a class.
        """
        if seed < 0:
            raise InputError(f"the split's seed is {seed}; give 0 or more")
        if self.half != "all":
            raise InputError(f"this record is a {self.half} half already; split the whole record")
        val, test = halves(len(self.labels), seed)
        if missing := sorted(set(self.labels.tolist()) - set(self.labels[val].tolist())):
            problem = f"the validation half of split {seed} has no sample of class {missing[0]}"
            raise InputError(f"{problem}; record more samples or use another split seed")
        return self.take(val, "val"), self.take(test, "test")

    def keep(self, epochs: Sequence[int] | np.ndarray) -> "RunRecord":
        """A lighter record with the probabilities of these epochs alone."""
        if self.probs is None:
            raise InputError("this record holds no probabilities; load the run's own folder")
        if lost := set(map(int, epochs)) - set(self.kept.tolist()):
            raise InputError(f"epoch {min(lost)} is not kept; kept are {self.kept.tolist()}")
        rows = np.flatnonzero(np.isin(self.kept, epochs))
        return dataclasses.replace(self, kept=self.kept[rows], probs=np.asarray(self.probs[rows]))

    def final(self) -> "RunRecord":
        """The record of the last epoch alone."""
        last = slice(self.epochs - 1, None)
        hist = self.loss_histogram
        return dataclasses.replace(
            self.keep([self.epochs - 1]),
            predicted=self.predicted[last],
            kept=np.arange(1),
            curves={name: curve[last] for name, curve in self.curves.items()},
            loss_histogram=None if hist is None else hist[last],
        )

    def save(self, path: Path, *, light: bool = False) -> None:
        """Write one compressed npz file, whole or not at all; `light` leaves out probabilities."""
        config = None if self.config is None else self.config.changes()
        about: dict[str, Any] = {"version": __version__, "config": config}
        about |= {"provenance": dict(self.provenance), "classes": self.classes}
        about |= {"half": self.half, "curves": list(self.curves)}
        arrays: dict[str, np.ndarray] = {
            "labels": self.labels,
            "predicted": self.predicted.astype(np.min_scalar_type(self.classes)),
            "kept": self.kept,
            "curves": np.array([*self.curves.values()], dtype=np.float32),
        }
        optional = {"loss_histogram": self.loss_histogram, "index": self.index}
        arrays |= {name: array for name, array in optional.items() if array is not None}
        if self.probs is not None and light:
            arrays["probs_checksum"] = checksums(self.probs)
        elif self.probs is not None:
            arrays["probs"] = self.probs.astype(np.float16)
        about["arrays"] = [*arrays]  # a damaged directory can lose one without a word
        arrays["about"] = np.array(json.dumps(about))
        write_whole(Path(path), _npz(arrays))

    @classmethod
    def load(cls, path: Path | str) -> "RunRecord":
        """Read a record from its file, or from a run's folder with its probabilities mapped.

        Raises:
            InputError: If there is none, or it is truncated, damaged or no record.
        """
        path = Path(path)
        file = path / "record.npz" if path.is_dir() else path
        if not file.exists() and (path / "config.json").exists():
            raise InputError(f"{path} is not finished; the same `fmn train` resumes it")
        if not file.exists():
            raise InputError(f"{file} does not exist; `fmn runs` lists the runs there are")
        try:
            with file.open("rb") as raw, np.load(raw, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}  # checks the CRC
            about = json.loads(str(arrays.pop("about")))
            if about["arrays"] != [*arrays]:
                raise ValueError("an array is missing")
            curves = dict(zip(about["curves"], arrays.pop("curves"), strict=True))
            config = None if about["config"] is None else _read_config(about)
            probs, expected = arrays.pop("probs", None), arrays.pop("probs_checksum", None)
            if probs is None and (path / "probs.npy").exists():
                probs = np.load(path / "probs.npy", mmap_mode="r", allow_pickle=False)
                if not np.array_equal(checksums(probs), expected):
                    raise ValueError("probs.npy is not what the record says that it is")
            arrays["predicted"] = arrays["predicted"].astype(np.int32)
            fields = {name: about[name] for name in ("classes", "provenance", "half")}
            return cls(**arrays, **fields, curves=curves, config=config, probs=probs)
        except Exception as error:  # zip, zlib, numpy and JSON raise a dozen kinds between them
            reason = str(error).partition("\n")[0] or type(error).__name__
            problem = f"{file} is damaged or is no record ({reason})"
            raise InputError(f"{problem}; move it away and run again") from error


def _read_config(about: Mapping[str, Any]) -> RunConfig:
    """The config of a record; of another version it may have fields that are not known here."""
    try:
        return RunConfig.from_dict(about["config"])
    except InputError as error:
        writer = f"it was written by fmnlib {about.get('version', 'before 0.2')}"
        raise InputError(f"{writer}, this is {__version__}: {error}") from error


def halves(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which samples are the validation half of a split, and which the test half.

    >>> [half.tolist() for half in halves(4, seed=0)]
    [[0, 2], [1, 3]]
    """
    order = np.random.default_rng(seed).permutation(samples)
    return np.sort(order[: samples // 2]), np.sort(order[samples // 2 :])


def checksums(probs: np.ndarray) -> np.ndarray:
    """One checksum for the probabilities of each epoch."""
    rows = (np.ascontiguousarray(row, np.float16) for row in probs)
    return np.array([zlib.crc32(row.data) for row in rows], np.int64)


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An npz file that numpy reads too, a fifth smaller than numpy's own, without time stamps."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_LZMA)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The score of one method on the test half of one run; one line of JSON on disk.

    Attributes:
        item: Notebook or experiment that it belongs to, such as label_noise.
        setting: Noise in short, such as sym40.
        method: Such as kf.
        seed: Training seed.
        split_seed: Which half was the test half.
        accuracy: From 0 to 1.
        nll: Negative log-likelihood, nats a sample.
        ece: Expected calibration error, from 0 to 1.
        networks: Networks evaluated for one prediction.
        train_seconds: Wall time of all training that the method needs.
    """

    item: str
    setting: str
    method: str
    seed: int
    split_seed: int
    accuracy: float
    nll: float
    ece: float
    networks: int
    train_seconds: float
