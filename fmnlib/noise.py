"""Label noise: which training labels are wrong, and what they become.

Every kind returns the noisy labels and the mask of flipped ones. Noise has a seed of its own, so
that runs with different training seeds share the same noise. To add a kind, write its function
here and call it in `noisy_labels`.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from fmnlib.config import InputError, RunConfig
from fmnlib.files import data_root
from fmnlib.record import RunRecord, refuse_test

# For each of the 100 classes of CIFAR-100, in torchvision's order, its superclass.
_SUPERCLASS = (
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 "
    "11 5 5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 "
    "16 12 9 13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"
)
_CONFUSABLE = {
    "digits": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
    "mnist": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
    "fashion_mnist": {2: 6, 3: 4, 4: 3, 7: 5, 9: 7},
    "cifar10": {2: 0, 3: 5, 4: 7, 5: 3, 9: 1},
}

Labels = Int[np.ndarray, " samples"]
Noisy = tuple[Labels, Bool[np.ndarray, " samples"]]


def noisy_labels(
    config: RunConfig, labels: Int[np.ndarray, " all"], chosen: Labels, classes: int
) -> Noisy:
    """Make labels of the chosen samples noisy, by the config's noise, noise_rate and noise_seed.

    `labels` are the true classes of the whole training data.

    Raises:
        InputError: If the noise matrix or the human labels are missing or do not fit.
    """
    kind, _, file = config.noise.partition(":")
    true, rate, seed = labels[chosen], config.noise_rate, config.noise_seed
    if kind == "symmetric":
        return symmetric(true, classes, rate, seed)
    if kind == "asymmetric":
        dataset = config.dataset if config.classes == "all" else ""  # half has no known pairs
        return asymmetric(true, confused_with(dataset, classes), rate, seed)
    if kind == "matrix":
        return transition(true, _read_matrix(Path(file), classes), seed)
    if kind == "human":
        path = data_root() / "cifar100n" / "cifar100n_human.npz"
        if config.dataset != "cifar100" or not path.exists():
            raise InputError(f"human noise is of cifar100, read from {path}; put it there")
        with np.load(path, allow_pickle=False) as stored:
            if not np.array_equal(labels, stored["clean_label"]):
                raise InputError(
                    f"the clean labels in {path} are not the data set's, in its order"
                )
            noisy = stored["noisy_label"][chosen]
        return noisy, noisy != true
    return true, np.zeros(len(true), bool)


def confused_with(dataset: str, classes: int) -> dict[int, int]:
    """Map each class that asymmetric noise flips to the class that it becomes.

    CIFAR-100 takes the next class inside the superclass, the digits, Fashion-MNIST and CIFAR-10
    their usual confusable pairs, other data the next class.

    >>> confused_with("digits", 10)
    {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}
    """
    if dataset == "cifar100":
        superclass = _SUPERCLASS.split()
        members = [[c for c in range(100) if superclass[c] == str(s)] for s in range(20)]
        return {c: group[(i + 1) % 5] for group in members for i, c in enumerate(group)}
    return _CONFUSABLE.get(dataset, {c: (c + 1) % classes for c in range(classes)})


def symmetric(labels: Labels, classes: int, rate: float, seed: int) -> Noisy:
    """Flip exactly round(rate * N) labels, each to one of the other classes at random.

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


def asymmetric(labels: Labels, confused_with: Mapping[int, int], rate: float, seed: int) -> Noisy:
    """Flip exactly round(rate * N_c) labels of each class c that is confused with another.

    >>> noisy, flipped = asymmetric(np.array([0, 0, 1, 1]), {0: 1}, rate=0.5, seed=0)
    >>> sorted(noisy[:2].tolist()), noisy[2:].tolist()
    ([0, 1], [1, 1])
    """
    _check_rate(rate)
    rng = np.random.default_rng(seed)
    noisy = labels.copy()
    for source, target in sorted(confused_with.items()):  # draws do not depend on their order
        members = np.flatnonzero(labels == source)
        noisy[rng.choice(members, size=round(rate * len(members)), replace=False)] = target
    return noisy, noisy != labels


def transition(labels: Labels, matrix: Float[np.ndarray, "classes classes"], seed: int) -> Noisy:
    """Draw each label from the row of its true class: P(noisy = j | true = i) = matrix[i, j].

    >>> transition(np.array([0, 1]), np.array([[0.0, 1.0], [1.0, 0.0]]), seed=0)[0].tolist()
    [1, 0]
    """
    check_matrix(matrix)
    if labels.max() >= len(matrix):
        raise InputError(
            f"the noise matrix has {len(matrix)} classes, the labels run to {labels.max()}"
        )
    draws = np.random.default_rng(seed).random(len(labels))
    cumulative = matrix.cumsum(axis=1)[labels]
    noisy = np.minimum((draws[:, None] >= cumulative).sum(axis=1), len(matrix) - 1)
    return noisy, noisy != labels


def check_matrix(matrix: Float[np.ndarray, "classes classes"]) -> None:
    """Raise `InputError` if a row is not a probability distribution."""
    if (matrix < 0).any() or not np.allclose(matrix.sum(axis=1), 1):
        raise InputError("a row of the noise matrix is negative or does not sum to 1; rows are P")


def estimated_matrix(val: RunRecord) -> Float[np.ndarray, "classes classes"]:
    """The noise matrix that a run's final network has learnt, from its validation half.

    T_ij is the mean of p_j over the validation samples of class i (gold loss correction,
    Hendrycks et al. 2018). With classes of equal size 1 - trace(T) / classes estimates the noise
    rate; the network's own errors are counted as noise, too.

    >>> probs = np.array([[[0.7, 0.3], [0.5, 0.5], [0.1, 0.9]]])
    >>> estimated_matrix(RunRecord.from_arrays(probs, np.array([0, 0, 1]))).round(3).tolist()
    [[0.6, 0.4], [0.1, 0.9]]
    """
    refuse_test(val, "estimated")
    counts = np.bincount(val.labels, minlength=val.classes)
    if not counts.all():
        problem = f"class {counts.argmin()} has no sample in the validation half"
        raise InputError(f"{problem}; its row of the noise matrix needs at least one")
    probs = np.asarray(val.keep([val.epochs - 1]).probs, np.float64)[0]
    sums = np.stack([probs[val.labels == label].sum(axis=0) for label in range(val.classes)])
    return sums / sums.sum(axis=1, keepdims=True)  # float16 rows do not sum to exactly 1


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise InputError(f"noise rate is {rate}; allowed is at least 0 and below 1")


def _read_matrix(path: Path, classes: int) -> np.ndarray:
    try:
        matrix = np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"noise matrix {path}: {error}; give rows of numbers as CSV") from error
    if matrix.shape != (classes, classes):
        shape = " x ".join(map(str, matrix.shape))
        wanted = f"{classes} x {classes}, a row for each true class"
        raise InputError(f"noise matrix {path} is {shape}; give {wanted}")
    return matrix
