"""A Lightning callback that records every epoch; extra `lightning`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fmnlib.record import RunRecord
from fmnlib.tracker import load_tracked
from fmnlib.watch import Watch


class RecordEpochs(Callback):
    """Keep the module's outputs on `batches` and its weights after every training epoch.

    A training that goes on from Lightning's own checkpoint goes on in the folder as well. Where
    several processes train, the first one records.

    Args:
        folder: Where the record and the checkpoints lie; `fmn score FOLDER` reads it.
        batches: Pairs `(inputs, labels)`, such as a DataLoader that does not shuffle. The
            module's `forward` takes the inputs and returns logits.
    """

    def __init__(self, folder: Path | str, batches: Iterable[Any]) -> None:
        self.folder, self.batches = folder, batches
        self.watch: Watch | None = None

    def record(self) -> RunRecord:
        """The record of the epochs so far."""
        return load_tracked(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the folder, at the epoch that training starts from."""
        if trainer.is_global_zero:
            self.watch = Watch(self.folder, self.batches, start=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down the epoch."""
        if self.watch is not None:
            self.watch.note(pl_module)
