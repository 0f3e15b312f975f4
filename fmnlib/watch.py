"""Record a torch model during training: its outputs on fixed batches and its weights, by epoch.

The callbacks for Lightning and for Hugging Face's Trainer use it after each training epoch.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmnlib.config import InputError
from fmnlib.record import RunRecord, as_array
from fmnlib.tracker import Tracker, load_tracked


class Watch:
    """A tracker that runs the model itself, on the same batches after each epoch.

    Args:
        folder: Folder of the record and the checkpoints.
        batches: The validation data, the same in every pass and never shuffled: pairs
            `(inputs, labels)`, or mappings that hold "labels" beside the model's arguments.
        **options: As in `Tracker`.

    >>> import tempfile
    >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> watch = Watch(tempfile.mkdtemp() + "/tracked", batches)
    >>> watch.note(nn.Identity())
    1.0
    """

    def __init__(self, folder: Path | str, batches: Iterable[Any], **options: Any) -> None:
        if isinstance(batches, Iterator):
            kind = type(batches).__name__
            raise InputError(f"batches are a {kind}, read once; give a DataLoader or a list")
        self.batches = batches
        self.tracker = Tracker(folder, labels_of(batches), **options)

    def note(self, model: nn.Module, *, epoch: int | None = None) -> float:
        """Record an epoch: outputs, and the weights as a checkpoint; return the accuracy.

        An `InputError` if the batches come in another order than before, or as in `Tracker.note`.
        """
        logits, labels = predict_batches(model, self.batches)
        if not torch.equal(labels, torch.from_numpy(self.tracker.labels)):
            raise InputError("the batches come in another order each time; use shuffle=False")
        return self.tracker.note(logits, model.state_dict(), epoch=epoch)


class WatchCallback:
    """Base class of the callbacks that record every epoch; the arguments are those of `Watch`."""

    watch: Watch | None = None  # stays None in all processes but the first

    def __init__(self, folder: Path | str, batches: Iterable[Any], **options: Any) -> None:
        self.folder, self.batches, self.options = folder, batches, options

    def record(self) -> RunRecord:
        """The record of the epochs so far."""
        return load_tracked(self.folder)


@torch.no_grad()
def predict_batches(model: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Logits `[samples, classes]` and labels `[samples]` on the CPU, in evaluation mode.

    The model returns logits, or an object with `.logits`, as Hugging Face's models do. Its modes
    and torch's random state are restored, so that watching changes nothing in a training.
    """
    modes = {module: module.training for module in model.modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    logits, labels = [], []
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws, even if it does not shuffle
            for batch in batches:
                logits.append(forward(model, batch, device).float().cpu())
                labels.append(_labels(batch))
    finally:
        model.train(modes[model])  # some layers do more than set a flag, such as LoRA's
        for module, training in modes.items():
            module.training = training
    return torch.cat(logits), torch.from_numpy(np.concatenate(labels).astype(np.int64))


def forward(model: nn.Module, batch: Any, device: torch.device) -> Tensor:
    """The logits of a batch: a pair `(inputs, labels)`, or a mapping of the model's arguments."""
    if isinstance(batch, Mapping):
        outputs = model(**{k: _like(v, model, device) for k, v in batch.items() if k != "labels"})
    else:
        outputs = model(_like(batch[0], model, device))
    return getattr(outputs, "logits", outputs)


def _like(inputs: Tensor, model: nn.Module, device: torch.device) -> Tensor:
    """Inputs on a device; floats are converted to the number format of the model's weights."""
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), inputs.dtype)
    return inputs.to(device, kind if inputs.is_floating_point() else inputs.dtype)


def labels_of(batches: Iterable[Any]) -> np.ndarray:
    """The labels of all batches, in order."""
    with torch.random.fork_rng(devices=[]):
        parts = [_labels(batch) for batch in batches]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _labels(batch: Any) -> np.ndarray:
    if isinstance(batch, Mapping) and "labels" in batch:
        labels = as_array(batch["labels"])
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        labels = as_array(batch[1])
    else:
        content = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(f"a batch is {content}; give (inputs, labels) or a mapping with 'labels'")
    if labels.ndim != 1:
        raise InputError(f"labels of a batch are of shape {labels.shape}; give one class a sample")
    return labels
