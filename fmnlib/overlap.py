"""Do two learners forget the same samples? S(k) against M(n) (AAAI, section 4 and Fig. 4).

Each learner is an array `correct[rows, samples]`: rows are epochs of a network, or components of
a linear model. What it forgets after each row is a set of samples, and sets are compared row by
row, once the rows of the one are matched to those of the other.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from fmnlib import scores

__all__ = [
    "Agreement",
    "agreement",
    "by_chance",
    "correlation",
    "forgotten_sets",
    "matched",
    "overlap_share",
    "p_value",
    "shuffled",
]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far a linear model and a network forget the same, epoch by epoch of the network.

    Attributes:
        correlation: Of belonging to S(k) and to M(n).
        share: Of M(n) that is in S(k).
        correlation_by_chance: The same after exchanges of samples.
        share_by_chance: Likewise.
    """

    correlation: Float[np.ndarray, " epochs"]
    share: Float[np.ndarray, " epochs"]
    correlation_by_chance: Float[np.ndarray, "rounds epochs"]
    share_by_chance: Float[np.ndarray, "rounds epochs"]


def agreement(
    shallow: Bool[np.ndarray, "components samples"],
    deep: Bool[np.ndarray, "epochs samples"],
    groups: Int[np.ndarray, " samples"],
    *,
    least: int = 10,
    rounds: int = 1000,
) -> Agreement:
    """Compare S(k) with M(n) for every epoch after which the network forgets enough samples.

    Args:
        shallow: Which samples a linear model has right, cut to its first components.
        deep: Which samples the network has right after each epoch.
        groups: Samples are exchanged within these; the true classes, say.
        least: Leave out epochs n with fewer samples than this in M(n), but never the first.
        rounds: Number of exchanges.

    >>> right = np.array([[False, True], [True, False], [False, False]])
    >>> found = agreement(right, right, np.array([0, 1]), least=1, rounds=3)
    >>> found.correlation.tolist(), found.share.tolist()
    ([1.0], [1.0])
    """
    target = forgotten_sets(deep)
    sets = matched(forgotten_sets(shallow), len(target))
    enough = max(1, int((target.sum(axis=1) >= least).sum()))
    target, sets = target[:enough], sets[:enough]
    return Agreement(
        correlation(sets, target),
        overlap_share(sets, target),
        by_chance(correlation, sets, target, groups, rounds),
        by_chance(overlap_share, sets, target, groups, rounds),
    )


def p_value(observed: float, chance: Float[np.ndarray, " rounds"]) -> float:
    """How likely chance does as well: a one-sided permutation test, never 0; NaN of a NaN.

    >>> p_value(3.0, np.array([1.0, 2.0, 3.0]))
    0.5
    """
    if np.isnan(observed):
        return float("nan")
    return float((1 + (chance >= observed).sum()) / (1 + len(chance)))


def forgotten_sets(
    correct: Bool[np.ndarray, "rows samples"],
) -> Bool[np.ndarray, "rows-1 samples"]:
    """What is right in some later row and wrong in the last, after each row but the last.

    >>> forgotten_sets(np.array([[True, False], [False, True], [False, False]])).tolist()
    [[False, True], [False, False]]
    """
    return np.array([scores.forgotten_after(correct, row) for row in range(len(correct) - 1)])


def matched(
    sets: Bool[np.ndarray, "rows samples"], count: int
) -> Bool[np.ndarray, "count samples"]:
    """The rows k = (n - β) / α for n from 0 to count - 1, so that first and last rows meet.

    The paper matches n = α k + β and does not say how it finds α and β. This choice has nothing
    to be fitted.

    >>> matched(np.array([[True], [False], [True], [True], [False]]), 3)[:, 0].tolist()
    [True, True, False]
    """
    return sets[np.round(np.linspace(0, len(sets) - 1, count)).astype(int)]


def correlation(
    one: Bool[np.ndarray, "rows samples"], other: Bool[np.ndarray, "rows samples"]
) -> Float[np.ndarray, " rows"]:
    """Pearson's correlation of belonging to the one set and to the other (phi), row by row.

    It is 0 where a set is empty, or holds every sample.

    >>> one = np.array([[True, True, False, False]])
    >>> correlation(one, one).tolist(), correlation(one, np.array([[True, False] * 2])).tolist()
    ([1.0], [0.0])
    """
    p, q = one.mean(axis=1), other.mean(axis=1)
    spread = np.sqrt(p * (1 - p) * q * (1 - q))
    excess = (one & other).mean(axis=1) - p * q
    return np.divide(excess, spread, out=np.zeros(len(p)), where=spread > 0)


def overlap_share(
    shallow: Bool[np.ndarray, "rows samples"], deep: Bool[np.ndarray, "rows samples"]
) -> Float[np.ndarray, " rows"]:
    """The part of the deep learner's set that is in the shallow one's; NaN where it is empty.

    >>> overlap_share(np.array([[True, False]]), np.array([[True, True]])).tolist()
    [0.5]
    """
    size = deep.sum(axis=1)
    both = (shallow & deep).sum(axis=1)
    return np.divide(both, size, out=np.full(len(size), np.nan), where=size > 0)


def shuffled(
    groups: Int[np.ndarray, " samples"], rounds: int, seed: int = 0
) -> Int[np.ndarray, "rounds samples"]:
    """Orders that exchange samples within their group alone, for a permutation test.

    With the true classes as groups, two sets that agree only because some classes are forgotten
    more than others agree as much after the shuffle as before.

    >>> sorted(shuffled(np.array([0, 0, 1]), 1)[0, :2].tolist())
    [0, 1]
    """
    rng = np.random.default_rng(seed)
    place = np.argsort(groups, kind="stable")
    orders = np.empty((rounds, len(groups)), int)
    for order in orders:
        order[place] = np.lexsort((rng.random(len(groups)), groups))
    return orders


def by_chance(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    shallow: Bool[np.ndarray, "rows samples"],
    deep: Bool[np.ndarray, "rows samples"],
    groups: Int[np.ndarray, " samples"],
    rounds: int = 1000,
) -> Float[np.ndarray, "rounds rows"]:
    """What `correlation` or `overlap_share` gives when samples are exchanged within groups.

    The same exchange is made in all rows, so that the sets stay nested.

    >>> sets = np.array([[True, True, False, False]])
    >>> by_chance(correlation, sets, sets, np.array([0, 0, 1, 1]), rounds=2).tolist()
    [[1.0], [1.0]]
    """
    return np.array([measure(shallow[:, order], deep) for order in shuffled(groups, rounds)])
