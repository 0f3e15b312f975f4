import copy
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fmnlib import InputError, RunConfig, images, knowledge_fusion, training
from fmnlib.checkpoint import checkpoint_path, load_tensors, save_tensors
from fmnlib.config import Paused
from fmnlib.data import load
from fmnlib.distillation import distill, members_of, student_config
from fmnlib.record import LOSS_EDGES
from fmnlib.scores import covering
from fmnlib.step import _update_ema
from fmnlib.training import build_model, learning_rate, predict, train

SMALL = RunConfig(noise="symmetric", noise_rate=0.2, train_samples=200, eval_samples=50, epochs=4)


def run(config, folder, **options):
    return train(config, folder, device="cpu", progress=False, **options)


def assert_same_records(one, two):
    np.testing.assert_array_equal(one.predicted, two.predicted)
    np.testing.assert_array_equal(one.probs, two.probs)
    np.testing.assert_array_equal(one.loss_histogram, two.loss_histogram)
    for name in set(one.curves) - {"seconds"}:
        np.testing.assert_array_equal(one.curves[name], two.curves[name])


def test_the_record_is_what_the_checkpoints_predict(tmp_path):
    record = run(SMALL, tmp_path)
    data = load(SMALL)
    for epoch in range(4):
        model = build_model(SMALL, data)
        model.load_state_dict(load_tensors(checkpoint_path(tmp_path, epoch)))
        probs = predict(model, data, data.eval_images).softmax(1).numpy()
        np.testing.assert_array_equal(record.predicted[epoch], probs.argmax(1))
        np.testing.assert_allclose(record.probs[epoch], probs, atol=1e-3)
    assert (record.loss_histogram.sum(axis=(1, 2)) == 200).all()
    assert (record.loss_histogram[:, 1].sum(axis=1) == 40).all()
    assert len(LOSS_EDGES) - 1 == record.loss_histogram.shape[2]


def test_a_network_learns_the_digits(tmp_path):
    record = run(RunConfig(epochs=5), tmp_path)
    assert record.accuracy[-1] > 0.95
    assert record.curves["train_loss"][-1] < record.curves["train_loss"][0]
    assert np.isnan(record.curves["memorised"]).all()  # no label is wrong


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw", "lr": 1e-3},
        {"ema": 0.9},
        {"augment": "crop_flip"},
        {"loss": "elr"},
        {"loss": "sat", "loss_parameters": (0.9, 0.0)},
        {"loss": "ps_kd"},
    ],
    ids=["sgd", "adamw", "ema", "augmented", "elr", "sat", "ps_kd"],
)
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(tmp_path, changes, dying):
    config = dataclasses.replace(SMALL, **changes)
    whole = run(config, tmp_path / "whole")

    with dying():
        run(config, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "record.npz").exists()
    assert_same_records(whole, run(config, tmp_path / "stopped"))


def training_process(config, folder):
    """A process of its own that trains a run, with one thread: their number changes rounding."""
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path; from fmnlib import RunConfig\n"
        "from fmnlib.training import train\n"
        f"config = RunConfig.from_dict({config.changes()!r})\n"
        f"train(config, Path({str(folder)!r}), device='cpu', progress=False)"
    )
    return subprocess.Popen([sys.executable, "-W", "error", "-c", script])


def test_a_process_that_is_killed_goes_on_with_the_same_bits(tmp_path):
    config = dataclasses.replace(SMALL, epochs=30)
    process = training_process(config, tmp_path / "a")
    while not checkpoint_path(tmp_path / "a", 3).exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a" / "record.npz").exists()
    assert_same_records(run(config, tmp_path / "a"), run(config, tmp_path / "b"))


def test_two_processes_on_one_run_do_not_meet(tmp_path):
    both = [training_process(SMALL, tmp_path / "a") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert_same_records(run(SMALL, tmp_path / "a"), run(SMALL, tmp_path / "b"))


def test_training_leaves_cudnn_on(tmp_path):
    seen = []

    def loss(logits, batch):
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark))
        return logits.square().sum(1)

    run(dataclasses.replace(SMALL, epochs=1), tmp_path, criterion=loss)
    assert set(seen) == {(True, True)}


def test_kept_epochs_end_with_the_last(tmp_path):
    record = run(dataclasses.replace(SMALL, epochs=5, keep_every=2), tmp_path)
    assert record.kept.tolist() == [1, 3, 4]
    assert record.probs.shape == (3, 50, 10)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"epoch_000{epoch}.safetensors" for epoch in (1, 3, 4)
    ]


