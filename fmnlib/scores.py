"""Scores of local overfitting, computed from the masks `correct[epochs, samples]`.

F_e and L_e are defined in section 3 of Stern, Yaacoby, Weinshall (AAAI 2025). They satisfy
acc(E) = acc(e) + L_e - F_e exactly: the accuracy at the end is what epoch e had, plus what was
learned since, minus what was forgotten.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import bdtrc

Correct = Bool[np.ndarray, "epochs samples"]  # which samples are right after each epoch
Final = Bool[np.ndarray, " samples"]  # which samples the final predictor gets right
Share = Float[np.ndarray, " epochs"]


def forget_fraction(correct: Correct, final: Final | None = None) -> Share:
    """F_e: the share of samples that are right after epoch e and wrong at the end.

    `correct` says which samples are right after each epoch, `final` which ones the final predictor
    gets right (default: the last epoch). Knowledge Fusion passes the predictor fused so far.

    >>> forget_fraction(np.array([[True, True], [False, True]])).tolist()
    [0.5, 0.0]
    """
    return (correct & ~(correct[-1] if final is None else final)).mean(axis=1)


def learn_fraction(correct: Correct, final: Final | None = None) -> Share:
    """L_e: the share of samples that are wrong after epoch e and right at the end.

    >>> learn_fraction(np.array([[False, True], [True, True]])).tolist()
    [0.5, 0.0]
    """
    return (~correct & (correct[-1] if final is None else final)).mean(axis=1)


def retained_fraction(correct: Correct) -> Share:
    """The share of samples right after epoch e and still right at the end: acc(e) - F_e.

    >>> retained_fraction(np.array([[True, True], [False, True]])).tolist()
    [0.5, 0.5]
    """
    return (correct & correct[-1]).mean(axis=1)


def last_correct_epoch(correct: Correct) -> Int[np.ndarray, " samples"]:
    """For each sample, the last epoch at which it is classified correctly; -1 if there is none.

    For a sample that is wrong at the end this is its forget time (AAAI Fig. 3b).

    >>> last_correct_epoch(np.array([[True, False], [True, False], [False, False]])).tolist()
    [1, -1]
    """
    last = len(correct) - 1 - correct[::-1].argmax(axis=0)
    return np.where(correct.any(axis=0), last, -1)


def forgotten_after(correct: Correct, epoch: int) -> Bool[np.ndarray, " samples"]:
    """M(n): the samples that are right at some epoch later than n and wrong at the end.

    >>> correct = np.array([[True, False], [False, True], [False, False]])
    >>> forgotten_after(correct, 0).tolist()
    [False, True]
    """
    return correct[epoch + 1 :].any(axis=0) & ~correct[-1]


def covering(correct: Correct, number: int) -> Int[np.ndarray, " kept"]:
    """The epochs that a run keeps if it may keep `number` (2 or more), decided after each epoch.

    If there are more, it drops the epoch with the fewest samples that no other kept epoch gets
    right; at a tie the least accurate, then the earliest. The last and the most accurate stay.

    >>> covering(np.array([[True, False, False], [False, True, False], [False, True, True]]), 2)
    array([0, 2])
    """
    kept: list[int] = []
    for epoch in range(len(correct)):
        kept.append(epoch)
        if len(kept) > number:
            right, accuracy = correct[kept], correct[kept].mean(axis=1)
            unique = (right & (right.sum(axis=0) == 1)).sum(axis=1)
            stay = int(accuracy.argmax()), len(kept) - 1
            del kept[next(row for row in np.lexsort((accuracy, unique)) if row not in stay)]
    return np.array(kept)


def dip(accuracy: Share) -> tuple[int, int]:
    """The epochs that bound the dip of a double ascent: the first peak and the bottom after it.

    The pair with the largest fall from one epoch to a later one; both 0 if accuracy never falls.

    >>> dip(np.array([0.5, 0.8, 0.6, 0.7]))
    (1, 2)
    """
    fall = np.maximum.accumulate(accuracy) - accuracy
    bottom = int(fall.argmax())
    return int(accuracy[: bottom + 1].argmax()), bottom


def dips_of_others(accuracy: Float[np.ndarray, "runs epochs"]) -> list[tuple[int, int]]:
    """For each run, the `dip` of the mean of all other runs, independent of its own noise.

    Between its own peak and bottom any noisy curve falls; epochs chosen on other runs are not
    biased in this way. A single run gets its own dip.

    >>> dips_of_others(np.array([[0.5, 0.8, 0.6], [0.9, 0.6, 0.7]]))
    [(0, 1), (1, 2)]
    """
    if len(accuracy) == 1:
        return [dip(accuracy[0])]
    return [dip(np.delete(accuracy, run, axis=0).mean(axis=0)) for run in range(len(accuracy))]


def by_class(
    mask: Bool[np.ndarray, "epochs samples"], labels: Int[np.ndarray, " samples"], classes: int
) -> Float[np.ndarray, "classes epochs"]:
    """The mean of any mask per class and epoch; NaN for a class without samples.

    `by_class(correct & ~correct[-1], labels, classes)` is F_e of each class.

    >>> correct = np.array([[True, True, True], [False, True, True]])
    >>> by_class(correct & ~correct[-1], np.array([0, 0, 1]), 2).tolist()
    [[0.5, 0.0], [0.0, 0.0]]
    """
    columns = [mask[:, labels == label] for label in range(classes)]
    return np.array([c.mean(axis=1) if c.size else np.full(len(c), np.nan) for c in columns])


def at_chance(
    predicted: Int[np.ndarray, "epochs samples"], labels: Int[np.ndarray, " samples"]
) -> bool:
    """Whether no epoch's predictions agree with the labels better than chance.

    The usual causes are another order of samples or of classes. By chance a sample is right with
    probability sum_c P(predicted = c) P(label = c), as in Cohen's kappa. Each epoch has a binomial
    test at the level 0.001 / epochs (Bonferroni). False if the samples are so few, or all of one
    class, that even perfect predictions would not pass it.

    >>> labels = np.arange(100) % 4
    >>> [at_chance(np.tile(labels % classes, (9, 1)), labels) for classes in (1, 2)]
    [True, False]
    """
    samples, level = len(labels), 1e-3 / len(predicted)
    classes = 1 + max(int(labels.max()), int(predicted.max()))
    share = [np.bincount(row, minlength=classes) / samples for row in (labels, *predicted)]
    chance = np.array([float(share[0] @ one) for one in share[1:]])
    right = (predicted == labels).sum(axis=1)
    passes = bdtrc(right - 1, samples, chance) < level
    return bool((share[0] @ share[0]) ** samples < level and not passes.any())
