"""Tracked loops: of any framework, killed at any moment, and taken up again."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from torch import nn

from fmnlib import InputError, RunRecord
from fmnlib.tracker import Tracker, load_tracked
from fmnlib.watch import Watch, predict_batches

LABELS = [0, 1, 2, 1]


def outputs(epoch):
    return np.random.default_rng(epoch).normal(size=(4, 3))


def noted(folder, epochs):
    tracker = Tracker(folder, LABELS)
    for epoch in range(epochs):
        tracker.note(outputs(epoch))
    return tracker


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_a_tracked_loop_is_the_record_of_its_arrays(tmp_path):
    record = noted(tmp_path / "t", 5).record()
    straight = RunRecord.from_arrays(
        np.stack([softmax(outputs(epoch)) for epoch in range(5)]), np.array(LABELS)
    )
    np.testing.assert_array_equal(record.predicted, straight.predicted)
    np.testing.assert_allclose(record.probs, straight.probs, atol=1e-3)
    np.testing.assert_array_equal(record.kept, range(5))
    assert (record.classes, record.half, record.probs.dtype) == (3, "all", np.float16)
    assert isinstance(record.probs.base, np.memmap)  # stays on disk
    assert record.take(np.array([1, 3]), "val").probs.shape == (5, 2, 3)


def test_classes_that_half_precision_cannot_tell_apart_stay_apart(tmp_path):
    tracker = Tracker(tmp_path / "t", [1])
    tracker.note([[0.5, 0.5 + 1e-6]])
    assert tracker.record().probs[0, 0, 0] == tracker.record().probs[0, 0, 1]
    assert tracker.record().correct.all()


@pytest.mark.parametrize(
    "of",
    [
        torch.tensor,
        lambda rows: torch.tensor(rows, dtype=torch.bfloat16, requires_grad=True),
        lambda rows: rows.tolist(),
        lambda rows: softmax(rows).astype(np.float32),
        lambda rows: np.log(softmax(rows)),
    ],
    ids=["tensor", "bfloat16", "list", "probabilities", "log-probabilities"],
)
def test_arrays_and_tensors_logits_and_probabilities(tmp_path, of):
    tracker = Tracker(tmp_path / "t", torch.tensor(LABELS))
    accuracy = tracker.note(of(outputs(0)))
    np.testing.assert_allclose(tracker.record().probs[0], softmax(outputs(0)), atol=0.01)
    assert accuracy == (outputs(0).argmax(1) == LABELS).mean()


def test_large_logits_do_not_overflow(tmp_path):
    tracker = Tracker(tmp_path / "t", [1])
    assert tracker.note([[-1e5, 1e5]]) == 1.0


def test_scikit_learn_by_partial_fit(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    learner = MLPClassifier((32,), random_state=0)
    tracker = Tracker(tmp_path / "t", labels[500:900])
    for _ in range(4):
        learner.partial_fit(pixels[:500], labels[:500], classes=range(10))
        tracker.note(learner.predict_proba(pixels[500:900]))
    predicted = learner.predict(pixels[500:900])
    np.testing.assert_array_equal(tracker.record().predicted[-1], predicted)


LOOP = """
import sys
import numpy as np
from fmnlib.tracker import Tracker
tracker = Tracker(sys.argv[1], np.arange(2000) % 50)
rng = np.random.default_rng(0)
while True:
    tracker.note(rng.normal(size=(2000, 50)))
    print(tracker.epochs, flush=True)
