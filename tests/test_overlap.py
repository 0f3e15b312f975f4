"""fmnlib.paper.theory: plain loops, and what a permutation keeps."""

import numpy as np
import pytest

from fmnlib.paper.theory import (
    _correlation,
    _forgotten_sets,
    _matched,
    _overlap_share,
    _shuffled,
    agreement,
    p_value,
)

ROWS, SAMPLES = 6, 30


@pytest.fixture(params=range(4))
def rng(request):
    return np.random.default_rng(request.param)


def test_sets_equal_plain_loops(rng):
    correct = rng.random((ROWS, SAMPLES)) < 0.5
    expected = [
        [correct[row + 1 :, n].any() and not correct[-1, n] for n in range(SAMPLES)]
        for row in range(ROWS - 1)
    ]
    assert _forgotten_sets(correct).tolist() == expected


def test_correlation_is_pearsons(rng):
    one, other = rng.random((2, ROWS, SAMPLES)) < 0.4
    other[0] = False  # an empty set tells nothing
    phi = _correlation(one, other)
    assert phi[0] == 0
    for row in range(1, ROWS):
        np.testing.assert_allclose(phi[row], np.corrcoef(one[row], other[row])[0, 1], atol=1e-12)
    np.testing.assert_allclose(_correlation(one, ~one), -1)


def test_overlap_share_equals_plain_loops(rng):
    shallow, deep = rng.random((2, ROWS, SAMPLES)) < 0.4
    deep[-1] = False
    shares = _overlap_share(shallow, deep)
    assert np.isnan(shares[-1])
    for row in range(ROWS - 1):
        members = [n for n in range(SAMPLES) if deep[row, n]]
        assert shares[row] == sum(shallow[row, n] for n in members) / len(members)


@pytest.mark.parametrize("count", [2, 5, 9])
def test_matched_rows_run_from_the_first_to_the_last(count):
    sets = np.eye(7, dtype=bool)  # row k is the set of k alone
    rows = _matched(sets, count).argmax(axis=1)
    assert rows[0] == 0
    assert rows[-1] == 6
    assert np.abs(rows - 6 * np.arange(count) / (count - 1)).max() <= 0.5


def test_shuffles_stay_within_their_group_and_reach_all_of_it():
    groups = np.array([2, 0, 1, 0, 2, 0, 1])
    orders = _shuffled(groups, 300, seed=1)
    for order in orders:
        assert sorted(order) == list(range(7))
        np.testing.assert_array_equal(groups[order], groups)
    reached = {(place, orders[i, place]) for i in range(300) for place in (1, 3, 5)}
    assert len(reached) == 9  # every member of the group of three, at each of its places
    counts = np.bincount(orders[:, 1], minlength=6)[[1, 3, 5]]
    assert (np.abs(counts - 100) < 40).all()
    np.testing.assert_array_equal(orders, _shuffled(groups, 300, seed=1))


def test_what_is_due_to_the_groups_survives_the_shuffle():
    groups = np.repeat([0, 1], 50)
    sets = (groups == 1)[None]  # one class is forgotten, the other not
    for order in _shuffled(groups, 20):
        assert _correlation(sets[:, order], sets) == pytest.approx(1)
    mixed = np.abs([_correlation(sets[:, o], sets)[0] for o in _shuffled(np.zeros(100, int), 20)])
    assert mixed.max() < 0.5


def test_chance_keeps_sets_nested_and_gives_the_share_of_each_group(rng):
    groups = np.repeat([0, 1], [40, 60])
    shallow = (rng.random(100) < np.array([[0.6], [0.3]])).cumprod(axis=0).astype(bool)
    deep = rng.random((2, 100)) < 0.5
    orders = _shuffled(groups, 2000)
    chance = np.array([_overlap_share(shallow[:, order], deep) for order in orders])
    for row in range(2):
        parts = [
            shallow[row, groups == g].mean() * (deep[row] & (groups == g)).sum() for g in (0, 1)
        ]
        assert chance[:, row].mean() == pytest.approx(sum(parts) / deep[row].sum(), abs=0.01)
    assert all(_overlap_share(shallow[:, order], shallow).max() <= 1 for order in orders[:3])


def test_agreement_compares_matched_sets_as_long_as_enough_is_forgotten(rng):
    shallow, deep = rng.random((9, SAMPLES)) < 0.6, rng.random((ROWS, SAMPLES)) < 0.6
    groups = rng.integers(0, 3, SAMPLES)
    sizes = _forgotten_sets(deep).sum(axis=1)
    least = int(sizes[2])
    result = agreement(shallow, deep, groups, least=least, rounds=50)
    count = sum(size >= least for size in sizes)
    assert len(result.share) == count >= 3
    rows = [round(n * 7 / (ROWS - 2)) for n in range(count)]
    sets, target = _forgotten_sets(shallow)[rows], _forgotten_sets(deep)[:count]
    np.testing.assert_array_equal(result.share, _overlap_share(sets, target))
    np.testing.assert_array_equal(result.correlation, _correlation(sets, target))
    assert result.share_by_chance.shape == result.correlation_by_chance.shape == (50, count)
    assert len(agreement(shallow, deep, groups, least=SAMPLES + 1, rounds=1).share) == 1


def test_the_permutation_test_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(11)
    deep = rng.random((8, 200)) < 0.6
    groups = rng.integers(0, 4, 200)

    def p(shallow):
        result = agreement(shallow, deep, groups, rounds=199)
        return p_value(result.correlation.mean(), result.correlation_by_chance.mean(axis=1))

    assert p(deep) == 1 / 200
    unrelated = np.array([p(rng.random((8, 200)) < 0.6) for _ in range(40)])
    assert 0.35 < unrelated.mean() < 0.65
    assert (unrelated < 0.05).sum() <= 7
