"""A Lightning callback that records every epoch; extra `lightning`."""

from lightning.pytorch import Callback, LightningModule, Trainer

from fmnlib.watch import Watch, WatchCallback


class RecordEpochs(WatchCallback, Callback):
    """Keep the module's outputs on `batches` and its weights after every training epoch.

    A training resumed from Lightning's own checkpoint continues the record in the folder. If
    several processes train, the first one records.

    The arguments are as in `Watch`; batches are pairs `(inputs, labels)`, such as a DataLoader
    that does not shuffle. The module's `forward` takes the inputs and returns logits.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the folder, at the epoch that training starts from."""
        if trainer.is_global_zero:
            start = trainer.current_epoch
            self.watch = Watch(self.folder, self.batches, start=start, **self.options)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch."""
        if self.watch is not None:
            self.watch.note(pl_module, epoch=trainer.current_epoch)
