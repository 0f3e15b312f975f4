"""Tracked loops: of any framework, killed at any moment, and taken up again."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.neural_network import MLPClassifier
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fmnlib import InputError, RunRecord
from fmnlib import tracker as tracker_module
from fmnlib.record import halves
from fmnlib.scores import covering
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
    assert isinstance(record.probs, np.memmap)  # stays on disk
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
    for name, cut in (("predicted.i32", 5), ("probs.f16", 0), ("checksums.u32", 3)):
        file = tmp_path / "t" / name
        os.truncate(file, file.stat().st_size - cut)
    assert load_tracked(tmp_path / "t").epochs == 2
    tracker = Tracker(tmp_path / "t", LABELS, start=2)
    tracker.note(outputs(2))
    whole = noted(tmp_path / "whole", 3).record()
    np.testing.assert_array_equal(tracker.record().probs, whole.probs)


def test_a_loop_that_goes_on_from_an_earlier_epoch_notes_it_anew(tmp_path):
    noted(tmp_path / "t", 5)
    with pytest.raises(InputError, match="holds 5 .* start is 3: 2 of them would be lost; start"):
        Tracker(tmp_path / "t", LABELS, start=3)
    tracker = Tracker(tmp_path / "t", LABELS, start=3, overwrite=True)
    assert load_tracked(tmp_path / "t").epochs == 5  # nothing is lost before it is noted anew
    tracker.note(outputs(77))
    record = tracker.record()
    assert record.epochs == 4
    np.testing.assert_allclose(record.probs[3], softmax(outputs(77)), atol=1e-3)
    np.testing.assert_allclose(record.probs[2], softmax(outputs(2)), atol=1e-3)


def test_weights_of_epochs_that_are_noted_anew_go(tmp_path):
    net = torch.nn.Linear(1, 1).eval()
    tracker = Tracker(tmp_path / "run", LABELS)
    for epoch in range(4):
        tracker.note(outputs(epoch), net)
    Tracker(tmp_path / "run", LABELS, start=1, overwrite=True).note(outputs(1), net)
    left = sorted(path.stem for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["epoch_0000", "epoch_0001"]


def test_bad_input_is_told_and_leaves_what_is_there(tmp_path):
    tracker = noted(tmp_path / "t", 2)

    def told(make, message):
        with pytest.raises(InputError, match=message):
            make()

    folder = tmp_path / "t"
    told(lambda: Tracker(folder, LABELS), "holds 2 epochs and start is 0; use another folder")
    told(lambda: Tracker(folder, LABELS, overwrite=True), "start is 0; use another folder")
    told(lambda: Tracker(folder, LABELS, start=3), "holds 2 epochs and start is 3; .* 1 to 2")
    told(lambda: Tracker(tmp_path / "n", LABELS, start=1), "and start is 1; .*leave start out")
    told(lambda: Tracker(folder, [0, 1, 2, 2], start=2), "was tracked with other labels")
    told(lambda: Tracker(tmp_path / "n", [0.5]), "labels are float64 of shape .*one integer")
    told(lambda: Tracker(tmp_path / "n", [[0]]), "labels are int64 of shape")
    told(lambda: Tracker(tmp_path / "n", [0, -100]), "labels are empty or negative")
    told(lambda: tracker.note(outputs(0)[:3]), r"outputs are \[3, 3\]; give \[4, 3\]")
    told(lambda: tracker.note(outputs(0)[:, :2]), r"outputs are \[4, 2\]; give \[4, 3\]")
    told(lambda: tracker.note(outputs(0)[0]), r"outputs are \[3\]; give \[samples, classes\]")
    told(
        lambda: tracker.note([0.1, 0.9, 0.2, 0.8]), r"are \[4\]; .*of two classes give both, 1 - p"
    )
    told(
        lambda: tracker.note(outputs(0)[:, :1]), r"are \[4, 1\]; .*the logits 0 and m of a margin"
    )
    told(
        lambda: tracker.note(outputs(0), epoch=1),
        "epoch 1 is noted, but it is the turn of epoch 2",
    )
    told(lambda: tracker.note(outputs(0), epoch=3), "the turn of epoch 2; note each epoch once")
    told(lambda: Tracker(tmp_path / "n", [1, 3, 2]).note(np.eye(3)), "from 1 to 3; .*labels - 1")
    told(lambda: Tracker(tmp_path / "n", [0, 4, 2]).note(np.eye(3)), "from 0 to 4; allow 0 to 2$")
    told(lambda: Tracker(tmp_path / "n", LABELS, outputs="odds"), 'give "logits" or "probs"')
    told(lambda: tracker.note(outputs(0) * np.nan), "outputs are not finite; look for NaN")
    told(lambda: load_tracked(tmp_path), "is not a tracked folder; make one with a Tracker")
    assert not (tmp_path / "n").exists()
    assert tracker.record().epochs == 2
    os.truncate(folder / "probs.f16", 10)
    told(lambda: load_tracked(folder), "is damaged")
    os.truncate(folder / "predicted.i32", 3)
    told(lambda: load_tracked(folder), "holds no whole epoch yet; note one")


def test_weights_are_kept_with_the_epoch(tmp_path):
    net = nn.Linear(2, 3).eval()
    tracker = Tracker(tmp_path / "t", LABELS)
    for epoch in range(2):
        nn.init.constant_(net.weight, epoch)
        tracker.note(outputs(epoch), net if epoch else net.state_dict())
    stored = safetensors.torch.load_file(tmp_path / "t/checkpoints/epoch_0001.safetensors")
    assert stored.keys() == net.state_dict().keys()
    assert (stored["weight"] == 1).all()
    assert len(list((tmp_path / "t/checkpoints").iterdir())) == 2


def test_tied_weights_can_be_kept(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    net[1].weight = net[0].weight
    Tracker(tmp_path / "t", LABELS).note(outputs(0), net)
    stored = safetensors.torch.load_file(tmp_path / "t/checkpoints/epoch_0000.safetensors")
    assert torch.equal(stored["0.weight"], stored["1.weight"])


# ---------------------------------------------------------------- guards


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 3), "is in training mode, .*call model.eval.. before you predict"),
        ({"w": np.ones(3)}, "a dict is neither a torch network .*leave model out"),
        (MLPClassifier(), "a MLPClassifier is neither a torch network"),
        (lambda: None, "a function is neither a torch network"),
    ],
)
def test_what_cannot_be_a_checkpoint_is_refused_before_anything_is_written(
    tmp_path, model, message
):
    tracker = noted(tmp_path / "t", 1)
    before = names(tmp_path)
    with pytest.raises(InputError, match=message):
        tracker.note(outputs(1), model)
    assert (tracker.record().epochs, names(tmp_path)) == (1, before)


DIGITS, TARGETS = load_digits(return_X_y=True)
LEARNER = MLPClassifier((32,), random_state=0, tol=1e9, n_iter_no_change=80)
PROBS = LEARNER.fit(DIGITS[:900], TARGETS[:900]).predict_proba(DIGITS[900:])
LOGITS, TARGETS = np.log(PROBS.clip(1e-9)) + 5, TARGETS[900:]


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        (PROBS * 100, "percentages"),
        (PROBS * 1.02, "probabilities of sum 1.020 to 1.020"),
        (PROBS.round(1), "probabilities of sum "),
        (1 / (1 + np.exp(5 - LOGITS)) ** 0.5, "sigmoids"),
        (softmax(LOGITS.T), "sigmoids, or a softmax over the samples"),
    ],
    ids=["percentages", "sum 1.02", "rounded", "sigmoids", "over the samples"],
)
def test_what_is_neither_logits_nor_probabilities_is_refused(tmp_path, form, fault):
    form = form.T if form.shape[0] == 10 else form
    with pytest.raises(InputError, match=f"look like {fault}.*or say Tracker"):
        Tracker(tmp_path / "t", TARGETS).note(form)
    Tracker(tmp_path / "t", TARGETS, outputs="logits").note(form)
    np.testing.assert_allclose(load_tracked(tmp_path / "t").probs[0], softmax(form), atol=1e-3)


def test_probabilities_can_be_said_to_be_either(tmp_path):
    with pytest.raises(InputError, match="said to be probs but are negative or not of sum 1"):
        Tracker(tmp_path / "t", TARGETS, outputs="probs").note(LOGITS)
    Tracker(tmp_path / "t", TARGETS, outputs="logits").note(PROBS)
    np.testing.assert_allclose(load_tracked(tmp_path / "t").probs[0], softmax(PROBS), atol=1e-3)


def test_a_second_softmax_is_told_and_kept(tmp_path):
    tracker = Tracker(tmp_path / "t", TARGETS)
    with pytest.warns(UserWarning, match="look like a softmax of a softmax"):
        accuracy = tracker.note(softmax(PROBS))
    assert (tracker.epochs, tracker.record().accuracy[0]) == (1, accuracy)
    Tracker(tmp_path / "said", TARGETS, outputs="probs").note(softmax(PROBS))


def boosting():
    learner = GradientBoostingClassifier(n_estimators=30, max_depth=2, random_state=0)
    features, labels = load_iris(return_X_y=True)
    yield from learner.fit(features, labels).staged_predict_proba(features)
    features, labels = load_breast_cancer(return_X_y=True)
    yield from learner.fit(features, labels).staged_predict_proba(features)


def fresh_networks():
    for seed in range(20):
        torch.manual_seed(seed)
        for classes in (2, 3, 10):
            layers = [nn.BatchNorm1d(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)]
            with torch.no_grad():
                yield nn.Sequential(*layers)(torch.tensor(DIGITS, dtype=torch.float32))
    yield torch.zeros(9, 10)  # a last layer that begins at zero


def test_networks_that_know_little_raise_no_alarm(tmp_path):
    for number, made in enumerate(
        [*boosting(), *fresh_networks(), PROBS, LOGITS, softmax(LOGITS)]
    ):
        Tracker(tmp_path / f"{number}", np.arange(len(made)) % 2).note(made)  # no warning


@pytest.mark.parametrize("wrong", ["order of classes", "order of samples"])
def test_labels_in_another_order_are_told_after_five_epochs(tmp_path, wrong):
    draw = np.random.default_rng(0)
    labels = (TARGETS + 3) % 10 if "classes" in wrong else draw.permutation(TARGETS)
    tracker = Tracker(tmp_path / "t", labels)
    for _ in range(4):
        tracker.note(PROBS)
    with pytest.warns(UserWarning, match="after 5 epochs no accuracy is above chance"):
        tracker.note(PROBS)
    tracker.note(PROBS)  # told once
    assert tracker.record().epochs == 6


def test_outputs_with_logits_are_taken(tmp_path):
    expected = softmax(outputs(0))
    for number, found in enumerate(
        [
            {"logits": outputs(0)},
            types.SimpleNamespace(logits=torch.tensor(outputs(0))),
            SequenceClassifierOutput(logits=torch.tensor(outputs(0))),
            torch.tensor(outputs(0)).numpy().tolist(),
        ]
    ):
        tracker = Tracker(tmp_path / f"{number}", LABELS)
        tracker.note(found)
        np.testing.assert_allclose(tracker.record().probs[0], expected, atol=1e-3)


@pytest.mark.parametrize(
    "what",
    [None, {"loss": 1}, (1, outputs(0)), "abc", outputs(0) * 1j, [["a", "b"]] * 4, nn.ReLU()],
)
def test_outputs_that_are_no_numbers_are_one_line(tmp_path, what):
    with pytest.raises(InputError, match="; give ") as told:
        Tracker(tmp_path / "t", LABELS).note(what)
    assert len(str(told.value).splitlines()) == 1


# ---------------------------------------------------------------- what lies on the disk


@pytest.mark.parametrize("name", ["predicted.i32", "probs.f16", "checksums.u32", "tracked.json"])
def test_a_bit_that_flips_is_noticed(tmp_path, name):
    noted(tmp_path / "t", 4)
    file, draw = tmp_path / "t" / name, np.random.default_rng(0)
    content = file.read_bytes()
    for place in draw.integers(0, len(content), 40):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(draw.integers(8))
        file.write_bytes(flipped)
        with pytest.raises(InputError, match="t is (damaged|not a tracked folder)") as told:
            load_tracked(tmp_path / "t")
        assert len(str(told.value).splitlines()) == 1
    file.write_bytes(content)
    assert load_tracked(tmp_path / "t").epochs == 4


def test_fewer_labels_do_not_make_more_epochs(tmp_path):
    noted(tmp_path / "t", 4)
    head = json.loads((tmp_path / "t" / "tracked.json").read_text())
    for labels in (LABELS[:2], [0, 1, 2, 2], [], 3, "abc", [[0]], [0.5], [10**30], [-1]):
        (tmp_path / "t" / "tracked.json").write_text(json.dumps(head | {"labels": labels}))
        with pytest.raises(InputError, match="is damaged|is not a tracked folder"):
            load_tracked(tmp_path / "t")
    for text in ("[" * 200_000, "", "{}", "[1]", '{"labels": [0], "classes": 1e999}'):
        (tmp_path / "t" / "tracked.json").write_text(text)
        with pytest.raises(InputError, match="is not a tracked folder"):
            load_tracked(tmp_path / "t")


def test_of_very_many_probabilities_the_last_epochs_are_verified(tmp_path, monkeypatch):
    noted(tmp_path / "t", 4)
    file = tmp_path / "t" / "probs.f16"
    content = file.read_bytes()
    monkeypatch.setattr(tracker_module, "_VERIFIED", 10)  # as if it were 2 GiB
    for place, noticed in ((0, False), (len(content) - 2, True)):
        flipped = bytearray(content)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(InputError) if noticed else contextlib.nullcontext():
            load_tracked(tmp_path / "t")


def test_a_folder_without_checksums_is_read_and_gone_on_with(tmp_path):
    expected = noted(tmp_path / "t", 3).record()
    (tmp_path / "t" / "checksums.u32").unlink()
    with pytest.raises(InputError, match="is damaged"):
        load_tracked(tmp_path / "t")
    head = {"labels": LABELS, "classes": 3}  # as versions before it wrote it
    (tmp_path / "t" / "tracked.json").write_text(json.dumps(head))
    tracker = Tracker(tmp_path / "t", LABELS, start=3)
    tracker.note(outputs(3))
    assert not (tmp_path / "t" / "checksums.u32").exists()
    np.testing.assert_array_equal(tracker.record().predicted[:3], expected.predicted)


@pytest.mark.parametrize("name", ["predicted.i32", "probs.f16", "checksums.u32"])
def test_no_link_and_no_pipe_is_written_to_or_read(tmp_path, name):
    file, precious = tmp_path / "t" / name, tmp_path / "precious"
    precious.write_bytes(b"old")
    (tmp_path / "t").mkdir()
    for plant in (lambda: file.symlink_to(precious), lambda: os.mkfifo(file)):
        plant()
        with pytest.raises(InputError, match="is a link or not a file; use another folder"):
            Tracker(tmp_path / "t", LABELS).note(outputs(0))
        assert precious.read_bytes() == b"old"
        file.unlink()
    for old in (tmp_path / "t").iterdir():
        old.unlink()
    noted(tmp_path / "t", 2)
    file.replace(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(InputError, match="is damaged"):
        load_tracked(tmp_path / "t")


def test_samples_have_names_and_groups(tmp_path):
    named = {"ids": ["0/a.jpg", "1/b.jpg", "2/c.jpg", "1/d.jpg"], "groups": [5, 6, 5, 6]}
    Tracker(tmp_path / "t", LABELS, **named).note(outputs(0))
    Tracker(tmp_path / "t", LABELS, start=1).note(outputs(1))
    record = load_tracked(tmp_path / "t")
    assert record.ids.tolist() == named["ids"]
    assert record.groups.tolist() == named["groups"]
    assert set(record.split(0)[0].groups.tolist()) in ({5}, {6})
    Tracker(tmp_path / "t", LABELS, start=2, **named)
    with pytest.raises(InputError, match="was tracked with other ids"):
        Tracker(tmp_path / "t", LABELS, start=2, ids=[1, 2, 3, 4])
    with pytest.raises(InputError, match="two samples have one id"):
        Tracker(tmp_path / "n", LABELS, ids=[1, 2, 3, 3])


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


@pytest.mark.parametrize("of", [torch.tensor, list])
def test_labels_that_are_floats_are_refused_and_not_cut(tmp_path, of):
    targets = of([0.21, 1.34, 1.87])
    for batch in ((torch.eye(3), targets), {"x": torch.eye(3), "labels": targets}):
        with pytest.raises(InputError, match="labels are float.*give one integer class a sample"):
            Watch(tmp_path / "t", [batch])


def test_a_watch_that_is_told_the_epoch_notes_none_twice(tmp_path):
    watch = Watch(tmp_path / "t", loader(), outputs="logits", ids=range(10))
    watch.note(nn.Linear(2, 3), epoch=0)
    with pytest.raises(InputError, match="epoch 0 is noted, but it is the turn of epoch 1"):
        watch.note(nn.Linear(2, 3), epoch=0)
    assert load_tracked(tmp_path / "t").ids.tolist() == [*range(10)]


def test_batches_of_another_form_are_told(tmp_path):
    with pytest.raises(InputError, match=r"a batch is \['x', 'y'\]; give \(inputs, labels\) or"):
        Watch(tmp_path / "t", [{"x": torch.ones(1), "y": torch.ones(1)}])


def test_a_bounded_tracker_keeps_the_checkpoints_that_cover_the_validation_half(tmp_path):
    labels, (chosen, _) = np.zeros(40, int), halves(40, seed=0)
    half = np.random.default_rng(0).random((9, 20)) < 0.5
    right = np.ones((9, 40), bool)  # what the other half says must not count
    right[:, chosen] = half
    tracker = Tracker(tmp_path / "t", labels, keep=3)
    expected = []
    for epoch in range(9):
        tracker.note(np.eye(2)[(~right[epoch]).astype(int)], nn.Linear(epoch + 1, 1).eval())
        expected = [*expected, epoch]
        if len(expected) > 3:
            alone = {
                e: sum(
                    half[e, n] and not any(half[f, n] for f in expected if f != e)
                    for n in range(20)
                )
                for e in expected
            }
            best = max(expected, key=lambda e: half[e].sum())
            given_up = min(
                (e for e in expected if e not in (best, epoch)),
                key=lambda e: (alone[e], half[e].sum(), e),
            )
            expected.remove(given_up)
        files = sorted((tmp_path / "t" / "checkpoints").iterdir())
        assert [int(file.stem[-4:]) for file in files] == expected
        assert tracker.record().kept.tolist() == expected
    record = tracker.record()
    assert record.epochs == 9
    assert record.probs.shape == (3, 40, 2)
    np.testing.assert_array_equal(record.correct, right)
    again = Tracker(tmp_path / "t", labels, start=9)  # goes on with the same bound
    again.note(np.eye(2)[np.zeros(40, int)], nn.Linear(1, 1).eval())
    assert len(list((tmp_path / "t" / "checkpoints").iterdir())) == 3
    with pytest.raises(InputError, match="split is 2, but checkpoints were kept by .* split at 0"):
        again.record().split(2)  # its test half would have chosen


def test_a_bounded_tracker_that_is_noted_anew_offers_what_is_there(tmp_path):
    def note(tracker, epochs):
        for epoch in epochs:
            answers = np.random.default_rng(epoch).integers(0, 2, 40)
            tracker.note(np.eye(2)[answers], nn.Linear(1, 1).eval())

    labels = np.zeros(40, int)
    note(Tracker(tmp_path / "t", labels, keep=3), range(12))
    again = Tracker(tmp_path / "t", labels, start=5, overwrite=True)
    for epoch in range(20, 24):
        note(again, [epoch])
        files = sorted((tmp_path / "t" / "checkpoints").iterdir())
        there = [int(file.stem[-4:]) for file in files]
        assert again.record().kept.tolist() == there
        assert there[-1] == again.epochs - 1
        assert len(there) <= 3


def test_the_most_accurate_checkpoint_stays_even_if_it_alone_knows_least():
    correct = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 1, 0, 0, 0]], bool)
    assert covering(correct, 2).tolist() == [0, 2]


def test_a_checkpoint_whose_epoch_was_not_noted_is_not_offered(tmp_path):
    tracker = Tracker(tmp_path / "t", LABELS, keep=3)
    for epoch in range(3):
        tracker.note(outputs(epoch), nn.Linear(1, 1).eval())
    files = tmp_path / "t" / "checkpoints"  # as after a kill between checkpoint and predictions
    (files / "epoch_0003.safetensors").write_bytes((files / "epoch_0002.safetensors").read_bytes())
    assert tracker.record().kept.tolist() == [0, 1, 2]
    shutil.rmtree(files)
    with pytest.raises(InputError, match="has lost its checkpoints; bring them back"):
        load_tracked(tmp_path / "t")


@pytest.mark.parametrize("keep", [1, "3", True, 2.5])
def test_a_bound_that_is_none_is_refused(tmp_path, keep):
    Tracker(tmp_path / "t", LABELS, keep=3).note(outputs(0), nn.Linear(1, 1).eval())
    head = tmp_path / "t" / "tracked.json"
    head.write_text(json.dumps(json.loads(head.read_text()) | {"keep": keep}))
    with pytest.raises(InputError, match="is not a tracked folder"):
        load_tracked(tmp_path / "t")


def test_outputs_may_be_transposed(tmp_path):
    probs = np.random.default_rng(0).dirichlet(np.ones(3), 4)
    tracker = Tracker(tmp_path / "t", LABELS)
    tracker.note(np.asfortranarray(probs))
    tracker.note(torch.from_numpy(np.ascontiguousarray(np.log(probs).T)).T)
    np.testing.assert_allclose(load_tracked(tmp_path / "t").probs, [probs] * 2, atol=1e-3)


def test_a_bounded_tracker_says_what_it_needs(tmp_path):
    with pytest.raises(InputError, match="keep is 1 with 4 samples; keep 2 or more"):
        Tracker(tmp_path / "t", LABELS, keep=1)
    with pytest.raises(InputError, match="keep is 2 with 1 groups; keep 2 or more"):
        Tracker(tmp_path / "t", LABELS, keep=2, groups=[7] * len(LABELS))
    tracker = Tracker(tmp_path / "t", LABELS, keep=2)
    with pytest.raises(InputError, match="keep is 2, but no network is given; note the model"):
        tracker.note(outputs(0))
    tracker.note(outputs(0), nn.Linear(2, 1).eval())
    with pytest.raises(InputError, match="was tracked with other keep"):
        Tracker(tmp_path / "t", LABELS, start=1, keep=3)


def test_two_loops_in_one_folder_lose_nothing(tmp_path):
    one, two = (Tracker(tmp_path / "t", LABELS) for _ in range(2))
    for epoch in range(3):
        one.note(outputs(epoch))
    with pytest.raises(InputError, match="holds 3 epochs, 0 are by this loop; give each loop a"):
        two.note(outputs(9))
    assert load_tracked(tmp_path / "t").epochs == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_in_another_number_format_is_watched(tmp_path, dtype):
    batches = [(torch.eye(2), torch.tensor([0, 1]))]
    Watch(tmp_path / "t", batches, outputs="logits").note(nn.Linear(2, 2).to(dtype))
    assert load_tracked(tmp_path / "t").epochs == 1


class Merging(nn.Linear):
    """Merges its weights in evaluation, as LoRA's layers do."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_watching_calls_a_networks_own_train(tmp_path):
    net = nn.Sequential(Merging(2, 2))
    batches = [(torch.eye(2), torch.tensor([0, 1]))]
    Watch(tmp_path / "t", batches, outputs="logits").note(net)
    assert net[0].training
    assert not net[0].merged


