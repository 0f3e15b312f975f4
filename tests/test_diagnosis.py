"""The diagnosis of records whose truth is known, and of real runs."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax

from fmnlib import InputError, RunRecord
from fmnlib.__main__ import main
from fmnlib.diagnosis import (
    Option,
    _certain,
    _cross_fit,
    _epochs_of,
    _mixtures,
    _networks,
    _right_mixtures,
    _widened_level,
    diagnose,
)
from fmnlib.fusion import fuse, knowledge_fusion, right_samples
from fmnlib.report import page
from fmnlib.stats import Gain, mean_gain, paired_gain
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


def independent(seed, classes, epochs=20, samples=800, slow=0.0):
    """A stationary run: each epoch knows as much as any other, and is wrong about others."""
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    own, noise = rng.normal(size=(2, samples, classes))
    own[np.arange(samples), labels] += 2
    probs = np.empty((epochs, samples, classes))
    for epoch in range(epochs):
        fresh = rng.normal(size=(samples, classes))
        noise = slow * noise + (1 - slow**2) ** 0.5 * fresh
        probs[epoch] = softmax(2 * (own + noise), axis=1)
    return RunRecord.from_arrays(probs, labels)


def swapping(samples=400):
    """Accuracy holds at 80%: what is known of samples 0 to 19% is swapped for 20 to 39%."""
    labels, place = np.arange(samples) % 5, np.random.default_rng(3).permutation(samples)
    right = np.ones((12, samples), bool)
    right[:6] = place >= 0.2 * samples
    right[6:] = (place < 0.2 * samples) | (place >= 0.4 * samples)
    predicted = np.where(right, labels, (labels + 1) % 5)
    probs = np.full((12, samples, 5), 0.025)
    np.put_along_axis(probs, predicted[..., None], np.where(right, 0.9, 0.6)[..., None], axis=2)
    other = np.where(right, (labels + 1) % 5, labels)[..., None]
    np.put_along_axis(probs, other, np.where(right, 0.025, 0.325)[..., None], axis=2)
    return RunRecord.from_arrays(probs, labels)


def test_where_nothing_is_forgotten_it_says_so():
    found = diagnose(steady())
    assert (found.verdict, found.overfits) == ("none", False)
    assert found.forget.value == 0
    assert found.worst_classes == []
    assert found.lost_by is None
    assert found.advice == "leave"
    assert found.sentences[0].startswith("Leave the final network as it is")
    assert "Nothing beyond churn is certain" in str(found)
    assert found.sentences[-1].startswith("Forget fraction: ")  # of what nobody lost no more
    fused = found.options[-1]
    assert fused.gain.low <= 0 <= fused.gain.high


def test_what_is_forgotten_is_found_where_it_is():
    record = forgetful(800)
    found = diagnose(record)
    val = record.split(0)[0]
    assert found.verdict == "classic"  # nothing was learned in its place
    assert found.forget.value == found.lost.value == (~val.correct[-1]).mean()
    assert found.accuracy_drop.value == pytest.approx(found.lost.value)
    assert found.forget.low < found.forget.value < found.forget.high
    assert sorted(found.worst_classes) == [1, 3]
    told = ", ".join(f"{c} ({found.classes['lost'][c]:.0%})" for c in found.worst_classes)
    assert f"classes, 2 lost for certain, most of all {told}." in " ".join(str(found).split())
    assert (found.epoch, found.early_epoch, found.lost_by) == (2, 2, 6)
    assert 2 <= found.around < 6
    assert found.networks == 2  # of 12 epochs
    assert found.samples == 400
    counted = [(~val.correct[-1] & (val.labels == c)).sum() for c in range(5)]
    assert (found.classes["forgotten"] * found.classes["samples"]).tolist() == counted
    assert (found.classes["lost"] * found.classes["samples"]).tolist() == counted
    assert found.options[0].gain.value == found.forget.value  # all of it comes back
    assert found.advice == "stop early"
    assert found.sentences[0].startswith("Take the checkpoint of epoch 2")
    assert "Classic overfitting: the accuracy of a network fell by" in " ".join(found.sentences)
    assert "Of 5 classes, 2 lost for certain" in found.sentences[-1]
    assert max(map(len, str(found).splitlines())) <= 76


def test_what_the_last_epoch_alone_loses_is_lost_by_then():
    labels = np.arange(400) % 5
    right = np.ones((10, 400), bool)
    right[9] = np.random.default_rng(0).random(400) > 0.4
    found = diagnose(record_of(np.where(right, labels, (labels + 1) % 5), labels, 5))
    assert found.lost_by == 9
    assert 0.3 < found.forget.value < 0.5


def test_knowledge_that_is_swapped_for_other_knowledge_is_local_overfitting():
    found = diagnose(swapping())
    assert found.verdict == "local"
    assert found.accuracy_drop.low <= 0
    assert min(found.lost.low, found.hidden_loss.low) > 0.08
    assert found.advice == "distil"
    assert found.best.networks > 1
    assert found.sentences[0].startswith(f"Mix {found.best.name}: +")
    assert "Local overfitting: accuracy held, but knowledge was lost" in " ".join(found.sentences)


@pytest.mark.parametrize(("classes", "slow"), [(2, 0.0), (10, 0.0), (10, 0.5)])
def test_churn_raises_no_alarm(classes, slow):
    """At most one in twenty; of 60 runs, up to 6 with a chance of 3% if it were exactly that."""
    runs = (independent(s, classes, slow=slow) for s in range(60))
    assert sum(diagnose(run).overfits for run in runs) <= 6


def test_churn_of_many_classes_raises_no_alarm():
    """Of 20 runs, up to 3 with a chance of 2%."""
    runs = (independent(s, 50, samples=1000) for s in range(20))
    assert sum(diagnose(run).overfits for run in runs) <= 3


def test_votes_of_a_light_record_raise_no_alarm_either():
    runs = (dataclasses.replace(independent(s, 10), probs=None) for s in range(40))
    assert sum(diagnose(run).overfits for run in runs) <= 5


def test_a_tenth_that_two_classes_lost_is_found():
    """10.8% are right in mid-training and wrong at the end."""
    labels = np.arange(1000) % 2
    lost = np.random.default_rng(0).random(1000) < 0.108
    right = np.ones((20, 1000), bool)
    right[12:] = ~lost
    right &= np.random.default_rng(1).random((20, 1000)) > 0.05
    found = diagnose(record_of(np.where(right, labels, 1 - labels), labels, 2))
    assert found.verdict == "classic"
    assert found.accuracy_drop.low < 0.108 < found.accuracy_drop.high


@pytest.mark.parametrize("epochs", [2, 3])
def test_few_epochs_that_rise_raise_no_alarm(epochs):
    rng, labels = np.random.default_rng(0), np.arange(2000) % 10
    accuracy = np.linspace(0.85, 0.9, epochs)[:, None]
    right = rng.random((epochs, 2000)) < accuracy
    found = diagnose(record_of(np.where(right, labels, (labels + 1) % 10), labels, 10))
    assert found.verdict == "none"
    assert "fewer than four epochs" in " ".join(found.sentences)


@pytest.mark.parametrize("classes", [2, 10, 200])
def test_predictions_that_have_nothing_to_do_with_the_labels_are_refused(classes):
    rng = np.random.default_rng(0)
    labels, predicted = np.arange(4000) % classes, rng.integers(0, classes, (20, 4000))
    with pytest.raises(InputError, match="no epoch is better than chance.*order of the pred"):
        diagnose(record_of(predicted, labels, classes))
    shuffled = dataclasses.replace(forgetful(), labels=rng.permutation(forgetful().labels))
    with pytest.raises(InputError, match="no epoch is better than chance"):
        diagnose(shuffled)


def test_fewer_samples_than_folds_are_told_of():
    record = RunRecord.from_arrays(np.full((6, 8, 2), 0.5), [0, 1] * 4)
    with pytest.raises(InputError, match="4 samples do not make 5 parts; record more"):
        diagnose(record)


def test_one_epoch_has_no_past():
    with pytest.raises(InputError, match="one epoch; record two or more"):
        diagnose(forgetful().final())


def test_intervals_hold_what_other_samples_show():
    """The choice on few samples, judged by all: 95% intervals, which hold the choice as well."""
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 5, 6000), np.zeros((8, 6000, 5))
    own, late = rng.normal(size=(2, 6000, 5))
    for epoch in range(8):
        logits[epoch] = own + late * epoch / 10 + rng.normal(size=(6000, 5))
        logits[epoch, np.arange(6000), labels] += 1.5 + epoch / 10
    record = RunRecord.from_arrays(np.exp(logits) / np.exp(logits).sum(2, keepdims=True), labels)
    held = dict.fromkeys(("early stopping", "Knowledge Fusion"), 0)
    for seed in range(100):
        few = np.random.default_rng(seed).choice(6000, 300, replace=False)
        val = record.take(np.sort(few), "val")
        found = diagnose(val, split=seed)
        gains = {option.name: option.gain for option in found.options}
        truth = {
            "early stopping": record.correct[found.early_epoch].mean(),
            "Knowledge Fusion": right_samples(
                fuse(record, knowledge_fusion(val, start="best")), labels
            ).mean(),
        }
        for name, accuracy in truth.items():
            gain = accuracy - record.accuracy[-1]
            held[name] += gains[name].low <= gain <= gains[name].high
    assert min(held.values()) >= 91  # 95 less two deviations


def test_the_interval_of_a_mean_is_that_of_the_central_limit_theorem():
    values = np.array([0.0, 1.0, 1.0, 2.0, 3.0])
    half = 1.959964 * values.std(ddof=1) / 5**0.5
    found = mean_gain(values, 0.95)
    assert [found.value, found.low, found.high] == pytest.approx([1.4, 1.4 - half, 1.4 + half])
    erf = 0.994425  # of 1.959964, for twice the variance
    assert _widened_level(0.05) == pytest.approx(erf, abs=1e-6)


def test_votes_count_alike_and_the_later_half_decides_where_they_are_equal():
    predicted = np.array([[0, 0, 1], [0, 0, 1], [0, 1, 0], [1, 1, 0]])
    probs = np.full((4, 3, 2), 0.5)
    record = dataclasses.replace(
        RunRecord.from_arrays(probs, np.zeros(3, int)), predicted=predicted, probs=None
    )
    right = _right_mixtures(record, [((0, 4),), ((0, 3),), ((0, 1), (2, 3))])
    assert right.tolist() == [[True, False, True], [True, True, False], [True, False, True]]


def test_what_is_chosen_on_four_folds_is_scored_on_the_fifth():
    rng, fold_of = np.random.default_rng(1), np.arange(25) % 5
    candidates = rng.random((4, 25)) < 0.5
    expected = []
    for sample in range(25):
        others = [n for n in range(25) if fold_of[n] != fold_of[sample]]
        best = max(candidates, key=lambda row: sum(row[others]))
        expected.append(bool(best[sample]))
    assert _cross_fit(candidates, fold_of).tolist() == expected
    assert expected not in candidates.tolist()  # not every fold chose the same


def test_a_diagnosis_does_not_change():
    found = diagnose(forgetful())
    for one, field in ((found, "epoch"), (found.options[0], "name"), (found.forget, "low")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, field, None)
    with pytest.raises(TypeError, match="positional"):
        Option("early stopping", 1, found.lost, found.lost)


def test_what_the_accuracy_does_not_show_is_the_rest():
    for record in (forgetful(), swapping(), independent(1, 5)):
        found = diagnose(record)
        assert found.hidden_loss.value == pytest.approx(
            found.lost.value - found.accuracy_drop.value
        )


def test_a_loss_of_interest_is_certain_and_not_tiny():
    assert _certain(Gain(0.005, 0.001, 0.01))  # the smallest difference of interest
    assert not _certain(Gain(0.0049, 0.001, 0.01))
    assert not _certain(Gain(0.1, 0.0, 0.2))


def test_a_class_has_the_interval_that_holds_for_all_together():
    found, val = diagnose(forgetful()), forgetful().split(0)[0]
    for label, row in found.classes.iterrows():
        late = val.correct[-1][val.labels == label]
        expected = paired_gain(np.ones_like(late), late, _widened_level(0.05 / 5))
        assert (row["lost"], row["low"], row["high"]) == dataclasses.astuple(expected)


def told(found, **changes):
    return " ".join(dataclasses.replace(found, **changes).sentences)


def test_a_rise_is_told_as_one():
    found = diagnose(steady())
    rise, most, least = (f"{-100 * v:.1f}" for v in dataclasses.astuple(found.accuracy_drop))
    assert f"accuracy of a network rose by {rise} points ({least} to {most})" in told(found)
    assert float(rise) > 0
    still = Gain(0.0, -0.01, 0.01)
    assert "network fell by 0.0 points (-1.0 to 1.0)" in told(found, accuracy_drop=still)


def test_what_the_fall_does_not_show_is_told_where_it_is_certain():
    found, more = diagnose(forgetful()), "; more was lost than that shows: with networks"
    assert more in told(found, hidden_loss=Gain(0.1, 0.05, 0.15))
    assert more not in told(found, hidden_loss=Gain(0.1, 0.0, 0.2))


@pytest.mark.parametrize(("epochs", "last"), [(3, True), (4, False), (12, False)])
def test_few_epochs_are_told_of(epochs, last):
    labels = np.arange(2000) % 10
    right = np.random.default_rng(0).random((epochs, 2000)) < 0.85
    text = told(diagnose(record_of(np.where(right, labels, (labels + 1) % 10), labels, 10)))
    assert ("fewer than four epochs" in text) == last
    assert ("the last one would gain" in text) == last
    assert ("late ones together would gain" in text) != last


def test_the_classes_that_lost_most_come_first_and_five_are_named():
    found = diagnose(forgetful())
    names = [f"class-{letter}-of-a-name-with-{2 * letter}-hyphens" for letter in "abcdefgh"]
    lost = np.array([0.3, 0.1, 0.2, 0.8, 0.7, 0.6, 0.5, 0.4])
    low = np.where(lost == 0.1, 0.0, lost / 2)
    classes = pd.DataFrame({"samples": 9, "lost": lost, "low": low}, index=names)
    changed = dataclasses.replace(found, classes=classes)
    first = [names[place] for place in (3, 4, 5, 6, 7, 0, 2)]
    assert changed.worst_classes == first
    named = ", ".join(f"{n} ({lost[names.index(n)]:.0%})" for n in first[:5])
    assert f"Of 8 classes, 7 lost for certain, most of all {named}." in told(changed)
    assert all(name in str(changed) for name in first[:5])  # no line ends within a name
    nobody = dataclasses.replace(found, classes=classes.assign(low=0.0))
    assert told(nobody).endswith("Of 8 classes, 0 lost for certain.")


def test_it_is_printed_with_a_line_for_each_option():
    found = diagnose(forgetful())
    lines = str(found).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("early stopping"))
    for option, line in zip(found.options, lines[start:]):
        assert " ".join(line.split()).startswith(f"{option.name} {option.gain}")
    assert "over the final network" in " ".join(lines[:start])
    assert not any("networks" in line and "gain" in line for line in lines[:start])
    assert lines[start + len(found.options)].startswith("Knowledge Fusion minus the best")


def test_mixtures_by_hand():
    before, late = _mixtures(24)
    last = (22, 24)
    assert before[:4] == [((0, 4),), ((1, 3), last), ((2, 6),), ((3, 5), last)]
    assert len(before) == 14
    assert late == [((16, 18), last), ((18, 20), last), ((20, 22), last)]


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
    stopped, *mixtures = found.options
    assert stopped.gain.low <= 0 < stopped.behind.low
    assert max(option.gain.low for option in mixtures) > 0
    assert found.advice == "distil"


def test_copies_of_samples_change_nothing_where_groups_tell_of_them():
    names, run = np.array([f"patient {i}" for i in range(400)]), forgetful()
    alone = RunRecord.from_arrays(run.probs, run.labels, ids=names)
    place = np.random.default_rng(0).permutation(np.repeat(np.arange(400), 6))
    probs, labels = run.probs[:, place], run.labels[place]
    once = diagnose(alone)
    grouped = diagnose(RunRecord.from_arrays(probs, labels, groups=names[place]))
    blind = diagnose(RunRecord.from_arrays(probs, labels))

    def widths(found):
        gains = [found.forget, found.accuracy_drop, found.lost, found.options[0].gain]
        rows = found.classes.loc[[1, 3]]
        return np.array([g.high - g.low for g in gains] + [*(rows["lost"] - rows["low"])])

    np.testing.assert_allclose(widths(grouped), widths(once), rtol=0.2)  # Student's quantiles
    assert (widths(blind) < 0.6 * widths(once)).all()


def test_the_advice_is_the_cheapest_that_is_not_certainly_worse():
    none, good, better = Gain(0.0, -0.05, 0.05), Gain(0.04, 0.01, 0.08), Gain(0.09, 0.05, 0.12)
    found = diagnose(forgetful())

    def advice(*options):
        rows = (
            Option(name=str(i), networks=n, gain=gain, behind=behind)
            for i, (n, gain, behind) in enumerate(options)
        )
        changed = dataclasses.replace(found, options=tuple(rows))
        return changed.advice, changed.best and changed.best.name

    barely, beside = Gain(0.04, 0.0, 0.08), Gain(0.02, 0.0, 0.04)
    assert advice((1, none, none), (5, none, none)) == ("leave", None)
    assert advice((1, barely, none), (5, none, none)) == ("leave", None)
    assert advice((1, good, beside), (5, better, none)) == ("stop early", "0")
    assert advice((1, good, none), (5, better, none)) == ("stop early", "0")
    assert advice((1, good, good), (5, better, none)) == ("distil", "1")
    assert advice((1, none, none), (5, good, none), (7, better, none)) == ("distil", "1")
    assert advice((1, good, good), (5, good, good), (7, better, none)) == ("distil", "2")
    assert advice((1, good, good), (5, good, none), (3, better, none)) == ("distil", "2")


def test_the_gain_is_scored_on_samples_that_did_not_choose():
    record = independent(0, 5, samples=400)  # the choice follows the samples
    val, folds = record.split(3)[0], 5
    fold_of = np.random.default_rng(3).permutation(len(val.labels)) % folds
    right = np.zeros(len(val.labels), bool)
    for fold in range(folds):
        inside = np.flatnonzero(fold_of == fold)
        kf = knowledge_fusion(val.take(np.flatnonzero(fold_of != fold), "val"), start="best")
        rest = val.take(inside, "val")
        right[inside] = right_samples(fuse(rest, kf), rest.labels)
    gained = right.mean() - val.correct[-1].mean()
    assert diagnose(record, split=3).options[-1].gain.value == pytest.approx(gained)
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
    assert light.verdict == full.verdict == "classic"  # by votes
    assert light.over_simple is None
    assert [option.name for option in light.options] == ["early stopping"]
    assert "Mixtures are not scored" in " ".join(light.sentences)
    assert light.advice == "stop early"


def test_where_few_epochs_have_probabilities_votes_of_all_decide():
    record = forgetful()
    few, light = record.keep([0, 11]), dataclasses.replace(record, probs=None)
    for name in ("lost", "accuracy_drop", "hidden_loss", "verdict"):
        assert getattr(diagnose(few), name) == getattr(diagnose(light), name)


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
    assert all(sentence in " ".join(text.split()) for sentence in found.sentences)
    told = json.loads(fmn(monkeypatch, capsys, "diagnose", tracked, "--json"))
    assert told["final accuracy"] == forgetful().accuracy[-1]
    assert told["diagnosis"]["overfits"] is True
    assert told["diagnosis"]["worst_classes"] == found.worst_classes
    assert told["diagnosis"]["verdict"] == "classic"
    low = told["diagnosis"]["options"][-1]["gain"]["low"]
    assert low == pytest.approx(found.options[-1].gain.low)
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
    assert text.count("<tr") == 12  # classes and options, with their heads
    fmn(monkeypatch, capsys, "diagnose", tracked, "--html", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_the_page_of_a_name_that_is_markup():
    record = steady()
    text = page(record, diagnose(record), None, title="<b>&")
    assert "<h1>&lt;b&gt;&amp;</h1>" in text
    assert text.count("<img") == 1


BEYOND_MEMORY = """
import resource, sys
import numpy as np
from pathlib import Path
from fmnlib import diagnose, fuse, knowledge_fusion, record
from fmnlib.tracker import load_tracked

