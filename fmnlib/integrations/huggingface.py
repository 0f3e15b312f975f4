"""A callback of Hugging Face's Trainer that records every epoch; extra `huggingface`."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fmnlib.watch import Watch, WatchCallback


class RecordEpochs(WatchCallback, TrainerCallback):
    """Keep the model's outputs on `batches` and its weights after every training epoch.

    A training resumed from the Trainer's own checkpoint continues the record in the folder. If
    several processes train, the first one records.

    The arguments are as in `Watch`; batches are mappings that hold "labels" beside the model's
    arguments, such as `DataLoader(dataset, 64, collate_fn=default_data_collator)`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Open the folder, at the epoch that training starts from."""
        if state.is_world_process_zero:
            start = int((state.epoch or 0) + 1e-6)  # a checkpoint may lie within an epoch
            self.watch = Watch(self.folder, self.batches, start=start, **self.options)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Record the epoch."""
        if self.watch is not None:
            epoch = math.ceil((state.epoch or 0) - 1e-6) - 1  # max_steps may end within an epoch
            self.watch.note(rest["model"], epoch=epoch)