def test_keep_best_leaves_what_covering_chooses(tmp_path):
    every, few = (dataclasses.replace(SMALL, epochs=9, keep_best=keep) for keep in (0, 3))
    whole, record = run(every, tmp_path / "all"), run(few, tmp_path / "few")
    chosen = covering(whole.split(0)[0].correct, 3)
    np.testing.assert_array_equal(record.predicted, whole.predicted)
    np.testing.assert_array_equal(record.kept, chosen)
    np.testing.assert_array_equal(record.probs, whole.probs[chosen])
    files = sorted(path.name for path in (tmp_path / "few" / "checkpoints").iterdir())
    assert files == [f"epoch_{epoch:04d}.safetensors" for epoch in chosen]
    assert not (tmp_path / "few" / "probs.npy").exists()  # which held all nine epochs
    fusion = knowledge_fusion(record.split(0)[0], window=0)
    with pytest.raises(InputError, match="split is 1, but checkpoints were kept by the val"):
        record.split(1)
    members = members_of(few, tmp_path / "few", fusion)  # a mixture finds its checkpoints
    assert distill(student_config(few, "kf", members), members, tmp_path / "student").epochs


def test_ema_follows_parameters_and_batchnorm_statistics(tmp_path):
    config = dataclasses.replace(SMALL, ema=0.5, epochs=1, batch_size=200, lr=0.1)
    data = load(config)
    start = build_model(config, data).state_dict()
    run(config, tmp_path / "ema")
    run(dataclasses.replace(config, ema=0.0), tmp_path / "plain")  # one step each
    ema, plain = (load_tensors(checkpoint_path(tmp_path / n, 0)) for n in ("ema", "plain"))
    for key, value in plain.items():
        expected = (start[key] + value) / 2 if value.is_floating_point() else value
        torch.testing.assert_close(ema[key], expected)
    assert not torch.equal(ema["1.running_mean"], start["1.running_mean"])


def test_ema_moves_shared_weights_once_a_step():
    first = torch.nn.Linear(2, 2, bias=False)
    model = torch.nn.Sequential(first, first)
    ema = copy.deepcopy(model)
    with torch.no_grad():
        ema[0].weight.zero_()
    _update_ema(ema, model, 0.75)
    torch.testing.assert_close(ema[1].weight, first.weight / 4)


def test_learning_rates():
    def rates(**fields):
        config = RunConfig(lr=1.0, **fields)
        return [round(learning_rate(config, done), 4) for done in (0.0, 0.25, 0.5, 0.8, 1.0)]

    assert rates(schedule="constant") == [1, 1, 1, 1, 1]
    assert rates(schedule="step") == [1, 1, 0.1, 0.01, 0.01]
    assert rates(schedule="cosine") == [1, 0.8536, 0.5, 0.0955, 0]
    assert rates(schedule="cyclic", cycles=2) == [1, 0.5, 1, 0.3455, 1]


def test_warm_up_rises_linearly_before_the_cosine():
    config = RunConfig(lr=1.0, epochs=10, warmup=2.0)
    at = [round(learning_rate(config, done), 4) for done in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert at == [0.01, 0.505, 1, 0.5, 0]


def test_a_folder_that_does_not_fit_is_read_while_it_is_trained_on(tmp_path, monkeypatch):
    digits = load(RunConfig())
    for part, pixels, labels in (
        ("train", digits.images[:60], digits.labels[:60]),
        ("val", digits.eval_images[:40], digits.eval_labels[:40]),
    ):
        for number, (image, label) in enumerate(zip(pixels, labels)):
            place = tmp_path / "data" / part / str(int(label))
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).resize((40, 36)).save(place / f"{number}.png")
    config = RunConfig(
        dataset=f"folder:{tmp_path / 'data'}", image_size=16, model="resnet8", epochs=2,
        augment="crop_flip", label_smoothing=0.1, clip_norm=1.0, warmup=0.5, ema=0.5,
        noise="symmetric", noise_rate=0.2, batch_size=20,
    )  # fmt: skip
    in_memory = run(config, tmp_path / "in memory")
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    record = run(config, tmp_path / "whole")
    assert record.probs.shape == (2, 40, 10)
    assert np.isfinite(record.curves["train_loss"]).all()
    assert record.loss_histogram[:, 1].sum(axis=1).tolist() == [12, 12]
    with pytest.raises(Paused):
        run(config, tmp_path / "stopped", deadline=0.0)
    assert_same_records(record, run(config, tmp_path / "stopped"))
    assert_same_records(record, in_memory)


def test_a_run_that_the_disk_does_not_hold_is_refused_before_it_trains(tmp_path):
    long = dataclasses.replace(SMALL, model="resnet18", image_size=32, epochs=300_000)
    weights = sum(t.nbytes for t in build_model(long, load(long)).state_dict().values())
    needed = 300_000 * (weights + 2 * 50 * 10) + 6 * weights  # two states of three copies
    told = f"the run takes {needed / 1e9:.1f} GB on the disk and .* are free; keep fewer epochs"
    with pytest.raises(InputError, match=told):
        run(long, tmp_path)
    assert not (tmp_path / "probs.npy").exists()


