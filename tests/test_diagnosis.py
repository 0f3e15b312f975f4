"""The diagnosis of records whose truth is known, and of real runs."""

import dataclasses
import json
import re

import numpy as np
import pytest
from scipy.stats import binom

from fmnlib import InputError, RunRecord
from fmnlib.__main__ import main
from fmnlib.diagnosis import diagnose
from fmnlib.fusion import fuse, knowledge_fusion, right_samples
from fmnlib.report import page
from fmnlib.stats import Gain
from fmnlib.tracker import Tracker


def record_of(predicted, labels, classes, sure=0.9):
    """A record whose networks give their class the probability `sure`."""
    predicted = np.asarray(predicted)
    probs = np.full((*predicted.shape, classes), (1 - sure) / (classes - 1))
    np.put_along_axis(probs, predicted[..., None], sure, axis=2)
    return RunRecord.from_arrays(probs, np.asarray(labels))


def steady(samples=400, classes=5, errors=0.2):
    """Learns each sample once and never loses one."""
    labels = np.arange(samples) % classes
    learned = np.random.default_rng(0).integers(0, 10, samples)
    learned[np.random.default_rng(1).random(samples) < errors] = 99
    right = np.arange(12)[:, None] >= learned
    return record_of(np.where(right, labels, (labels + 1) % classes), labels, classes)


def forgetful(samples=400, classes=5):
    """Knows all from epoch 2 on; from epoch 6 on it has lost 3 in 10 of classes 1 and 3."""
    labels = np.arange(samples) % classes
    drawn = np.random.default_rng(0).random(samples) < 0.3
    lost = drawn & np.isin(labels, [1, 3])
    epochs = np.arange(12)[:, None]
    right = (epochs >= 2) & ~(lost & (epochs >= 6))
    return record_of(np.where(right, labels, (labels + 1) % classes), labels, classes)


def test_where_nothing_is_forgotten_it_says_so():
    found = diagnose(steady())
    assert not found.overfits
    assert found.forget.value == 0
    assert found.worst_classes == []
    assert found.lost_by is None
    assert found.advice == "leave"
    assert found.sentences[0].startswith("Local overfitting: none beyond what guessing explains")
    assert found.sentences[-1].startswith("Leave the final network as it is")
    assert found.fused.low <= 0 <= found.fused.high


def test_what_is_forgotten_is_found_where_it_is():
    record = forgetful()
    found = diagnose(record)
    val = record.split(0)[0]
    assert found.overfits
    assert found.forget.value == (~val.correct[-1]).mean()
    assert found.forget.low < found.forget.value < found.forget.high
    assert sorted(found.worst_classes) == [1, 3]
    assert (found.epoch, found.lost_by) == (2, 6)
    assert found.samples == 200
    assert found.chance == pytest.approx((~val.correct[-1]).mean() / 5)
    counted = [(~val.correct[-1] & (val.labels == c)).sum() for c in range(5)]
    assert (found.classes["forgotten"] * found.classes["samples"]).tolist() == counted
    assert found.stopped.value == found.forget.value  # early stopping gets all of it back
    assert found.advice == "stop early"
    assert found.sentences[-1].startswith("Take the checkpoint of epoch 2")
    assert str(found).replace("\n", " ") == " ".join(found.sentences)
    assert max(map(len, str(found).splitlines())) <= 76


def test_guessing_is_not_taken_for_knowledge():
    rng = np.random.default_rng(0)
    overfit = 0
    for _ in range(40):
        labels = rng.integers(0, 5, 300)
        overfit += diagnose(record_of(rng.integers(0, 5, (8, 300)), labels, 5)).overfits
    assert overfit <= 6  # one in twenty by chance


def test_choosing_the_epoch_makes_no_false_alarms():
    """Twenty epochs that guess what the end gets wrong; the test is of 5%."""
    labels, alarms, runs = np.arange(400) % 10, 0, 300
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        predicted = rng.integers(0, 10, (20, 400), dtype=np.int32)
        predicted[-1] = np.where(rng.random(400) < 0.7, labels, (labels + 1) % 10)
        record = RunRecord.from_arrays(np.eye(10)[predicted], labels)
        light = dataclasses.replace(record, probs=None, half="val")
        alarms += diagnose(light).overfits
    assert alarms <= 0.05 * runs + 2 * (0.05 * 0.95 * runs) ** 0.5


