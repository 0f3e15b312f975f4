"""What holds for any record, drawn by Hypothesis: identities of scores, fusions and intervals.

The examples are few, and the same in every run.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fmnlib import RunRecord, fusion, scores
from fmnlib.record import folds
from fmnlib.stats import paired_gain, proportion

settings.register_profile("few", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("few")

# The types of arrays are checked by beartype, which looks at random items.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
COUNTS = st.integers(0, 60)
MASKS = st.tuples(st.integers(1, 8), st.integers(1, 30)).flatmap(
    lambda shape: arrays.arrays(bool, shape)
)


@st.composite
def records(draw, least_epochs=1):
    """A record whose probabilities are any positive numbers of sum 1, ties among them likely."""
    epochs, samples = draw(st.integers(least_epochs, 6)), draw(st.integers(2, 12))
    classes = draw(st.integers(2, 4))
    marks = arrays.arrays(np.int64, (epochs, samples, classes), elements=st.integers(1, 8))
    probs = draw(marks) / 1.0
    probs /= probs.sum(axis=2, keepdims=True)
    labels = draw(arrays.arrays(np.int64, samples, elements=st.integers(0, classes - 1)))
    return RunRecord.from_arrays(probs, labels)


def count(fractions, correct):
    return np.rint(np.asarray(fractions) * correct.shape[1]).astype(int)


# ---------------------------------------------------------------- scores


@given(MASKS)
def test_what_was_learned_less_what_was_forgotten_is_what_was_gained(correct):
    forgotten = count(scores.forget_fraction(correct), correct)
    learned = count(scores.learn_fraction(correct), correct)
    right = correct.sum(axis=1)
    np.testing.assert_array_equal(right[-1] - right, learned - forgotten)
    assert (0 <= forgotten).all()
    assert (forgotten <= right).all()
    assert (learned <= right[-1]).all()
    assert (forgotten <= correct.shape[1] - right[-1]).all()
    retained = count(scores.retained_fraction(correct), correct)
    np.testing.assert_array_equal(retained, right - forgotten)


@given(MASKS, st.randoms(use_true_random=False))
def test_scores_do_not_know_the_order_of_samples(correct, random):
    order = list(range(correct.shape[1]))
    random.shuffle(order)
    for score in (scores.forget_fraction, scores.learn_fraction, scores.retained_fraction):
        np.testing.assert_array_equal(score(correct), score(correct[:, order]))
    last = scores.last_correct_epoch(correct)
    np.testing.assert_array_equal(scores.last_correct_epoch(correct[:, order]), last[order])


@given(MASKS)
def test_the_forget_time_is_the_last_epoch_that_is_right(correct):
    for sample, last in zip(correct.T, scores.last_correct_epoch(correct), strict=True):
        assert not sample[last + 1 :].any()
        assert last == -1 or sample[last]


@given(arrays.arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1)))
def test_a_dip_falls_and_no_other_falls_further(accuracy):
    peak, bottom = scores.dip(accuracy)
    assert 0 <= peak <= bottom < len(accuracy)
    falls = [accuracy[i] - later for i in range(len(accuracy)) for later in accuracy[i:]]
    assert accuracy[peak] - accuracy[bottom] == max(falls)


# ---------------------------------------------------------------- fusion

SEARCHES = {
    "papers'": lambda val: fusion.knowledge_fusion(val),
    "anchored": lambda val: fusion.knowledge_fusion(val, start="best"),
    "grid": lambda val: fusion.knowledge_fusion(val, grid=np.arange(0, 1.005, 0.05)),
    "exhaustive": lambda val: fusion.exhaustive_fusion(val),
    "greedy": lambda val: fusion.greedy_selection(val, 4),
    "likelihood": lambda val: fusion.likelihood_weights(val),
    "best": lambda val: fusion.best_epochs(val),
}


@given(records(), st.sampled_from(sorted(SEARCHES)))
def test_weights_are_shares_and_the_mixture_is_a_distribution(val, search):
    found = SEARCHES[search](val)
    assert (found.weights >= 0).all()
    assert abs(found.weights.sum() - 1) < 1e-9
    mixed = fusion.fuse(val, found)
    np.testing.assert_allclose(mixed.sum(axis=1), 1, atol=5e-3)  # half precision
    assert 1 <= found.networks <= val.epochs
    for epoch, share in found.picks:
        assert 0 <= epoch < val.epochs
        assert 0 < share <= 1


@given(records())
def test_a_fusion_is_never_below_where_it_started(val):
    start = fusion.accuracy(val, fusion.single(val))
    assert fusion.accuracy(val, fusion.knowledge_fusion(val)) >= start
    assert fusion.accuracy(val, fusion.exhaustive_fusion(val)) >= start
    stopped = fusion.accuracy(val, fusion.early_stopping(val))
    assert stopped == val.accuracy.max()
    assert fusion.accuracy(val, fusion.knowledge_fusion(val, start="best")) >= stopped


@given(records())
def test_each_pick_makes_a_fusion_more_accurate(val):
    picks = len(fusion.knowledge_fusion(val).picks)
    reached = [fusion.accuracy(val, fusion.single(val))]
    for most in range(1, picks + 1):
        reached.append(fusion.accuracy(val, fusion.knowledge_fusion(val, max_picks=most)))
    assert reached == sorted(set(reached))


@given(records(), st.randoms(use_true_random=False), st.sampled_from(sorted(SEARCHES)))
def test_a_search_does_not_know_the_order_of_samples(val, random, search):
    order = np.arange(len(val.labels))
    random.shuffle(order)
    other = SEARCHES[search](val.take(order, "val"))
    np.testing.assert_allclose(SEARCHES[search](val).weights, other.weights, atol=1e-12)


@given(records(least_epochs=2), st.floats(0.01, 0.99))
def test_a_sample_is_right_inside_its_interval_of_shares(record, share):
    fused, candidate = (np.asarray(probs, np.float64) for probs in record.probs[:2])
    lo, hi = fusion.share_intervals(fused, candidate, record.labels)
    mixed = (1 - share) * fused + share * candidate
    right = fusion.right_samples(mixed, record.labels)
    clear = (abs(lo - share) > 1e-9) & (abs(hi - share) > 1e-9)
    np.testing.assert_array_equal(right[clear], ((lo < share) & (share < hi))[clear])
    best, most, width = fusion.best_share(lo, hi)
    assert 0 < best < 1
    assert most == ((lo < best) & (best < hi)).sum()
    assert most >= ((lo + 1e-9 < share) & (share < hi - 1e-9)).sum() or width < 1e-9


@given(records(), st.integers(0, 9))
def test_a_fusion_is_read_back_as_it_was_written(val, split):
    found = dataclasses.replace(fusion.knowledge_fusion(val), split=split)
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder) / "fusion.json")
        again = fusion.Fusion.load(Path(folder) / "fusion.json")
    assert again.weights.tolist() == found.weights.tolist()
    assert (again.picks, again.window, again.split) == (found.picks, found.window, split)


# ---------------------------------------------------------------- intervals


@given(COUNTS, COUNTS, COUNTS)
def test_tangos_interval_holds_the_estimate_and_mirrors(won, lost, tied):
    samples = won + lost + tied
    if not samples:
        return
    right, baseline = np.zeros(samples, bool), np.zeros(samples, bool)
    right[:won] = baseline[won : won + lost] = True
    right[won + lost :] = baseline[won + lost :] = True
    gain, mirrored = paired_gain(right, baseline), paired_gain(baseline, right)
    assert gain.value == (won - lost) / samples
    assert -1 <= gain.low <= gain.value <= gain.high <= 1
    np.testing.assert_allclose(
        [mirrored.value, mirrored.low, mirrored.high],
        [-gain.value, -gain.high, -gain.low],
        atol=1e-8,
    )
    wider = paired_gain(right, baseline, level=0.99)
    assert wider.low <= gain.low + 1e-8
    assert wider.high >= gain.high - 1e-8


@given(COUNTS, COUNTS)
def test_wilsons_interval_holds_the_share_and_mirrors(hits, misses):
    if not hits + misses:
        return
    hit = np.arange(hits + misses) < hits
    share, other = proportion(hit), proportion(~hit)
    assert 0 <= share.low <= share.value + 1e-12
    assert share.value - 1e-12 <= share.high <= 1
    np.testing.assert_allclose([other.low, other.high], [1 - share.high, 1 - share.low], atol=1e-9)


# ---------------------------------------------------------------- records


@given(records(), st.booleans(), st.booleans())
def test_a_record_is_read_back_as_it_was_written(record, light, compress):
    with tempfile.TemporaryDirectory() as folder:
        record.save(Path(folder) / "r.npz", light=light, compress=compress)
        again = RunRecord.load(Path(folder) / "r.npz")
    for name in ("labels", "predicted", "kept"):
        np.testing.assert_array_equal(getattr(again, name), getattr(record, name))
    assert (again.classes, again.half, again.curves.keys()) == (
        record.classes,
        record.half,
        record.curves.keys(),
    )
    assert (again.probs is None) == light
    if not light:
        np.testing.assert_array_equal(again.probs, np.asarray(record.probs, np.float16))


@given(records(), st.integers(0, 99))
def test_halves_are_disjoint_and_whole(record, seed):
    val, test = record.split(seed)
    assert sorted([*val.index, *test.index]) == list(range(len(record.labels)))
    assert (val.half, test.half) == ("val", "test")
    assert abs(len(val.labels) - len(test.labels)) <= 1
    np.testing.assert_array_equal(val.labels, record.labels[val.index])


@given(
    st.lists(st.integers(0, 8), min_size=4, max_size=40).filter(lambda g: len(set(g)) >= 3),
    st.integers(0, 99),
    st.randoms(use_true_random=False),
)
def test_groups_stay_together_in_any_order(groups, seed, random):
    names = np.array(groups)
    plain = RunRecord.from_arrays(np.full((1, len(names), 2), 0.5), np.zeros(len(names), int))
    record = dataclasses.replace(plain, groups=names)
    val, test = record.split(seed)
    assert not set(val.groups.tolist()) & set(test.groups.tolist())
    assert len(val.labels) + len(test.labels) == len(names)
    parts = folds(record, 3, seed)
    assert all(len(set(parts[names == name])) == 1 for name in set(groups))
    assert set(parts.tolist()) == {0, 1, 2}
    order = np.arange(len(names))
    random.shuffle(order)
    again = dataclasses.replace(record, groups=names[order]).split(seed)[0]
    assert set(again.groups.tolist()) == set(val.groups.tolist())
