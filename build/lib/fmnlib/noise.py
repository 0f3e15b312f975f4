"""Label noise: which training labels are wrong, and what they become.

Every function returns the noisy labels and the mask of what was flipped, and draws from a seed
of its own, so that runs with other training seeds share the same noise.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from fmnlib.config import InputError

__all__ = ["asymmetric", "human", "symmetric", "transition"]

Noisy = tuple[Int[np.ndarray, " samples"], Bool[np.ndarray, " samples"]]


def symmetric(labels: Int[np.ndarray, " samples"], classes: int, rate: float, seed: int) -> Noisy:
    """Flip exactly round(rate * N) labels, each to one of the other classes at random.

    >>> import numpy as np
    >>> noisy, flipped = symmetric(np.zeros(10, int), classes=3, rate=0.4, seed=0)
    >>> int(flipped.sum()), bool((noisy[flipped] != 0).all())
    (4, True)
    """
    _check_rate(rate)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(labels), size=round(rate * len(labels)), replace=False)
    noisy = labels.copy()
    noisy[chosen] = (labels[chosen] + rng.integers(1, classes, size=len(chosen))) % classes
    return noisy, noisy != labels


def asymmetric(
    labels: Int[np.ndarray, " samples"], confused_with: Mapping[int, int], rate: float, seed: int
) -> Noisy:
    """Flip exactly round(rate * N_c) labels of each class c that is confused with another.

    Args:
        labels: True classes.
        confused_with: For each class that is mistaken, the class that it is mistaken for.
        rate: Share of the labels of each mistaken class that are flipped.
        seed: Draws which ones.

    >>> import numpy as np
    >>> noisy, flipped = asymmetric(np.array([0, 0, 1, 1]), {0: 1}, rate=0.5, seed=0)
    >>> sorted(noisy[:2].tolist()), noisy[2:].tolist()
    ([0, 1], [1, 1])
    """
    _check_rate(rate)
    rng = np.random.default_rng(seed)
    noisy = labels.copy()
    for source, target in sorted(confused_with.items()):  # in any order the same draws
        members = np.flatnonzero(labels == source)
        noisy[rng.choice(members, size=round(rate * len(members)), replace=False)] = target
    return noisy, noisy != labels


def transition(
    labels: Int[np.ndarray, " samples"], matrix: Float[np.ndarray, "classes classes"], seed: int
) -> Noisy:
    """Draw each label from the row of its true class: P(noisy = j | true = i) = matrix[i, j].

    >>> import numpy as np
    >>> transition(np.array([0, 1]), np.array([[0.0, 1.0], [1.0, 0.0]]), seed=0)[0].tolist()
    [1, 0]
    """
    if (matrix < 0).any() or not np.allclose(matrix.sum(axis=1), 1):
        raise InputError("a row of the noise matrix is negative or does not sum to 1; rows are P")
    if labels.max() >= len(matrix):
        raise InputError(
            f"the noise matrix has {len(matrix)} classes, the labels run to {labels.max()}"
        )
    draws = np.random.default_rng(seed).random(len(labels))
    cumulative = matrix.cumsum(axis=1)[labels]
    noisy = np.minimum((draws[:, None] >= cumulative).sum(axis=1), len(matrix) - 1)
    return noisy, noisy != labels


def human(
    labels: Int[np.ndarray, " samples"],
    clean: Int[np.ndarray, " samples"],
    noisy: Int[np.ndarray, " samples"],
) -> Noisy:
    """Labels by human annotators, such as CIFAR-100N, checked to be in the order of `labels`.

    >>> import numpy as np
    >>> human(np.array([0, 1]), np.array([0, 1]), np.array([0, 0]))[1].tolist()
    [False, True]
    """
    if not np.array_equal(labels, clean):
        raise InputError("the human labels' clean classes are not the data set's, in its order")
    return noisy, noisy != labels


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise InputError(f"noise rate is {rate}; allowed is at least 0 and below 1")