"""


def test_a_killed_loop_loses_no_epoch_that_it_noted(tmp_path):
    loop = subprocess.Popen(
        [sys.executable, "-c", LOOP, tmp_path / "t"], stdout=subprocess.PIPE, text=True
    )
    told = 0
    while told < 7:
        told = int(loop.stdout.readline())
    time.sleep(0.01)
    loop.send_signal(signal.SIGKILL)
    rest = loop.communicate()[0].split()
    record = load_tracked(tmp_path / "t")
    assert record.epochs in (int((rest or [told])[-1]) + more for more in (0, 1))
    again = Tracker(tmp_path / "t", record.labels, start=record.epochs)
    again.note(np.ones((2000, 50)))
    assert again.record().epochs == record.epochs + 1
    np.testing.assert_array_equal(again.record().predicted[:-1], record.predicted)


def test_half_a_row_counts_for_nothing(tmp_path):
    noted(tmp_path / "t", 3)
    for name, cut in (("predicted.i32", 5), ("probs.f16", 0)):
        file = tmp_path / "t" / name
        os.truncate(file, file.stat().st_size - cut)
    assert load_tracked(tmp_path / "t").epochs == 2
    tracker = Tracker(tmp_path / "t", LABELS, start=2)
    tracker.note(outputs(2))
    whole = noted(tmp_path / "whole", 3).record()
    np.testing.assert_array_equal(tracker.record().probs, whole.probs)


def test_a_loop_that_goes_on_from_an_earlier_epoch_notes_it_anew(tmp_path):
    noted(tmp_path / "t", 5)
    tracker = Tracker(tmp_path / "t", LABELS, start=3)
    assert load_tracked(tmp_path / "t").epochs == 5  # nothing is lost before it is noted anew
    tracker.note(outputs(77))
    record = tracker.record()
    assert record.epochs == 4
    np.testing.assert_allclose(record.probs[3], softmax(outputs(77)), atol=1e-3)
    np.testing.assert_allclose(record.probs[2], softmax(outputs(2)), atol=1e-3)


def test_weights_of_epochs_that_are_noted_anew_go(tmp_path):
    net = torch.nn.Linear(1, 1)
    tracker = Tracker(tmp_path / "run", LABELS)
    for epoch in range(4):
        tracker.note(outputs(epoch), net)
    Tracker(tmp_path / "run", LABELS, start=1).note(outputs(1), net)
    left = sorted(path.stem for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["epoch_0000", "epoch_0001"]


def test_bad_input_is_told_and_leaves_what_is_there(tmp_path):
    tracker = noted(tmp_path / "t", 2)

    def told(make, message):
        with pytest.raises(InputError, match=message):
            make()

    folder = tmp_path / "t"
    told(lambda: Tracker(folder, LABELS), "holds 2 epochs and start is 0; use another folder")
    told(lambda: Tracker(folder, LABELS, start=3), "holds 2 epochs and start is 3; .* 1 to 2")
    told(lambda: Tracker(tmp_path / "n", LABELS, start=1), "and start is 1; .*leave start out")
    told(lambda: Tracker(folder, [0, 1, 2, 2], start=2), "was tracked with other labels")
    told(lambda: Tracker(tmp_path / "n", [0.5]), "labels are float64 of shape .*one integer")
    told(lambda: Tracker(tmp_path / "n", [[0]]), "labels are int64 of shape")
    told(lambda: Tracker(tmp_path / "n", [0, -100]), "labels are empty or negative")
    told(lambda: tracker.note(outputs(0)[:3]), r"outputs are \[3, 3\]; give \[4, 3\]")
    told(lambda: tracker.note(outputs(0)[:, :2]), r"outputs are \[4, 2\]; give \[4, 3\]")
    told(lambda: tracker.note(outputs(0)[0]), r"outputs are \[3\]; give \[samples, classes\]")
    told(lambda: tracker.note(outputs(0) * np.nan), "outputs are not finite; look for NaN")
    told(lambda: load_tracked(tmp_path), "is no tracked folder; make one with a Tracker")
    assert not (tmp_path / "n").exists()
    assert tracker.record().epochs == 2
    os.truncate(folder / "probs.f16", 10)
    told(lambda: load_tracked(folder), "is damaged")
    os.truncate(folder / "predicted.i32", 3)
    told(lambda: load_tracked(folder), "holds no whole epoch yet; note one")


def test_weights_are_kept_with_the_epoch(tmp_path):
    net = nn.Linear(2, 3)
    tracker = Tracker(tmp_path / "t", LABELS)
    for epoch in range(2):
        nn.init.constant_(net.weight, epoch)
        tracker.note(outputs(epoch), net if epoch else net.state_dict())
    stored = safetensors.torch.load_file(tmp_path / "t/checkpoints/epoch_0001.safetensors")
    assert stored.keys() == net.state_dict().keys()
    assert (stored["weight"] == 1).all()
    assert len(list((tmp_path / "t/checkpoints").iterdir())) == 2


def test_tied_weights_can_be_kept(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    Tracker(tmp_path / "t", LABELS).note(outputs(0), net)
    stored = safetensors.torch.load_file(tmp_path / "t/checkpoints/epoch_0000.safetensors")
    assert torch.equal(stored["0.weight"], stored["1.weight"])


# ---------------------------------------------------------------- watch


def loader(shuffle=False):
    data = torch.utils.data.TensorDataset(torch.randn(10, 2), torch.arange(10) % 3)
    return torch.utils.data.DataLoader(data, 4, shuffle=shuffle)


def test_batches_that_can_be_read_once_are_refused(tmp_path):
    with pytest.raises(InputError, match="batches are a zip, read once; give a DataLoader"):
        Watch(tmp_path / "t", zip([torch.eye(2)], [torch.arange(2)]))
    with pytest.raises(InputError, match="labels are empty"):
        Watch(tmp_path / "t", [])


def test_a_checkpoint_of_the_users_own_is_left_alone(tmp_path):
    tracker = noted(tmp_path / "t", 1)
    own = tmp_path / "t" / "checkpoints" / "epoch_0002_best.safetensors"
    own.parent.mkdir(exist_ok=True)
    own.touch()
    tracker.note(outputs(1))
    assert own.exists()


def test_watching_changes_nothing(tmp_path):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    net[1].eval()  # frozen by its owner
    before = {k: v.clone() for k, v in net.state_dict().items()}
    batches = loader()
    torch.manual_seed(0)
    Watch(tmp_path / "t", batches).note(net)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)
    assert [module.training for module in net.modules()] == [True, True, False, True]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    logits, labels = predict_batches(net, batches)
    assert logits.shape == (10, 3)
    assert torch.equal(labels, torch.arange(10) % 3)
    assert torch.equal(logits, net.eval()(torch.cat([x for x, _ in batches])))


def test_batches_in_another_order_are_refused(tmp_path):
    torch.manual_seed(0)
    watch = Watch(tmp_path / "t", loader(shuffle=True))
    torch.manual_seed(1)
    with pytest.raises(InputError, match="come in another order each time; use shuffle=False"):
        watch.note(nn.Linear(2, 3))


def test_batches_of_another_form_are_told(tmp_path):
    with pytest.raises(InputError, match=r"a batch is \['x', 'y'\]; give \(inputs, labels\) or"):
        Watch(tmp_path / "t", [{"x": torch.ones(1), "y": torch.ones(1)}])
