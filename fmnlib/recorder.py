"""Record a run: collect its numbers, write its files in the background, note its provenance."""

import dataclasses
import functools
import math
import os
import platform
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmnlib import checkpoint
from fmnlib.config import InputError, RunConfig
from fmnlib.data import DataSet, load
from fmnlib.files import new_part, require_file, sync, write_whole
from fmnlib.models import number_format
from fmnlib.record import LOSS_EDGES, RunRecord, checksums, halves
from fmnlib.scores import covering

WriteJob = Callable[[], Callable[[], None]]
"""Computes the content of files, and returns a function that writes them."""

CURVES = ("train_loss", "train_accuracy", "memorised", "lr", "eval_loss", "seconds")


@dataclasses.dataclass(frozen=True)
class EpochOutputs:
    """What an epoch of training yields, on the CPU."""

    logits: Tensor  #: Logits of the evaluation images, `[samples, classes]`
    losses: Tensor  #: Loss of each training sample in its last step
    right: Tensor  #: Which training samples were predicted as their label, even a wrong one
    lr: float  #: Learning rate of the last step
    seconds: float  #: Time that the epoch took


class Recorder:
    """The growing record of one run; probabilities are written to a file, one row per kept epoch.

    The layers of `model` determine which weights its checkpoints store in half precision.
    """

    def __init__(self, config: RunConfig, folder: Path, data: DataSet, model: nn.Module) -> None:
        epochs, samples = config.epochs, len(data.eval_labels)
        every = np.arange(config.keep_every - 1, epochs, config.keep_every)
        every = np.array(config.keep) if config.keep else every[every >= config.tail_epoch]
        self.config, self.folder, self.device = config, folder, data.device
        self._probs = folder / "probs.npy"
        self.classes = data.classes
        self.flipped, self.eval_labels = data.flipped.cpu(), data.eval_labels.cpu()
        self.kept = np.union1d(every, [epochs - 1])
        self.predicted = np.zeros((epochs, samples), np.int32)
        self.curves = {name: np.full(epochs, np.nan, np.float32) for name in CURVES}
        self.checksums = np.zeros(len(self.kept), np.int64)
        self.histogram = np.zeros((epochs, 2, len(LOSS_EDGES) - 1), np.int64)
        self._dtype = number_format(config.precision, data.device)
        self._rounded = checkpoint.rounded_by_autocast(model) if self._dtype.itemsize == 2 else ()
        tensors = [*model.named_parameters(), *model.named_buffers()]
        weights = sum(t.nbytes // (2 if name in self._rounded else 1) for name, t in tensors)
        shape, most = (len(self.kept), samples, data.classes), config.keep_best or len(self.kept)
        states = 2 * 3 * sum(t.nbytes for _, t in tensors)  # of weights, momentum and average
        probs = 2 * math.prod(shape)  # in half precision
        self.disk = weights * min(most, len(self.kept)) + states + probs  #: Bytes that a run takes
        _allocate_probs(self._probs, shape, self.disk)

    def writing(self, epoch: int, outputs: EpochOutputs, tensors: dict[str, Tensor]) -> WriteJob:
        """The job of writing an epoch to disk, with copies of tensors as `snapshot` makes them."""

        def write() -> Callable[[], None]:
            self.note(epoch, outputs)
            files: list[tuple[Path, bytes]] = []
            state = {name: tensor.cpu() for name, tensor in tensors.items()}
            if epoch in self.kept:
                own, average = (checkpoint.strip_prefix(state, n) for n in ("model.", "ema."))
                weights = checkpoint.rounded(average or own, self._rounded, self._dtype)
                content = checkpoint.pack(weights)
                files.append((checkpoint.checkpoint_path(self.folder, epoch), content))
            state |= {f"record.{name}": value for name, value in self.tensors().items()}
            files.append(checkpoint.pack_state(self.folder, state, epoch))
            return lambda: self._end_epoch(epoch, files)

        return write

    def note(self, epoch: int, outputs: EpochOutputs) -> None:
        """Record an epoch; an `InputError` if a loss or an output is not finite."""
        for what, values in (("the loss", outputs.losses), ("an output", outputs.logits)):
            if not torch.isfinite(values).all():
                problem = f"{what} of epoch {epoch} is not finite"
                raise InputError(
                    f"{problem}; lower lr, now {self.config.lr}, and use a new folder"
                )
        probs = outputs.logits.softmax(1)
        self.predicted[epoch] = probs.argmax(1).numpy()  # before float16 makes ties
        if epoch in self.kept:
            self._write_row(int(np.searchsorted(self.kept, epoch)), probs.numpy())
        memorised = outputs.right[self.flipped].float().mean() if self.flipped.any() else torch.nan
        eval_loss = F.cross_entropy(outputs.logits, self.eval_labels)
        means = outputs.losses.mean(), outputs.right.float().mean(), memorised
        numbers = *means, outputs.lr, eval_loss, outputs.seconds
        for name, number in zip(CURVES, numbers, strict=True):
            self.curves[name][epoch] = float(number)
        for kind, chosen in enumerate((~self.flipped, self.flipped)):
            self.histogram[epoch, kind] = np.histogram(outputs.losses[chosen], LOSS_EDGES)[0]

    def tensors(self) -> dict[str, Tensor]:
        """The record so far as tensors, stored in the state that a restart resumes from."""
        arrays = {name: getattr(self, name) for name in ("predicted", "histogram", "checksums")}
        arrays |= {f"curve.{name}": curve for name, curve in self.curves.items()}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def restore(self, tensors: Mapping[str, Tensor], epoch: int) -> None:
        """Restore what `tensors` returned after an epoch; an `InputError` if files differ."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self._check(int((self.kept <= epoch).sum()))

    def finish(self) -> None:
        """Write the record, which completes the run; an `InputError` if files differ."""
        self._check(len(self.kept))
        source = provenance(self.device, float(self.curves["seconds"].sum()))
        source |= {"keep_best": self.config.keep_best} if self.config.keep_best else {}
        record = RunRecord(
            labels=self.eval_labels.numpy(),
            predicted=self.predicted,
            kept=self.kept,
            probs=np.load(self._probs, mmap_mode="r", allow_pickle=False),
            classes=self.classes,
            curves=self.curves,
            loss_histogram=self.histogram,
            config=self.config,
            provenance=source,
        )
        if not self.config.keep_best:
            record.save(self.folder / "record.npz", light=True)
            return
        record.keep(self._leave_best(self.config.epochs)).save(self.folder / "record.npz")

    def _end_epoch(self, epoch: int, files: list[tuple[Path, bytes]]) -> None:
        """Flush the row of probabilities to disk, then write the checkpoint, then the state."""
        if epoch in self.kept:
            sync(self._probs)
        for path, content in files:
            write_whole(path, content)
        if self.config.keep_best:  # delete a checkpoint only after its successor is on disk
            self._leave_best(epoch + 1)

    def _leave_best(self, epochs: int) -> list[int]:
        """Delete checkpoints of the first `epochs` that `keep_best` drops; return those kept."""
        labels = self.eval_labels.numpy()
        val = halves(len(labels), 0)[0]
        best = covering(
            self.predicted[:epochs, val] == labels[val], self.config.keep_best
        ).tolist()
        for gone in set(range(epochs)).difference(best):
            checkpoint.checkpoint_path(self.folder, gone).unlink(missing_ok=True)
        return best

    def _check(self, rows: int) -> None:
        probs = np.load(self._probs, mmap_mode="r", allow_pickle=False)
        if not np.array_equal(checksums(probs[:rows]), self.checksums[:rows]):
            problem = f"{self._probs} is not what was written"
            raise InputError(f"{problem}; move {self.folder.name} away and run again")

    def _write_row(self, row: int, probs: np.ndarray) -> None:
        """Write a row by file I/O: with a memory map, a full disk would crash the process."""
        content = probs.astype(np.float16).tobytes()
        self.checksums[row] = zlib.crc32(content)
        with self._probs.open("r+b") as file:
            file.seek((row - len(self.kept)) * len(content), os.SEEK_END)
            file.write(content)


class Background:
    """Runs write jobs while the next epoch trains, one at a time, so that memory stays bounded.

    `do` waits for the previous job, and raises its error. On a GPU the whole job runs in the
    background, on its own CUDA stream, after the work queued so far. On a CPU that would take
    cores from training: there a job computes at once, and only its writing is in the background.

    >>> with Background(torch.device("cpu")) as background:
    ...     background.do(lambda: lambda: print("written"))
    written
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def do(self, job: WriteJob) -> None:
        """Wait for the last job, then start this one."""
        self.wait()
        write = job() if self._stream is None else self._on_stream(job, self._stream)
        self._last = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until everything is done, and raise what went wrong."""
        if self._last is not None:
            self._last.result()

    def _on_stream(self, job: WriteJob, stream: torch.cuda.Stream) -> Callable[[], None]:
        queued = torch.cuda.Event()
        queued.record(torch.cuda.current_stream(stream.device))

        def run() -> None:
            with torch.cuda.stream(stream):
                queued.wait(stream)
                job()()

        return run

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()  # an epoch that is being written is written to its end


def load_or_create(
    config: RunConfig, folder: Path, device: torch.device, make: Callable[[DataSet], RunRecord]
) -> RunRecord:
    """Load the record in a folder; if there is none yet, create it with `make`."""
    with checkpoint.run_lock(config, folder):
        if not (folder / "record.npz").exists():
            started = time.perf_counter()
            record = make(load(config, device))
            source = provenance(device, time.perf_counter() - started)
            record = dataclasses.replace(record, config=config, provenance=source)
            record.save(folder / "record.npz")
        return RunRecord.load(folder)


def provenance(device: torch.device, seconds: float) -> dict[str, Any]:
    """Where numbers come from: day, commit, versions, hardware, wall time; no paths, no names."""
    commit, changed = _commit()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "changed": changed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": gpu or f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
    }


@functools.cache
def _commit() -> tuple[str, bool]:
    """The commit of the library's checkout, if it has one, and whether files differ from it."""

    def git(*arguments: str) -> str:
        here, command = Path(__file__).parent, ("git", *arguments)
        try:
            output = subprocess.check_output(command, cwd=here, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return output.decode().strip()

    if not git("ls-files", "__init__.py"):  # it is installed, maybe inside another repository
        return "", False
    return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "--", "."))


def _allocate_probs(path: Path, shape: tuple[int, ...], needed: int) -> None:
    """Create the file of probabilities of a new run; check and keep that of a resumed run.

    An `InputError` if the disk has fewer than `needed` bytes free for a new run.
    """
    if path.exists():
        try:
            require_file(path)
            stored = np.load(path, mmap_mode="r", allow_pickle=False).shape
            if stored != shape:
                raise ValueError(f"its shape is {stored}, not {shape}")
        except (OSError, ValueError, EOFError) as error:
            problem = f"{path} cannot be read ({error})"
            raise InputError(f"{problem}; move {path.parent.name} away and run again") from error
        return
    if (free := shutil.disk_usage(path.parent).free) < needed:
        problem = f"the run takes {needed / 1e9:.1f} GB on the disk"
        remedy = "keep fewer epochs, or free space on the disk of the run"
        raise InputError(f"{problem} and {free / 1e9:.1f} GB are free; {remedy}")
    part = new_part(path)
    np.lib.format.open_memmap(part, "w+", np.float16, shape).flush()
    part.replace(path)
