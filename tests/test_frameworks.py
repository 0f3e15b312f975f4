"""The callbacks, in the real frameworks, on real digits."""

import logging

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers import (
    Trainer as HFTrainer,
)

from fmnlib import fusion
from fmnlib.config import InputError
from fmnlib.diagnosis import diagnose
from fmnlib.fusion import knowledge_fusion
from fmnlib.integrations import huggingface, lightning
from fmnlib.tracker import Tracker
from fmnlib.weights import load_weights, read_state_dict


@pytest.fixture(scope="module")
def digits():
    """Training images, labels of which 40% are wrong, validation images and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels, draw = torch.tensor(labels), torch.Generator().manual_seed(0)
    given = labels[:300].clone()
    wrong = torch.rand(300, generator=draw) < 0.4
    given[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=draw)
    return images[:300], given, images[300:1100], labels[300:1100]


# ---------------------------------------------------------------- Lightning


class Perceptron(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)]
        self.net = nn.Sequential(*layers)

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 3e-3)


def lightning_fit(root, epochs, callbacks, data, resume=None):
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = dict.fromkeys(
        ("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False
    )
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=root, callbacks=callbacks, **quiet
    )
    torch.manual_seed(1)
    model = Perceptron()
    trainer.fit(model, DataLoader(TensorDataset(*data), 50, shuffle=True), ckpt_path=resume)
    return trainer, model


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightning(tmp_path, digits):
    images, given, val, labels = digits
    callback = lightning.RecordEpochs(
        tmp_path / "tracked", DataLoader(TensorDataset(val, labels), 100)
    )
    trainer, model = lightning_fit(tmp_path, 30, [callback], (images, given))
    record = callback.record()
    assert record.epochs == 30
    np.testing.assert_array_equal(record.predicted[-1], model(val).argmax(1))
    assert diagnose(record).forget.low > 0
    half, test = record.split(0)
    kf = knowledge_fusion(half)
    assert fusion.accuracy(test, kf) > fusion.accuracy(test, fusion.single(test)) + 0.03
    # Its checkpoints are those of the inner network as well.
    stored = sorted((tmp_path / "tracked" / "checkpoints").iterdir())
    network = load_weights(Perceptron().net, read_state_dict(stored[11]))
    np.testing.assert_array_equal(network(val).argmax(1), record.predicted[11])
    # Watching changes no weight.
    _, alone = lightning_fit(tmp_path, 30, [], (images, given))
    for name, value in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    # A training that goes on goes on in the folder.
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = lightning.RecordEpochs(tmp_path / "tracked", callback.batches)
    lightning_fit(tmp_path, 32, [again], (images, given), tmp_path / "last.ckpt")
    assert again.record().epochs == 32
    np.testing.assert_array_equal(again.record().predicted[:30], record.predicted)
    with pytest.raises(InputError, match="holds 32 epochs and start is 0"):
        lightning_fit(tmp_path, 1, [again], (images, given))
    # One that goes on from an earlier epoch loses what came after it only if it is told to.
    with pytest.raises(
        InputError, match="holds 32 epochs and start is 30: 2 of them would be lost"
    ):
        lightning_fit(tmp_path, 31, [again], (images, given), tmp_path / "last.ckpt")
    assert again.record().epochs == 32
    options = {"overwrite": True, "outputs": "logits"}
    other = lightning.RecordEpochs(tmp_path / "tracked", callback.batches, **options)
    lightning_fit(tmp_path, 31, [other], (images, given), tmp_path / "last.ckpt")
    assert other.record().epochs == 31


# ---------------------------------------------------------------- Hugging Face


def resnet():
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(num_channels=1, layer_type="basic", num_labels=10, **sizes)
    )


def rows(images, labels):
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels)]


def hf_train(root, epochs, callbacks, data, resume=None, save="no"):
    arguments = TrainingArguments(
        output_dir=str(root),
        num_train_epochs=epochs,
        per_device_train_batch_size=50,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy=save,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=0,
    )
    model = resnet()
    trainer = HFTrainer(model, arguments, train_dataset=rows(*data), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize(
    ("epoch", "start"), [(None, 0), (0.6, 0), (1.6, 1), (2.0, 2), (2.9999999, 3)]
)
def test_hugging_face_goes_on_from_within_an_epoch(tmp_path, digits, epoch, start):
    _, _, val, labels = digits
    tracker = Tracker(tmp_path, labels.tolist())
    for _ in range(start):
        tracker.note(np.eye(10)[labels])
    batches = DataLoader(rows(val, labels), 200, collate_fn=default_data_collator)
    callback = huggingface.RecordEpochs(tmp_path, batches)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback.on_train_begin(arguments, TrainerState(epoch=epoch), TrainerControl())
    assert callback.watch.tracker.epochs == start


def test_hugging_face_notes_no_epoch_twice(tmp_path, digits):
    _, _, val, labels = digits
    batches = DataLoader(rows(val, labels), 200, collate_fn=default_data_collator)
    ids = [f"{label}/{n}.png" for n, label in enumerate(labels)]
    callback = huggingface.RecordEpochs(tmp_path / "tracked", batches, ids=ids)
    arguments, control = (
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True),
        TrainerControl(),
    )
    callback.on_train_begin(arguments, TrainerState(epoch=0), control)
    for epoch in (1.0, 1.9999999, 2.4):  # the last one ends by `max_steps`
        callback.on_epoch_end(arguments, TrainerState(epoch=epoch), control, model=resnet())
    with pytest.raises(InputError, match="epoch 2 is noted, but it is the turn of epoch 3"):
        callback.on_epoch_end(arguments, TrainerState(epoch=3.0), control, model=resnet())
    assert callback.record().ids.tolist() == ids


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_hugging_face(tmp_path, digits):
    images, given, val, labels = digits
    batches = DataLoader(rows(val, labels), 200, collate_fn=default_data_collator)
    callback = huggingface.RecordEpochs(tmp_path / "tracked", batches)
    model = hf_train(tmp_path / "out", 6, [callback], (images, given), save="epoch")
    record = callback.record()
    assert record.epochs == 6
    with torch.no_grad():
        final = model.eval()(pixel_values=val).logits.argmax(1)
    np.testing.assert_array_equal(record.predicted[-1], final)
    assert record.accuracy.max() > 0.3
    np.testing.assert_array_equal(record.labels, labels)
    # The Trainer's own checkpoints hold the same networks.
    own = sorted(
        (tmp_path / "out").glob("checkpoint-*/model.safetensors"), key=lambda p: len(str(p))
    )
    assert len(own) == 6
    alone = hf_train(tmp_path / "alone", 6, [], (images, given))
    for name, value in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    again = huggingface.RecordEpochs(tmp_path / "tracked", batches)
    resume = str(tmp_path / "out" / "checkpoint-36")
    hf_train(tmp_path / "out", 8, [again], (images, given), resume)
    assert again.record().epochs == 8
    np.testing.assert_array_equal(again.record().predicted[:6], record.predicted)