record._COPIED = 2**20
run = load_tracked(sys.argv[1])
size = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1])
limit = 1024 * size + 130 * 2**20  # half of the probabilities is more than that
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(diagnose(run).verdict)
val, test = run.split(0)
print(fuse(test, knowledge_fusion(val)).shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_record_that_does_not_fit_in_memory_is_diagnosed_and_fused(tmp_path):
    """320 MB of probabilities; 130 MB may be used."""
    rng, labels = np.random.default_rng(0), np.arange(20_000) % 200
    tracker = Tracker(tmp_path / "tracked", labels)
    for epoch in range(40):
        probs = rng.random((20_000, 200), np.float32)
        probs[np.arange(20_000), labels] += 0.8 if epoch < 25 else 0.4
        tracker.note(probs / probs.sum(axis=1, keepdims=True), epoch=epoch)
    words = [sys.executable, "-c", BEYOND_MEMORY, str(tmp_path / "tracked")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "classic\n(10000, 200)\n"


def test_mixtures_are_of_the_kept_epochs_where_these_are_four_or_more_with_the_last():
    record = forgetful()
    every, last = range(record.epochs), record.epochs - 1
    cases = ([1, 2, 4, last], [1, 2, 4, last]), ([1, 2, last], every), ([1, 2, 4, 6], every)
    for kept, expected in cases:
        assert _epochs_of(record.keep(kept)).tolist() == list(expected)


def test_mixtures_hold_a_tenth_of_the_epochs_twice_and_eight_at_most():
    for rows, networks in ((2, 1), (3, 1), (4, 2), (19, 2), (20, 4), (30, 6), (40, 8), (60, 8)):
        early, late = _mixtures(rows)
        sizes = {sum(stop - start for start, stop in spans) for spans in early + late}
        assert sizes == {networks}, rows
        assert all(spans[-1][1] == rows for spans in late)
        assert max(spans[0][1] for spans in early) <= min(spans[0][0] for spans in late)
    assert [_networks(number) for number in (1, 2)] == ["one network", "2 networks"]
    assert _mixtures(3) == ([((0, 1),), ((1, 2),)], [((2, 3),)])


@pytest.mark.parametrize(
    ("gain", "certain"),
    [
        ((0.00498, 0.001, 0.01), False),
        ((0.005, 0.001, 0.01), True),
        ((0.02, -0.001, 0.04), False),
    ],
)
def test_a_gain_is_certain_above_zero_and_the_smallest_of_interest(gain, certain):
    assert _certain(Gain(*gain)) is certain


def test_the_order_of_samples_with_ids_does_not_matter():
    run, drops = independent(1, 3, epochs=32, samples=60), set()
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(60)
        record = RunRecord.from_arrays(run.probs[:, order], run.labels[order], ids=order)
        drops.add(round(diagnose(record).accuracy_drop.value, 9))
    assert len(drops) == 1


def test_votes_decide_where_the_last_epoch_is_not_kept():
    few = forgetful().keep([0, 2, 3, 5])
    assert _epochs_of(few).tolist() == list(range(12))
    assert "the last 4 kept epochs" in {option.name for option in diagnose(few).options}


def test_one_checkpoint_has_one_gain():
    rng = np.random.default_rng(981)  # a record where the fusion is early stopping's network
    classes, epochs, samples = (
        int(rng.choice(n)) for n in ([2, 3, 10], [3, 4, 5, 6, 8], [60, 120, 300])
    )
    labels = rng.integers(0, classes, samples)
    own = rng.normal(size=(samples, classes))
    own[np.arange(samples), labels] += rng.uniform(0.5, 2)
    spread = rng.uniform(0.2, 1.5, epochs)
    spread[-1] = rng.uniform(1, 4)
    logits = np.array([own + s * rng.normal(size=own.shape) for s in spread]) * rng.choice([1, 4])
    options = diagnose(RunRecord.from_arrays(softmax(logits, axis=2), labels)).options
    assert [option.networks for option in options[-2:]] == [1, 1]
    assert len({str(option.gain) for option in options if option.networks == 1}) == 1


def test_nothing_is_said_of_what_no_sample_lost():
    assert "None" not in told(diagnose(forgetful()), lost_by=None)
