"""Intervals against what defines them: coverage by simulation, likelihood by brute force."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from fmnlib.stats import Gain, Interval, paired_gain, proportion

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
    assert proportion(5, 50, 0.99).high > proportion(5, 50).high


def test_a_share_by_the_quadratic_that_defines_it():
    found = proportion(7, 60)
    for end in (found.low, found.high):
        assert (7 / 60 - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / 60)


def test_intervals_read_well():
    assert str(Interval(0.25, 0.2, 0.305)) == "25.0% (20.0 to 30.5)"
    assert str(Gain(-0.01, -0.02, 0.005)) == "-1.0 points (-2.0 to +0.5)"
