"""Intervals against what defines them: coverage by simulation, likelihood by brute force."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from fmnlib.stats import Gain, Interval, _design_effect, mean_gain, paired_gain, proportion

Z = 1.959963984540054


def pair(won, lost, samples):
    right, baseline = np.zeros((2, samples), bool)
    right[:won] = True
    baseline[won : won + lost] = True
    return right, baseline


def score_by_brute_force(delta, won, lost, samples):
    """Tango's statistic with the share of losses found by maximising the likelihood."""
    rest = samples - won - lost

    def minus_log_likelihood(q):
        shares = np.maximum([q + delta, q, 1 - 2 * q - delta], 1e-300)
        return -(np.array([won, lost, rest]) * np.log(shares)).sum()

    low, high = max(0, -delta), (1 - delta) / 2
    options = {"xatol": 1e-13}
    q = minimize_scalar(
        minus_log_likelihood, bounds=(low, high), method="bounded", options=options
    )
    variance = samples * (2 * q.x + delta - delta**2)
    return (won - lost - samples * delta) / np.sqrt(variance)


@pytest.mark.parametrize("counts", [(12, 9, 80), (30, 4, 100), (1, 0, 44), (5, 5, 20), (0, 7, 50)])
def test_the_ends_of_a_gain_are_where_the_score_is_at_its_quantile(counts):
    found = paired_gain(*pair(*counts))
    assert found.value == pytest.approx((counts[0] - counts[1]) / counts[2])
    assert score_by_brute_force(found.low, *counts) == pytest.approx(Z, abs=2e-3)
    assert score_by_brute_force(found.high, *counts) == pytest.approx(-Z, abs=2e-3)


def test_a_gain_and_the_loss_that_mirrors_it():
    right, baseline = pair(17, 3, 120)
    there, back = paired_gain(right, baseline), paired_gain(baseline, right)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


@pytest.mark.parametrize("counts", [(0, 0, 60), (60, 0, 60), (0, 60, 60), (1, 0, 1)])
def test_extreme_counts_have_intervals_too(counts):
    found = paired_gain(*pair(*counts))
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.02


def test_nineteen_in_twenty_intervals_hold_the_truth():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        kind = rng.choice(3, size=150, p=[0.10, 0.04, 0.86])
        found = paired_gain(kind == 0, kind == 1)
        inside += found.low <= 0.06 <= found.high
    assert 930 <= inside <= 970


def test_a_higher_level_is_wider():
    right, baseline = pair(17, 3, 120)
    assert paired_gain(right, baseline, 0.99).low < paired_gain(right, baseline).low
    assert proportion(np.arange(50) < 5, 0.99).high > proportion(np.arange(50) < 5).high


def test_a_share_by_the_quadratic_that_defines_it():
    found = proportion(np.arange(60) < 7)
    for end in (found.low, found.high):
        assert (7 / 60 - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / 60)


def test_intervals_read_well():
    assert str(Interval(0.25, 0.2, 0.305)) == "25.0% (20.0 to 30.5)"
    assert str(Gain(-0.01, -0.02, 0.005)) == "-1.0 points (-2.0 to +0.5)"


def grouped(rng, groups, size, alike):
    """Won, lost or neither: 30, 20 and 50%; a sample is like its group with some probability."""
    kinds = rng.choice(3, size=(2, groups, size), p=[0.3, 0.2, 0.5])
    copied = rng.random((groups, size)) < alike
    return np.where(copied, kinds[0, :, :1], kinds[1]).ravel(), np.repeat(np.arange(groups), size)


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("groups", [12, 80])
def test_samples_that_depend_on_each_other_widen_an_interval_as_far_as_they_have_to(groups, alike):
    rng, inside, naive = np.random.default_rng(1), np.zeros(3), 0
    for _ in range(400):
        kind, group = grouped(rng, groups, 10, alike)
        won, lost = kind == 0, kind == 1
        found = [
            (paired_gain(won, lost, groups=group), 0.1),
            (mean_gain(won * 1.0 - lost, groups=group), 0.1),
            (proportion(won, groups=group), 0.3),
        ]
        inside += [f.low <= truth <= f.high for f, truth in found]
        without = paired_gain(won, lost)
        naive += without.low <= 0.1 <= without.high
    assert (inside >= 0.92 * 400).all(), inside
    assert (inside <= 0.99 * 400).all(), inside
    assert alike < 1 or naive < 0.6 * 400


