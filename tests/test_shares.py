"""fmnlib.fusion: the intervals against argmax, their best share against plain counting."""

from itertools import pairwise

import numpy as np
import pytest

from fmnlib.fusion import best_share, share_intervals


def two_predictors(kind, seed, samples=60, classes=5):
    rng = np.random.default_rng(seed)
    if kind == "coarse":  # quarters, full of ties at one end or at every share
        pair = rng.multinomial(4, np.full(classes, 1 / classes), (2, samples)) / 4
    else:
        pair = rng.dirichlet(np.full(classes, 0.5), (2, samples))
    return pair[0], pair[1], rng.integers(0, classes, samples)


@pytest.mark.parametrize("kind", ["fine", "coarse"])
@pytest.mark.parametrize("seed", range(8))
def test_a_sample_is_right_exactly_inside_its_interval(kind, seed):
    fused, candidate, labels = two_predictors(kind, seed)
    lo, hi = share_intervals(fused, candidate, labels)
    assert (lo >= 0).all()
    assert (hi <= 1).all()
    assert 0 < (lo < hi).sum() < len(labels)
    ends = np.concatenate([lo, hi])
    near = np.concatenate([ends - 1e-6, ends + 1e-6, np.linspace(0.001, 0.999, 400)])
    for share in near[(near > 0) & (near < 1)]:
        right = ((1 - share) * fused + share * candidate).argmax(axis=1) == labels
        np.testing.assert_array_equal(right, (lo < share) & (share < hi))


@pytest.mark.parametrize("seed", range(4))
def test_exchanging_the_predictors_mirrors_the_intervals(seed):
    fused, candidate, labels = two_predictors("fine", seed)
    lo, hi = share_intervals(fused, candidate, labels)
    back_lo, back_hi = share_intervals(candidate, fused, labels)
    some = lo < hi
    np.testing.assert_array_equal(back_lo < back_hi, some)
    np.testing.assert_allclose(back_lo[some], 1 - hi[some], rtol=0, atol=1e-12)
    np.testing.assert_allclose(back_hi[some], 1 - lo[some], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("fused", "candidate", "label", "interval"),
    [
        ([0.75, 0.25], [0.75, 0.25], 0, (0, 1)),  # right at both ends
        ([0.25, 0.75], [0.25, 0.75], 0, None),  # wrong at both, as far from right at each
        ([0.25, 0.75], [0.375, 0.625], 0, None),  # wrong at both, less so at one
        ([0.5, 0.5], [0.75, 0.25], 1, None),  # a tie, then wrong
        ([0.25, 0.75], [0.5, 0.5], 0, None),  # wrong, then a tie
        ([0.5, 0.5], [0.75, 0.25], 0, (0, 1)),  # a tie, then right
        ([0.75, 0.25], [0.5, 0.5], 0, (0, 1)),  # right, then a tie
        ([0.5, 0.5], [0.5, 0.5], 0, (0, 1)),  # a tie throughout: argmax takes the lower
        ([0.5, 0.5], [0.5, 0.5], 1, None),
        ([0.25, 0.75], [1.0, 0.0], 0, (1 / 3, 1)),  # one end by hand: -1/2 + 3/2 eps = 0
        ([1.0, 0.0], [0.25, 0.75], 0, (0, 2 / 3)),
        ([0.25, 0.75, 0.0], [0.25, 0.0, 0.75], 0, None),  # each rival leaves half, no share both
        ([0.375, 0.625, 0.0], [0.375, 0.0, 0.625], 0, (0.4, 0.6)),  # each leaves three fifths
    ],
)
def test_intervals_by_hand(fused, candidate, label, interval):
    lo, hi = share_intervals(np.array([fused]), np.array([candidate]), np.array([label]))
    assert ((lo[0], hi[0]) if lo[0] < hi[0] else None) == interval


@pytest.mark.parametrize("seed", range(30))
def test_best_share_against_counting(seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 9, (2, 12)) / 8  # ties between ends, and empty intervals
    lo, hi = np.sort(rng.random((2, 12)), axis=0) if seed % 2 else coarse
    share, count, width = best_share(lo, hi)

    ends = sorted({0.0, 1.0, *(e for a, b in zip(lo, hi, strict=True) if a < b for e in (a, b))})
    best = (-1, 0.0, 0.0)
    for begin, end in pairwise(ends):
        middle = (begin + end) / 2
        inside = sum(a < middle < b for a, b in zip(lo, hi, strict=True))
        if (inside, end - begin) > best[:2]:  # the first at a tie
            best = (inside, end - begin, middle)
    assert (count, width, share) == best


@pytest.mark.parametrize(
    ("lo", "hi", "found"),
    [
        ([], [], (0.5, 0, 1.0)),
        ([0.5, 1.0], [0.5, 0.0], (0.5, 0, 1.0)),  # empty intervals count for nothing
        ([0.0, 0.5], [0.5, 1.0], (0.25, 1, 0.5)),  # open ends: never both; the first at a tie
        ([0.0, 0.75], [0.25, 1.0], (0.125, 1, 0.25)),
        ([0.0, 0.5], [0.5 + 1e-15, 1.0], (0.25, 1, 0.5)),  # an overlap by rounding is none
        ([0.25, 0.5], [0.75, 0.5 + 1e-15], (0.5, 1, 0.5)),  # so is an interval
        ([0.0, 0.5], [0.5 + 1e-9, 1.0], (0.5 + 5e-10, 2, 1e-9)),
    ],
)
def test_best_share_by_hand(lo, hi, found):
    assert best_share(np.array(lo), np.array(hi)) == pytest.approx(found, rel=1e-6)