# In another process, where no type checker comes first.
@pytest.mark.parametrize("keep", ["3.0", "2.5", "'3'"])
def test_a_bound_that_is_no_integer_is_refused_at_once(tmp_path, keep):
    code = f"import sys, fmnlib; fmnlib.Tracker(sys.argv[1], [0, 1], keep={keep})"
    command = [sys.executable, "-c", code, tmp_path / "t"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert f"InputError: keep is {keep.strip(chr(39))} with 2 samples" in done.stderr


def test_a_loop_may_change_its_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker("t", LABELS)
    tracker.note(outputs(0))
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    tracker.note(outputs(1))
    assert load_tracked(tmp_path / "t").epochs == 2


def test_ids_and_groups_may_be_columns_of_pandas(tmp_path):
    frame = pd.DataFrame({"file": list("abcd"), "patient": list("xxyy")})
    Tracker(tmp_path / "t", LABELS, ids=frame["file"], groups=frame["patient"]).note(outputs(0))
    assert load_tracked(tmp_path / "t").ids.tolist() == list("abcd")


def test_probabilities_that_half_precision_moves_to_the_edge(tmp_path):
    probs = [[0.27, 0.33, 0.39]]
    Tracker(tmp_path / "t", [0]).note(probs)
    assert load_tracked(tmp_path / "t").epochs == 1
    RunRecord.from_arrays([probs], [0]).save(tmp_path / "r.npz")
    assert RunRecord.load(tmp_path / "r.npz").epochs == 1


def test_tensors_of_doubles_stay_doubles(tmp_path):
    logits = torch.tensor([[1e8, 1e8 + 1]], dtype=torch.float64)
    assert Tracker(tmp_path / "t", [1]).note(logits) == 1.0
