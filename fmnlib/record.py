"""The record of a run and the score of a method, and how both are stored.

Axes are always `epochs, samples, classes`. Epochs count from 0; the last one is the final model.
"""

import dataclasses
import hashlib
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from fmnlib import __version__
from fmnlib.config import InputError, RunConfig
from fmnlib.files import require_file, write_whole

LOSS_EDGES = np.append(np.linspace(0.0, 10.0, 41), np.inf)
"""Bin edges, in nats, of the recorded histograms of training losses; the last bin is open."""
_COPIED = 2**30  # bytes; halves of larger memory-mapped probabilities are views, not copies
_CHECKED = 2**22  # at most about this many probabilities, of evenly spaced samples, are checked


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """A view of the probabilities of some samples: only what is indexed is read and copied.

    >>> part = Columns(np.arange(12.0).reshape(2, 3, 2), np.array([2, 0]))
    >>> part.shape, part[1].tolist(), part[0, 1].tolist()
    ((2, 2, 2), [[10.0, 11.0], [6.0, 7.0]], [0.0, 1.0])
    """

    source: np.ndarray  #: Probabilities of all samples, `[kept, samples, classes]`
    index: Int[np.ndarray, " samples"]  #: The samples in this view

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of kept epochs, of samples and of classes."""
        return len(self.source), len(self.index), self.source.shape[2]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the probabilities."""
        return self.source.dtype

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Any) -> Any:
        parts: list[Any] = [*key] if isinstance(key, tuple) else [key]
        if any(part is Ellipsis for part in parts):
            return np.asarray(self)[key]
        rows, samples, *classes = [*parts, slice(None)][: max(2, len(parts))]
        chosen = self.index[samples]
        if isinstance(rows, slice) and not classes and np.ndim(chosen):
            return Columns(self.source[rows], chosen)
        if isinstance(samples, slice):  # else pointwise, as numpy does
            return self.source[rows][..., chosen, :][(..., *classes)]
        return self.source[(rows, chosen, *classes)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.source[:, self.index], dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The predictions of one training run: the object that every score and method reads.

    An `InputError` if the fields contradict each other, or probabilities are not finite, are
    negative, do not sum to 1 or do not match the predictions. Of more than four million
    probabilities only those of evenly spaced samples are checked.
    """

    labels: Int[np.ndarray, " samples"]  #: True class of each evaluation sample
    predicted: Int[np.ndarray, "epochs samples"]  #: Class predicted after each epoch
    kept: Int[np.ndarray, " kept"]  #: Epochs whose probabilities are kept, ascending
    #: Their class probabilities, or None in a light record
    probs: Float[np.ndarray | Columns, "kept samples classes"] | None
    classes: int  #: Number of classes
    #: Named numbers per epoch, such as train_loss
    curves: Mapping[str, Float[np.ndarray, " epochs"]] = dataclasses.field(default_factory=dict)
    #: Counts of training losses of samples with [clean, flipped] labels, in bins of `LOSS_EDGES`
    loss_histogram: Int[np.ndarray, "epochs 2 bins"] | None = None
    config: RunConfig | None = None  #: How the run was trained; None for arrays from elsewhere
    #: Versions, commit, device, seconds
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: Part of the evaluation data; functions that select anything refuse "test"
    half: Literal["all", "val", "test"] = "all"
    #: Which samples of the whole record a half holds; None for the whole record
    index: Int[np.ndarray, " samples"] | None = None
    #: Unique integers or strings, one per sample, such as file names within the data's folder;
    #: with them a split does not depend on the order of the samples
    ids: np.ndarray | None = None
    #: Integers or strings, equal for samples of (say) one patient; a group is never split
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        integer = isinstance(self.classes, int | np.integer)
        if not integer or self.classes < 2 or self.half not in ("all", "val", "test"):
            problem = f"classes is {self.classes!r} and half is {self.half!r}"
            raise InputError(f"{problem}; give a whole number from 2 on, and all, val or test")
        object.__setattr__(self, "classes", int(self.classes))  # JSON knows no numpy integer
        shape = np.shape(self.predicted)
        if len(shape) != 2 or 0 in shape:
            raise InputError(f"predicted is of shape {shape}; give [epochs, samples]")
        epochs, samples = shape
        check_integers("predicted", self.predicted, shape, self.classes)
        check_integers("labels", self.labels, (samples,), self.classes)
        check_integers("kept", self.kept, np.shape(self.kept)[:1], epochs)
        if (np.diff(self.kept) <= 0).any():
            raise InputError("kept epochs do not ascend; give each once, in order")
        if self.index is not None:
            check_integers("index", self.index, (samples,), np.iinfo(np.int64).max)
        for name in ("ids", "groups"):
            if as_names(name, getattr(self, name), samples) is not getattr(self, name):
                raise InputError(f"{name} are not a numpy array; make one of them")
        for name, values in {**self.curves, "loss_histogram": self.loss_histogram}.items():
            if values is not None and np.shape(values)[:1] != (epochs,):
                raise InputError(f"{name} is {np.shape(values)}; give a row for {epochs} epochs")
        if not isinstance(self.provenance, Mapping):
            raise InputError(f"provenance is a {type(self.provenance).__name__}; give a mapping")
        if self.probs is not None:
            expected = (len(self.kept), samples, self.classes)
            kind = getattr(self.probs, "dtype", np.dtype(object))
            if np.shape(self.probs) != expected or kind.kind != "f":
                problem = f"probs are {kind} of shape {np.shape(self.probs)}"
                raise InputError(f"{problem}; give floats of shape {expected}")
            if self.index is None:  # else a part of a record that was checked
                self._check_some()

    def _check_some(self) -> None:
        if self.probs is not None:
            every = 1 + math.prod(self.probs.shape) // _CHECKED
            _check_probs(self.probs[:, ::every], self.predicted[self.kept, ::every], self.kept)

    @classmethod
    def from_arrays(
        cls, probs: Any, labels: Any, *, ids: Any = None, groups: Any = None
    ) -> "RunRecord":
        """Make a record from the outputs of any framework.

        `probs` are class probabilities `[epochs, samples, classes]`, `labels` the true classes
        `[samples]`, from 0 to classes - 1; ids, groups and errors are as for `RunRecord`.

        >>> record = RunRecord.from_arrays(np.array([[[0.9, 0.1]], [[0.4, 0.6]]]), [0])
        >>> record.correct.tolist()
        [[True], [False]]
        """
        probs, labels = as_array(probs), as_array(labels)
        if probs.ndim != 3 or labels.shape != probs.shape[1:2] or 0 in probs.shape:
            shapes = f"probs {probs.shape} and labels {labels.shape}"
            raise InputError(f"{shapes}; give probs [epochs, samples, classes], labels [samples]")
        if probs.dtype.kind in "iub":
            probs = probs.astype(np.float64)
        elif probs.dtype.kind != "f":
            raise InputError(f"probs are {probs.dtype}; give floats")
        classes, kept = probs.shape[2], np.arange(len(probs))
        check_integers("labels", labels, labels.shape, classes)
        predicted = probs.argmax(axis=2).astype(np.int32)  # before float16 makes ties
        _check_probs(probs, predicted, kept)
        arrays = {"labels": labels.astype(np.int64), "predicted": predicted, "kept": kept}
        ids, groups = as_names("ids", ids, len(labels)), as_names("groups", groups, len(labels))
        return cls(**arrays, probs=probs, classes=classes, ids=ids, groups=groups)

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
        """The record of the samples `index`, marked as this half."""
        probs = self.probs
        if isinstance(probs, np.memmap) and probs.nbytes > _COPIED:
            probs = Columns(probs, index)
        elif probs is not None:
            probs = probs[:, index]
        return dataclasses.replace(
            self,
            labels=self.labels[index],
            predicted=self.predicted[:, index],
            probs=probs,
            half=half,
            index=index if self.index is None else self.index[index],
            ids=None if self.ids is None else self.ids[index],
            groups=None if self.groups is None else self.groups[index],
        )

    def split(self, seed: int) -> tuple["RunRecord", "RunRecord"]:
        """Draw a validation half, to select on, and a test half, to report on (papers, sec. 5).

        With ids or groups, a hash of the seed and these decides, so that the order of samples does
        not matter. A class of few samples may be in one half only. An `InputError` if this is
        already a half, or has fewer than two samples or groups.
        """
        if seed < 0:
            raise InputError(f"the split's seed is {seed}; give 0 or more")
        if seed and "keep_best" in self.provenance:  # test samples chose what was kept
            chosen = "checkpoints were kept by the validation half of split 0"
            raise InputError(f"split is {seed}, but {chosen}; leave the split at 0")
        if self.half != "all":
            raise InputError(f"this record is a {self.half} half already; split the whole record")
        if len(self.labels) < 2:
            raise InputError("one sample has no two halves; record more samples")
        names = self.ids if self.groups is None else self.groups
        if names is None:
            val, test = halves(len(self.labels), seed)
        else:
            part = _deal(names, 2, str(seed))
            test, val = np.flatnonzero(part == 0), np.flatnonzero(part == 1)
        return self.take(val, "val"), self.take(test, "test")

    def keep(self, epochs: Iterable[int] | np.ndarray) -> "RunRecord":
        """A lighter record with the probabilities of these epochs alone."""
        if self.probs is None:
            raise InputError("this record holds no probabilities; load the run's own folder")
        wanted = set(map(int, epochs))
        if lost := wanted - set(self.kept.tolist()):
            raise InputError(f"epoch {min(lost)} is not kept; kept are {self.kept.tolist()}")
        rows = np.flatnonzero(np.isin(self.kept, [*wanted]))
        return dataclasses.replace(self, kept=self.kept[rows], probs=np.asarray(self.probs[rows]))

    def final(self) -> "RunRecord":
        """The record of the last epoch alone."""
        hist = self.loss_histogram
        return dataclasses.replace(
            self.keep([self.epochs - 1]),
            predicted=self.predicted[-1:],
            kept=np.arange(1),
            curves={name: curve[-1:] for name, curve in self.curves.items()},
            loss_histogram=None if hist is None else hist[-1:],
        )

    def save(self, path: Path, *, light: bool = False, compress: bool = False) -> None:
        """Write one npz file, whole or not at all; `light` leaves out probabilities.

        Probabilities hardly compress: `compress` saves a tenth of them, and takes fifty times as
        long.
        """
        config = None if self.config is None else self.config.changes()
        about: dict[str, Any] = {"version": __version__, "config": config}
        about |= {"provenance": dict(self.provenance), "classes": self.classes}
        about |= {"half": self.half, "curves": list(self.curves)}
        predicted = self.predicted.astype(np.min_scalar_type(self.classes))
        arrays = {"labels": self.labels, "predicted": predicted, "kept": self.kept}
        arrays["curves"] = np.array([*self.curves.values()], dtype=np.float32)
        for name in ("loss_histogram", "index", "ids", "groups"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        if self.probs is not None and light:
            arrays["probs_checksum"] = checksums(self.probs)
        elif self.probs is not None:
            arrays["probs"] = np.asarray(self.probs, np.float16)
        about["arrays"] = [*arrays]  # a damaged zip directory can lose one without an error
        write_whole(Path(path), _npz(arrays, about, compress))

    @classmethod
    def load(cls, path: Path | str) -> "RunRecord":
        """Read a record from its file, or from a run's folder with its probabilities mapped.

        An `InputError` if there is none, or it is truncated, damaged or no record.
        """
        path = Path(path)
        file = path / "record.npz" if path.is_dir() else path
        if not file.exists() and (path / "config.json").exists():
            raise InputError(f"{path} is not finished; the same `fmn train` resumes it")
        if not file.exists():
            raise InputError(f"{file} does not exist; `fmn runs` lists the runs there are")
        try:
            require_file(file)
            with file.open("rb") as raw, np.load(raw, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}  # checks the CRC
                written = {info.filename[:-4]: info.CRC for info in stored.zip.infolist()}
            about = json.loads(str(arrays.pop("about")))
            if about["arrays"] != [*arrays]:
                raise ValueError("an array is missing")
            if any(written[name] != crc for name, crc in about.get("crc", {}).items()):
                raise ValueError("an array is not the one that was saved")
            curves = dict(zip(about["curves"], arrays.pop("curves"), strict=True))
            config = None if about["config"] is None else _read_config(about)
            probs, expected = arrays.pop("probs", None), arrays.pop("probs_checksum", None)
            if probs is None and (path / "probs.npy").exists():
                if not (path / "probs.npy").is_file():  # a pipe would hang
                    raise ValueError("probs.npy is not a file")
                probs = np.load(path / "probs.npy", mmap_mode="r", allow_pickle=False)
                if not np.array_equal(checksums(probs), expected):
                    raise ValueError("probs.npy is not what the record says that it is")
            if arrays["predicted"].dtype.kind == "u":  # as `save` makes it, as small as can be
                arrays["predicted"] = arrays["predicted"].astype(np.int32)
            fields = {name: about[name] for name in ("classes", "provenance", "half")}
            record = cls(**arrays, **fields, curves=curves, config=config, probs=probs)
            if record.index is not None:
                record._check_some()
            return record
        except Exception as error:  # zip, zlib, numpy and JSON raise a dozen kinds between them
            reason = str(error).partition("\n")[0] or type(error).__name__
            problem = f"{file} is damaged or is not a record ({reason})"
            raise InputError(f"{problem}; move it away and run again") from error


def _read_config(about: Mapping[str, Any]) -> RunConfig:
    """The config of a record; one of another version may have fields unknown to this one."""
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


def refuse_test(record: RunRecord, done: str = "selected") -> None:
    """Raise `InputError` for a test half, on which nothing may be chosen or estimated."""
    if record.half == "test":
        raise InputError(
            f"this is a test half: nothing may be {done} on it; give the validation half"
        )


def folds(record: RunRecord, number: int, seed: int) -> Int[np.ndarray, " samples"]:
    """The fold of each sample, 0 to number - 1, for cross-fitting; a group is in one of them.

    With ids or groups, at least `number` of them, the folds do not depend on the samples' order.

    >>> record = RunRecord.from_arrays(np.full((1, 4, 2), 0.5), [0, 1, 0, 1], groups=[7, 8, 7, 8])
    >>> folds(record, 2, seed=0).tolist()
    [0, 1, 0, 1]
    """
    names = record.ids if record.groups is None else record.groups
    if names is None and len(record.labels) < number:
        raise InputError(f"{len(record.labels)} samples do not make {number} parts; record more")
    if names is None:
        return np.random.default_rng(seed).permutation(len(record.labels)) % number
    return _deal(names, number, f"fold {seed}")


def _deal(names: np.ndarray, parts: int, salt: str) -> Int[np.ndarray, " samples"]:
    """Deal names in the order of their hashes, each to the part with the fewest samples so far."""
    unique, name_of, counts = np.unique(names, return_inverse=True, return_counts=True)
    if len(unique) < parts:
        raise InputError(f"{len(unique)} groups do not make {parts} parts; record more groups")

    def key(number: int) -> bytes:
        text = f"{salt}:{unique[number]}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=16).digest()

    part, filled = np.zeros(len(unique), np.int64), [0] * parts
    for number in sorted(range(len(unique)), key=key):
        part[number] = min(range(parts), key=filled.__getitem__)
        filled[part[number]] += int(counts[number])
    return part[name_of]


def as_array(values: Any) -> np.ndarray:
    """Convert a list, an array or a tensor of any framework to numpy, or raise `InputError`."""
    try:
        if hasattr(values, "detach"):  # a tensor of torch; numpy knows no bfloat16
            values = values.detach().cpu()
            short = values.is_floating_point() and values.dtype.itemsize < 4
            values = (values.float() if short else values).numpy()
        array = np.asarray(values)
        if array.dtype == object and all(isinstance(value, str) for value in array.flat):
            array = array.astype(str)  # pandas holds texts as objects
        if array.dtype == object:
            raise TypeError("it holds objects")
        return array
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        problem = f"a {type(values).__name__} is not an array ({str(error).partition(chr(10))[0]})"
        raise InputError(f"{problem}; give an array, a tensor or equal lists") from error


def as_names(what: str, values: Any, samples: int) -> np.ndarray | None:
    """Ids (unique) or groups as an array of one integer or string per sample; None stays None."""
    if values is None:
        return None
    names = as_array(values)
    if names.shape != (samples,) or names.dtype.kind not in "iuU":
        problem = f"{what} are {names.dtype} of shape {names.shape}"
        raise InputError(f"{problem}; give {samples} integers or texts, one a sample")
    if what == "ids" and len(set(names.tolist())) < samples:
        raise InputError("two samples have one id; give samples that belong together as groups")
    return names


def check_integers(name: str, values: Any, shape: tuple[int, ...], below: int) -> None:
    """Raise `InputError` unless this is an array of the shape, of integers from 0 to below - 1."""
    kind = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
        raise InputError(f"{name} are {kind}; give integers from 0 to {below - 1}")
    if values.shape != shape or values.ndim == 0:
        raise InputError(f"{name} are of shape {values.shape}; give {shape or 'one dimension'}")
    if values.size and (values.min() < 0 or values.max() >= below):
        span = f"{name} run from {values.min()} to {values.max()}"
        shifted = name == "labels" and (values.min(), values.max()) == (1, below)
        hint = "; they count from 0, so give labels - 1" if shifted else ""
        raise InputError(f"{span}; allow 0 to {below - 1}{hint}")


def _check_probs(probs: np.ndarray, predicted: np.ndarray, kept: np.ndarray) -> None:
    for epoch, rows, classes in zip(kept, probs, predicted, strict=True):
        # 0.01 is allowed; rounding to float16 adds up to 0.0005.
        if not (rows >= 0).all() or abs(rows.sum(axis=1, dtype=np.float64) - 1).max() > 0.011:
            faults = f"epoch {epoch} are not finite, negative or not of sum 1"
            raise InputError(f"the probabilities of {faults}; apply a softmax, look for NaN")
        largest = rows.max(axis=1)
        if (rows[np.arange(len(rows)), classes] < largest * (1 - 2**-10)).any():  # half precision
            problem = f"predicted classes of epoch {epoch} are not those of its probabilities"
            raise InputError(f"{problem}; give both of the same epochs, in the same order")


def checksums(probs: np.ndarray | Columns) -> np.ndarray:
    """One checksum for the probabilities of each epoch."""
    rows = (np.ascontiguousarray(probs[row], np.float16) for row in range(len(probs)))
    return np.array([zlib.crc32(row.data) for row in rows], np.int64)


def _npz(arrays: dict[str, np.ndarray], about: dict[str, Any], compress: bool) -> memoryview:
    """The bytes of an npz file that numpy can read, a fifth smaller than its own, without dates.

    Its last member, `about`, holds the metadata and the CRC of the other members.
    """
    buffer, crc = io.BytesIO(), dict[str, int]()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in (*arrays, "about"):
            last = name == "about"
            array = np.array(json.dumps(about | {"crc": crc})) if last else arrays[name]
            info = zipfile.ZipInfo(f"{name}.npy")
            info.file_size = array.nbytes + 4096  # for zip64, where it is needed
            stored = name == "probs" and not compress
            info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_LZMA
            with file.open(info, "w") as member:
                np.save(member, array, allow_pickle=False)
            crc[name] = info.CRC
    return buffer.getbuffer()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The score of one method on the test half of one run; one line of JSON on disk."""

    item: str  #: Notebook or experiment that it belongs to, such as label_noise
    setting: str  #: Noise in short, such as sym40
    method: str  #: Name of the method, such as kf
    seed: int  #: Training seed
    split_seed: int  #: Seed of the split into validation and test half
    accuracy: float  #: From 0 to 1
    nll: float  #: Negative log-likelihood, nats per sample
    ece: float  #: Expected calibration error, from 0 to 1
    networks: int  #: Networks evaluated for one prediction
    train_seconds: float  #: Wall time of all training that the method needs
