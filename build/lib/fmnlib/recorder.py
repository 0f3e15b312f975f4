"""What a run writes down after every epoch, and where it came from."""

import functools
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fmnlib.config import InputError, RunConfig
from fmnlib.data import DataSet
from fmnlib.record import LOSS_EDGES, RunRecord

__all__ = ["Recorder", "provenance"]

CURVES = ("train_loss", "train_accuracy", "memorised", "lr", "eval_loss", "seconds")


class Recorder:
    """The growing record of one run; probabilities go straight to a mapped file.

    Args:
        config: The run.
        folder: Its folder.
        data: Its data.
    """

    def __init__(self, config: RunConfig, folder: Path, data: DataSet) -> None:
        epochs, samples = config.epochs, len(data.eval_labels)
        every = np.arange(config.keep_every - 1, epochs, config.keep_every)
        every = every[every >= config.tail_epoch]
        self.config, self.folder, self.data = config, folder, data
        self.kept = np.union1d(every, [epochs - 1])
        self.predicted = np.zeros((epochs, samples), np.int32)
        self.curves = {name: np.full(epochs, np.nan, np.float32) for name in CURVES}
        self.histogram = np.zeros((epochs, 2, len(LOSS_EDGES) - 1), np.int64)
        self.probs = _map(folder / "probs.npy", (len(self.kept), samples, data.classes))

    def note(self, epoch: int, logits: Tensor, losses: Tensor, right: Tensor, lr: float) -> None:
        """Write down an epoch.

        Args:
            epoch: Its number.
            logits: Of the evaluation images, `[samples, classes]`.
            losses: Of the training samples, as they were seen in the epoch.
            right: Which training samples were given their label, right or wrong as it may be.
            lr: Learning rate of the last step.

        Raises:
            InputError: If a loss is not finite.
        """
        if not torch.isfinite(losses).all():
            told = f"the loss of epoch {epoch} is not finite"
            raise InputError(f"{told}; lower lr, now {self.config.lr}, and use a new folder")
        probs = logits.softmax(1)
        self.predicted[epoch] = probs.argmax(1).cpu().numpy()  # before float16 makes ties
        if epoch in self.kept:
            row = np.searchsorted(self.kept, epoch)
            self.probs[row] = probs.cpu().numpy().astype(np.float16)
            self.probs.flush()
        flipped = self.data.flipped
        eval_loss = F.cross_entropy(logits, self.data.eval_labels)
        memorised = right[flipped].float().mean() if flipped.any() else torch.nan
        numbers = (losses.mean(), right.float().mean(), memorised, lr, eval_loss)
        for name, number in zip(CURVES, numbers, strict=False):
            self.curves[name][epoch] = float(number)
        for kind, chosen in enumerate((~flipped, flipped)):
            self.histogram[epoch, kind] = np.histogram(losses[chosen].cpu(), LOSS_EDGES)[0]

    def accuracy(self, epoch: int) -> float:
        """Accuracy after an epoch."""
        return float((self.predicted[epoch] == self.data.eval_labels.cpu().numpy()).mean())

    def tensors(self) -> dict[str, Tensor]:
        """The record so far, for the state that a restart finds again."""
        arrays = {"predicted": self.predicted, "histogram": self.histogram}
        arrays |= {f"curve.{name}": curve for name, curve in self.curves.items()}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def finish(self) -> RunRecord:
        """Write the record; the run is complete once it is there."""
        record = RunRecord(
            labels=self.data.eval_labels.cpu().numpy(),
            predicted=self.predicted,
            kept=self.kept,
            probs=self.probs,
            classes=self.data.classes,
            curves=self.curves,
            loss_histogram=self.histogram,
            config=self.config,
            provenance=provenance(self.data.images.device, float(self.curves["seconds"].sum())),
        )
        record.save(self.folder / "record.npz", light=True)
        return RunRecord.load(self.folder)


def provenance(device: torch.device, seconds: float) -> dict[str, Any]:
    """Where numbers come from: commit, versions, hardware and wall time; no paths, no names."""
    commit, changed = _commit()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
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
    """The commit of the checkout that this library lies in, and whether files differ from it."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        try:
            done = subprocess.run(("git", *words), cwd=here, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.decode().strip()

    return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "--", "."))


def _map(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """Open the file of probabilities of a run that goes on, or lay out a new one."""
    if path.exists():
        found = np.load(path, mmap_mode="r+", allow_pickle=False)
        if found.shape == shape and isinstance(found, np.memmap):
            return found
        raise InputError(f"{path} is of shape {found.shape}, not {shape}; move it away")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    np.lib.format.open_memmap(part, "w+", np.float16, shape).flush()
    part.replace(path)
    return _map(path, shape)