def test_the_p_value_is_twice_that_of_the_better_half():
    val = steady(300).split(0)[0]
    predicted = np.random.default_rng(2).integers(0, 5, val.predicted.shape, dtype=np.int32)
    val = dataclasses.replace(val, predicted=predicted)
    halves, found = np.array_split(np.random.default_rng(7).permutation(len(val.labels)), 2), []
    for chosen, rest in (halves, halves[::-1]):
        lost = val.correct & ~val.correct[-1]
        known = lost[lost[:, chosen].sum(axis=1).argmax(), rest].sum()
        wrong = (~val.correct[-1, rest]).sum()
        found.append(binom.sf(known - 1, wrong, 1 / 5))
    assert diagnose(val, split=7).p_value == pytest.approx(min(1, 2 * min(found)))
    assert 2 * min(found) < 1


def test_intervals_hold_what_other_samples_show():
    """The choice on few samples, judged by all: 95% intervals, which hold the choice as well."""
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 5, 6000), np.zeros((8, 6000, 5))
    own, late = rng.normal(size=(2, 6000, 5))
    for epoch in range(8):
        logits[epoch] = own + late * epoch / 10 + rng.normal(size=(6000, 5))
        logits[epoch, np.arange(6000), labels] += 1.5 + epoch / 10
    record = RunRecord.from_arrays(np.exp(logits) / np.exp(logits).sum(2, keepdims=True), labels)
    held = dict.fromkeys(("stopped", "over_stopped", "fused"), 0)
    for seed in range(100):
        few = np.random.default_rng(seed).choice(6000, 300, replace=False)
        val = record.take(np.sort(few), "val")
        found = diagnose(val, split=seed)
        stopped = record.correct[found.early_epoch].mean()
        fused = right_samples(fuse(record, knowledge_fusion(val)), labels).mean()
        final = record.accuracy[-1]
        truth = {
            "stopped": stopped - final,
            "over_stopped": fused - stopped,
            "fused": fused - final,
        }
        for name, gain in truth.items():
            held[name] += getattr(found, name).low <= gain <= getattr(found, name).high
    assert min(held.values()) >= 91  # 95 less two deviations


def test_what_only_a_mixture_knows_is_worth_distilling():
    labels = np.arange(400) % 4
    part = np.arange(400) // 4 % 4
    right = np.ones((4, 400), bool)
    for epoch in range(4):  # each network is wrong on a quarter of its own, and unsure there
        right[epoch] = part != epoch
    probs = np.full((4, 400, 4), 0.0)
    for epoch in range(4):
        sure = np.where(right[epoch], 0.9, 0.3)
        probs[epoch, np.arange(400), labels] = sure
        wrong = np.where(right[epoch], 0.1, 0.7)
        probs[epoch, np.arange(400), (labels + 1 + epoch % 3) % 4] = wrong
    found = diagnose(RunRecord.from_arrays(probs, labels))
    assert found.over_stopped.low > 0
    assert found.networks > 1
    assert found.stopped.low <= 0
    assert found.advice == "distil"
    assert "its gain is certain on these samples, that of early stopping is" in found.sentences[-1]
    better = dataclasses.replace(found, stopped=Gain(0.05, 0.01, 0.09))
    assert "Fuse, and distil the fusion: it beats early stopping by +" in better.sentences[-1]


def test_no_checkpoint_is_advised_without_a_certain_gain():
    found = diagnose(forgetful())
    fused, none = Gain(0.04, 0.001, 0.08), Gain(0.0, -0.05, 0.05)
    assert dataclasses.replace(found, stopped=none, over_stopped=none).advice == "distil"
    assert (
        dataclasses.replace(found, fused=None, stopped=none, over_stopped=None).advice == "leave"
    )
    assert dataclasses.replace(found, fused=none, stopped=none).advice == "leave"
    assert dataclasses.replace(found, fused=fused, over_stopped=fused).advice == "distil"
    assert dataclasses.replace(found, fused=fused, over_stopped=none).advice == "stop early"