def test_copies_of_a_sample_add_nothing():
    rng = np.random.default_rng(2)
    right, baseline = rng.random((2, 200)) < [[0.8], [0.7]]
    once = paired_gain(right, baseline, groups=np.arange(200))
    copies = [np.repeat(values, 7) for values in (right, baseline, np.arange(200))]
    again = paired_gain(copies[0], copies[1], groups=copies[2])
    assert (again.low, again.high) == pytest.approx((once.low, once.high))


def test_groups_without_a_difference_count_as_one_sample_each():
    same = np.ones(100, bool)
    groups = np.repeat([f"image {i}" for i in range(20)], 5)
    found = paired_gain(same, same, groups=groups)
    assert found.high == pytest.approx(paired_gain(same[:20], same[:20], groups=groups[::5]).high)


def test_a_single_other_sample_does_not_narrow_an_interval_to_that_of_independent_ones():
    groups, same = np.repeat(np.arange(20), 50), np.zeros(1000, bool)
    one = np.arange(1000) == 7
    none, some = (proportion(mask, groups=groups) for mask in (same, one))
    assert some.high > 0.9 * none.high
    none, some = (paired_gain(mask, same, groups=groups) for mask in (same, one))
    assert some.high > 0.9 * none.high


@pytest.mark.parametrize("level", [0.95, 0.99995])
def test_two_groups_have_an_interval_at_any_level(level):
    rng = np.random.default_rng(0)
    for _ in range(200):
        right, baseline = rng.random((2, 40)) < rng.random((2, 1))
        found = paired_gain(right, baseline, level, np.arange(40) // 20)
        assert -1 <= found.low <= found.value <= found.high <= 1


def test_one_group_says_nothing_of_another():
    right, one = np.arange(50) < 40, np.zeros(50, int)
    assert proportion(right, groups=one).low == 0
    assert (paired_gain(right, ~right, groups=one).low, proportion(right, groups=one).high) == (
        -1,
        1,
    )
    assert mean_gain(right * 1.0, groups=one).high == np.inf
    assert mean_gain(np.zeros(50), groups=one).low == -np.inf


def test_from_five_groups_on_their_differences_say_how_alike_a_group_is():
    groups, values = np.arange(80) // 4, np.zeros(80)
    values[[0, 4, 8, 12]] = 1  # one sample in each of four groups
    assert _design_effect(values, groups, 0.95)[0] == 4  # a group's samples count as one
    values[16] = 1
    effect = _design_effect(values, groups, 0.95)[0]
    between = ((values.reshape(20, 4) - values.mean()).sum(axis=1) ** 2).sum() * 20 / 19
    assert effect == max(1, between / ((values - values.mean()) ** 2).sum()) < 2


def test_two_groups_have_the_quantile_of_one_degree_of_freedom():
    quantile = _design_effect(np.arange(4.0), np.array([0, 0, 1, 1]), 0.95)[1]
    assert quantile == pytest.approx(12.7062, abs=1e-3)
    assert _design_effect(np.arange(4.0), np.zeros(4), 0.95)[1] == np.inf


def test_a_low_level_has_an_interval_around_no_difference():
    right = np.arange(100) % 2 == 0
    narrow, wide = paired_gain(right, ~right, 0.5), paired_gain(right, ~right, 0.95)
    assert wide.low < narrow.low < 0 < narrow.high < wide.high
    assert narrow.low == pytest.approx(-narrow.high)


def test_the_mean_of_equal_values_is_certain_unless_they_are_of_one_group():
    assert mean_gain(np.full(5, 0.25)) == Gain(0.25, 0.25, 0.25)
    assert mean_gain(np.full(5, 0.25), groups=np.zeros(5)).high == np.inf


def test_an_interval_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Interval(0.5, 0.4, 0.6).low = 0


def test_the_most_lopsided_counts_have_an_interval():
    right = np.zeros(10_000_000, bool)
    gain = paired_gain(right, ~right)
    assert gain.value == gain.low == -1
    assert gain.high < -0.99
