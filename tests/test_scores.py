"""fmnlib.scores: identities in whole samples, and plain loops."""

import numpy as np
import pytest
from scipy.stats import binom

from fmnlib.scores import (
    at_chance,
    by_class,
    covering,
    dip,
    dips_of_others,
    forget_fraction,
    forgotten_after,
    last_correct_epoch,
    learn_fraction,
    retained_fraction,
)

EPOCHS, SAMPLES, CLASSES = 7, 40, 5


@pytest.fixture(params=range(6))
def seed(request):
    return request.param


@pytest.fixture
def correct(seed):
    rng = np.random.default_rng(seed)
    return rng.random((EPOCHS, SAMPLES)) < rng.random(SAMPLES)


def whole(fraction):
    """The number of samples; exact, so that the identities hold without a tolerance."""
    count = fraction * SAMPLES
    np.testing.assert_allclose(count, count.round(), rtol=0, atol=1e-9)
    return count.round().astype(int)


def test_final_accuracy_is_what_was_plus_learned_minus_forgotten(correct):
    forgotten, learned = whole(forget_fraction(correct)), whole(learn_fraction(correct))
    right = correct.sum(axis=1)
    assert (right + learned - forgotten).tolist() == [right[-1]] * EPOCHS
    assert forgotten[-1] == learned[-1] == 0
    assert forgotten.max() > 0
    assert whole(retained_fraction(correct)).tolist() == (right - forgotten).tolist()
    assert learn_fraction(~correct).tolist() == forget_fraction(correct).tolist()


def test_fractions_equal_plain_loops_against_any_final_predictor(correct, seed):
    final = np.random.default_rng(seed + 100).random(SAMPLES) < 0.6
    for last, given in [(correct[-1], {}), (final, {"final": final})]:
        pairs = [list(zip(rights, last, strict=True)) for rights in correct]
        forgotten = [sum(now and not end for now, end in epoch) for epoch in pairs]
        learned = [sum(end and not now for now, end in epoch) for epoch in pairs]
        assert whole(forget_fraction(correct, **given)).tolist() == forgotten
        assert whole(learn_fraction(correct, **given)).tolist() == learned


def test_last_correct_epoch_equals_plain_loops(correct):
    correct[:, 0], correct[:, 1] = False, True
    expected = [
        max((e for e in range(EPOCHS) if correct[e, n]), default=-1) for n in range(SAMPLES)
    ]
    assert last_correct_epoch(correct).tolist() == expected
    assert expected[:2] == [-1, EPOCHS - 1]


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_forgotten_after_equals_plain_loops(correct, epoch):
    expected = [
        any(correct[later, n] for later in range(epoch + 1, EPOCHS)) and not correct[-1, n]
        for n in range(SAMPLES)
    ]
    assert forgotten_after(correct, epoch).tolist() == expected


def test_forgotten_after_follows_from_the_forget_time(correct):
    last = last_correct_epoch(correct)
    for epoch in range(EPOCHS):
        after = (last > epoch) & (last < EPOCHS - 1)
        np.testing.assert_array_equal(forgotten_after(correct, epoch), after)


def test_dip_is_the_largest_fall_the_earliest_at_a_tie(seed):
    accuracy = np.random.default_rng(seed).integers(0, 9, EPOCHS) / 8
    falls = {
        (bottom, peak): accuracy[peak] - accuracy[bottom]
        for bottom in range(EPOCHS)
        for peak in range(bottom + 1)
    }
    bottom, peak = min(pair for pair in falls if falls[pair] == max(falls.values()))
    assert dip(accuracy) == (peak, bottom)
    assert peak < bottom
    assert dip(np.sort(accuracy)) == (0, 0)  # nothing falls


def test_a_single_run_has_its_own_dip():
    assert dips_of_others(np.array([[0.5, 0.8, 0.6, 0.7]])) == [(1, 2)]


def test_by_class_equals_plain_loops_and_adds_up(correct, seed):
    labels = np.random.default_rng(seed).integers(0, CLASSES - 1, SAMPLES)  # the last has none
    shares = by_class(correct, labels, CLASSES)
    assert shares.shape == (CLASSES, EPOCHS)
    assert np.isnan(shares[-1]).all()
    for label in range(CLASSES - 1):
        members = [n for n in range(SAMPLES) if labels[n] == label]
        means = [sum(correct[e, n] for n in members) / len(members) for e in range(EPOCHS)]
        assert shares[label].tolist() == means
    sizes = np.bincount(labels, minlength=CLASSES)
    total = np.nansum(shares * sizes[:, None], axis=0) / SAMPLES
    np.testing.assert_allclose(total, correct.mean(axis=1), rtol=0, atol=1e-12)


def test_the_level_at_which_chance_is_refused_is_shared_by_the_epochs():
    labels = np.arange(200) % 2
    chance = np.where(np.arange(200) < 100, labels, 1 - labels)
    better = np.where(np.arange(200) < 124, labels, 1 - labels)  # by chance once in 2,400 times
    assert not at_chance(better[None], labels)
    assert at_chance(np.array([chance] * 9 + [better]), labels)


def test_the_fewest_right_that_are_no_chance_are_those_of_the_binomial_test():
    labels = np.arange(200) % 2
    few = next(k for k in range(200) if binom.sf(k - 1, 200, 0.5) < 1e-3)

    def right(count):  # of predictions that name each class as often, nearly
        return np.where(np.arange(200) < count, labels, 1 - labels)[None]

    assert not at_chance(right(few), labels)
    assert at_chance(right(few - 1), labels)


def test_the_last_epoch_is_kept_though_it_alone_knows_nothing():
    correct = np.array([[True, True, False], [False, True, True], [False, True, False]])
    assert covering(correct, 2).tolist() == [0, 2]


def test_predictions_that_are_all_wrong_are_at_chance():
    labels = np.array([0] * 54 + [1] * 6)
    assert at_chance(1 - labels[None], labels)