@pytest.mark.parametrize("keep", [0, 2])
def test_a_long_run_says_after_its_first_epoch_what_it_takes(tmp_path, monkeypatch, capsys, keep):
    config = dataclasses.replace(SMALL, keep_best=keep)
    monkeypatch.setattr(training, "_LONG", 0)
    forecast, seen = training._forecast, []
    monkeypatch.setattr(training, "_forecast", lambda *a: (seen.append(a), forecast(*a))[1])
    run(config, tmp_path / "quiet")
    train(dataclasses.replace(config, epochs=1), tmp_path / "one", device="cpu")  # none is left
    assert not seen
    train(config, tmp_path / "told", device="cpu")
    [(seconds, disk, device)] = seen
    assert capsys.readouterr().err.count(forecast(seconds, disk, device)[:25]) == 1
    assert 0 < seconds < 600
    weights = sum(t.nbytes for t in build_model(SMALL, load(SMALL)).state_dict().values())
    written = sum(p.stat().st_size for p in (tmp_path / "told").rglob("*") if p.is_file())
    assert disk == pytest.approx(written + 6 * weights, rel=0.05)  # its two states are gone
    told = forecast(1234.0, 1_260_000_000, device)
    assert re.fullmatch(r"about 21 minutes more, 1.26 GB on the disk, \d+\.\d GB of memory", told)
    assert 0.1 < float(told.split()[-4]) < 10  # torch alone takes as much


def test_a_folder_belongs_to_one_run(tmp_path):
    run(SMALL, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="is the folder of another run"):
        run(dataclasses.replace(SMALL, seed=1), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_loss_that_is_not_finite_is_told(tmp_path):
    with pytest.raises(InputError, match="loss of epoch 0 is not finite; lower lr, now 1e[+]20"):
        run(dataclasses.replace(SMALL, lr=1e20), tmp_path)


def test_an_unknown_device_is_told(tmp_path):
    with pytest.raises(InputError, match="device is 'toaster', which is not here"):
        train(SMALL, tmp_path, device="toaster", progress=False)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_damaged_checkpoint_is_told(tmp_path, damage):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"w": torch.arange(1000.0)})
    assert torch.equal(load_tensors(path)["w"], torch.arange(1000.0))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(
        {"truncated": content[:-100], "flipped": bytes(content), "foreign": b"hello"}[damage]
    )
    with pytest.raises(InputError, match="state.safetensors cannot be read"):
        load_tensors(path)


class Diverging(torch.nn.Linear):
    """Learns, but predicts NaN, as BatchNorm's statistics may make a network do."""

    def __init__(self):
        super().__init__(64, 10)

    def forward(self, images):
        logits = super().forward(images.flatten(1))
        return logits if self.training else logits * torch.nan


def test_outputs_that_are_not_finite_are_told_at_once(tmp_path):
    with pytest.raises(InputError, match="an output of epoch 0 is not finite; lower lr"):
        run(SMALL, tmp_path, build=Diverging)


class Centred(torch.nn.Linear):
    """Subtracts a running mean, a buffer that no state_dict holds."""

    def __init__(self):
        super().__init__(64, 10)
        self.register_buffer("mean", torch.zeros(64), persistent=False)

    def forward(self, images):
        if self.training:
            self.mean.lerp_(images.detach().flatten(1).mean(0), 0.1)
        return super().forward(images.flatten(1) - self.mean)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_buffers_that_are_not_persistent_are_resumed(tmp_path, ema):
    config = dataclasses.replace(SMALL, ema=ema)
    whole = run(config, tmp_path / "whole", build=Centred)
    with pytest.raises(Paused):
        run(config, tmp_path / "part", deadline=0.0, build=Centred)
    assert_same_records(run(config, tmp_path / "part", build=Centred), whole)


def test_the_tail_begins_where_the_rate_says_so():
    config = RunConfig(lr=1.0, epochs=100, warmup=20.0, schedule="constant_tail")
    first = config.tail_epoch / config.epochs
    assert learning_rate(config, first) == 0.5 < learning_rate(config, first - 0.01)


@pytest.mark.filterwarnings("ignore")  # torchvision's own
def test_networks_with_auxiliary_heads_train(tmp_path):
    for number in range(8):
        folder = tmp_path / "data" / ("train", "val")[number // 4] / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.full((32, 32, 3), 30 * number, np.uint8))
        image.save(folder / f"{number}.png")
    network = {"model": "torchvision:googlenet", "epochs": 1, "batch_size": 2}
    config = RunConfig(dataset=f"folder:{tmp_path}/data", **network)
    assert run(config, tmp_path / "run").epochs == 1


def test_a_run_that_was_killed_once_its_record_was_there_is_tidied(tmp_path):
    config = dataclasses.replace(SMALL, keep_best=2)
    run(config, tmp_path)
    (tmp_path / "probs.npy").touch()
    assert run(config, tmp_path).probs.shape[0] == 2
    assert not (tmp_path / "probs.npy").exists()