def test_the_gain_is_scored_on_samples_that_did_not_choose():
    record = forgetful()
    val, folds = record.split(3)[0], 5
    fold_of = np.random.default_rng(3).permutation(len(val.labels)) % folds
    right = np.zeros(len(val.labels), bool)
    for fold in range(folds):
        inside = np.flatnonzero(fold_of == fold)
        kf = knowledge_fusion(val.take(np.flatnonzero(fold_of != fold), "val"))
        rest = val.take(inside, "val")
        right[inside] = right_samples(fuse(rest, kf), rest.labels)
    gained = right.mean() - val.correct[-1].mean()
    assert diagnose(record, split=3).fused.value == pytest.approx(gained)
    assert diagnose(val, split=3).summary() == diagnose(record, split=3).summary()


def test_the_test_half_is_refused_and_not_looked_at():
    record = forgetful()
    with pytest.raises(InputError, match="test half"):
        diagnose(record.split(0)[1])
    spoiled = record.probs.copy()
    places = np.random.default_rng(0).permutation(400)[200:]
    spoiled[:, places] = 0.2
    predicted = record.predicted.copy()
    predicted[:, places] = 0
    other = RunRecord(**vars(record) | {"probs": spoiled, "predicted": predicted})
    assert diagnose(other).summary() == diagnose(record).summary()


def test_a_record_without_probabilities_is_diagnosed_as_far_as_it_goes(tmp_path):
    record = forgetful()
    record.save(tmp_path / "light.npz", light=True)
    light, full = diagnose(RunRecord.load(tmp_path / "light.npz")), diagnose(record)
    assert light.forget == full.forget
    assert light.fused is light.networks is None
    assert "fusion needs probabilities" in " ".join(light.sentences)
    assert light.advice == "stop early"


@pytest.fixture
def tracked(tmp_path):
    record = forgetful()
    tracker = Tracker(tmp_path / "tracked", record.labels)
    for probs in record.probs:
        tracker.note(probs)
    return tmp_path / "tracked"


def fmn(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["fmn", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr().out


def test_the_command_tells_people_and_programs(tracked, monkeypatch, capsys):
    found = diagnose(forgetful())
    text = fmn(monkeypatch, capsys, "diagnose", tracked)
    assert all(sentence in text for sentence in found.sentences)
    told = json.loads(fmn(monkeypatch, capsys, "diagnose", tracked, "--json"))
    assert told["final accuracy"] == forgetful().accuracy[-1]
    assert told["diagnosis"]["overfits"] is True
    assert told["diagnosis"]["worst_classes"] == found.worst_classes
    assert told["diagnosis"]["fused"]["low"] == pytest.approx(found.fused.low)
    assert len(told["diagnosis"]["classes"]) == 5
    fused = json.loads(fmn(monkeypatch, capsys, "fuse", tracked, "--json"))
    assert fused["gain, fused"]["low"] > 0
    assert (tracked / "fusion.json").exists()


def test_the_page_holds_everything_in_itself(tracked, monkeypatch, capsys, tmp_path):
    fmn(monkeypatch, capsys, "diagnose", tracked, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count('<img src="data:image/svg+xml;base64,') == 2
    alts = re.findall(r'alt="([^"]*)"', text)
    assert all(len(alt) > 60 for alt in alts)
    assert len(alts) == 2
    assert "epoch 2" in alts[0]
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "Take the checkpoint of epoch 2" in text
    assert text.count("<tr") == 6
    fmn(monkeypatch, capsys, "diagnose", tracked, "--html", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_the_page_of_a_name_that_is_markup():
    record = steady()
    text = page(record, diagnose(record), None, title="<b>&")
    assert "<h1>&lt;b&gt;&amp;</h1>" in text
    assert text.count("<img") == 1
