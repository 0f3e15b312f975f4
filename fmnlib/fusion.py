"""Checkpoint ensembles of one run: each is a vector of weights over epochs, of sum 1.

A single network is a one-hot vector, a horizontal ensemble is uniform over the last k, and
Knowledge Fusion (Algorithm 1 of AAAI 2025) is the vector that its search returns: the mix

    prob <- eps_i * mean(prob[A_i - w .. A_i + w]) + (1 - eps_i) * prob,    i = 1, 2, ...

is a nested convex combination, so the final model weighs prod_i (1 - eps_i) and the window of
pick i weighs eps_i * prod_{j > i} (1 - eps_j). Prediction is a weighted sum, whatever the method.

What selects takes the validation half and refuses the test half. All arithmetic that decides is
elementwise, so that a search ends with the same bits on every machine.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from fmnlib.config import InputError
from fmnlib.record import RunRecord, write_whole
from fmnlib.scores import forget_fraction
from fmnlib.shares import best_share, share_intervals

__all__ = [
    "Fusion",
    "accuracy",
    "around",
    "early_stopping",
    "exhaustive_fusion",
    "fixed_jumps",
    "fuse",
    "horizontal",
    "knowledge_fusion",
    "single",
    "uniform",
]

Right = Bool[np.ndarray, " samples"]
Probs = Float64[np.ndarray, "samples classes"]

_HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Weights over the epochs of a run, and how they came about.

    Attributes:
        weights: Weight of each epoch's checkpoint; not negative, of sum 1.
        picks: The chosen (epoch, share) pairs A_i, eps_i in order; empty for fixed ensembles.
        window: Epochs averaged on either side of a pick, w.
    """

    weights: Float64[np.ndarray, " epochs"]
    picks: tuple[tuple[int, float], ...] = ()
    window: int = 0

    @property
    def networks(self) -> int:
        """Number of checkpoints evaluated for one prediction."""
        return int(np.count_nonzero(self.weights))

    def save(self, path: Path) -> None:
        """Write as JSON."""
        fields = dataclasses.asdict(self) | {"weights": self.weights.tolist()}
        write_whole(path, json.dumps(fields).encode())

    @classmethod
    def load(cls, path: Path) -> "Fusion":
        """Read back what `save` wrote."""
        try:
            fields = json.loads(path.read_text())
            picks = tuple((int(epoch), float(share)) for epoch, share in fields["picks"])
            return cls(np.array(fields["weights"], np.float64), picks, int(fields["window"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no fusion; write one with `fmn fuse RUN`") from error


def fuse(record: RunRecord, fusion: Fusion) -> Probs:
    """Mix the kept probabilities with the weights of a fusion.

    Raises:
        InputError: If the record lacks probabilities of an epoch that has weight.

    >>> import numpy as np
    >>> record = RunRecord.from_arrays(np.array([[[0.75, 0.25]], [[0.25, 0.75]]]), [0])
    >>> fuse(record, uniform(record)).tolist()
    [[0.5, 0.5]]
    """
    probs = _probs(record)
    if len(fusion.weights) != record.epochs:
        given = f"{len(fusion.weights)} weights for {record.epochs} epochs"
        raise InputError(f"{given}; a fusion belongs to the run that it was found on")
    fused = np.zeros(probs.shape[1:])
    for epoch in np.flatnonzero(fusion.weights):  # in order, so that rounding is the same anywhere
        row = np.flatnonzero(record.kept == epoch)
        if not len(row):
            raise InputError(f"epoch {epoch} has weight but no probabilities; keep it in the run")
        fused += fusion.weights[epoch] * _widen(probs[row[0]])
    return fused


def accuracy(record: RunRecord, fusion: Fusion) -> float:
    """Accuracy of a fusion on a record, from 0 to 1."""
    return float(_right(fuse(record, fusion), record.labels).mean())


def single(record: RunRecord, epoch: int | None = None) -> Fusion:
    """One network: the final one, or that of an epoch."""
    return _weigh(record, _rows(record, [record.epochs - 1 if epoch is None else epoch]))


def early_stopping(val: RunRecord) -> Fusion:
    """The network with the best validation accuracy, the earliest one at a tie."""
    _refuse_test(val)
    return _weigh(val, [int(val.accuracy[val.kept].argmax())])


def horizontal(record: RunRecord, networks: int) -> Fusion:
    """The last networks, equally weighted."""
    kept = _enough(record, networks)
    return _weigh(record, range(kept - networks, kept))


def fixed_jumps(record: RunRecord, networks: int) -> Fusion:
    """Equally spaced networks, the last one among them, equally weighted.

    >>> import numpy as np
    >>> record = RunRecord.from_arrays(np.full((6, 1, 2), 0.5), [0])
    >>> np.flatnonzero(fixed_jumps(record, 3).weights).tolist()
    [1, 3, 5]
    """
    kept = _enough(record, networks)
    return _weigh(record, [(i + 1) * kept // networks - 1 for i in range(networks)])


def around(record: RunRecord, epoch: int, window: int) -> Fusion:
    """An epoch and the kept ones on either side of it, equally weighted; clipped at the ends."""
    [row] = _rows(record, [epoch])
    return _weigh(record, range(len(record.kept))[_clip(row, window, len(record.kept))])


def uniform(record: RunRecord) -> Fusion:
    """All kept networks, equally weighted."""
    return _weigh(record, range(len(record.kept)))


def knowledge_fusion(
    val: RunRecord,
    *,
    window: int = 1,
    max_picks: int | None = None,
    grid: Float[np.ndarray, " shares"] | None = None,
) -> Fusion:
    """Find what the final model forgot and mix it back in (Algorithm 1 of AAAI 2025).

    Repeats: pick the epoch with the largest forget fraction against the predictor fused so far,
    average the probabilities of its window, choose the share by validation accuracy, mix. Stops
    when validation accuracy no longer rises.

    Args:
        val: The validation half of a run.
        window: Kept epochs averaged on either side of a pick (clipped at the ends), w.
        max_picks: 1 is the papers' "(i)"; None goes on to the end, "(inf)".
        grid: Shares to try, such as the papers' `np.arange(0, 1.005, 0.01)`. Where not given,
            the share is exact: the middle of the widest interval of best accuracy.

    >>> import numpy as np
    >>> probs = np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.9, 0.1], [0.2, 0.8]]])
    >>> found = knowledge_fusion(RunRecord.from_arrays(probs, [0, 0]), window=0)
    >>> found.picks, found.weights.tolist()
    (((0, 0.875),), [0.875, 0.125])
    """
    if grid is not None and not (len(grid) and 0 <= grid.min() <= grid.max() <= 1):
        raise InputError(f"the grid of shares is {grid}; give shares from 0 to 1")
    probs = _probs(val)
    correct = val.correct[val.kept]

    def propose(fused: Probs, right: Right) -> tuple[int, float, Probs]:
        row = int(forget_fraction(correct, right).argmax())
        candidate = _window_mean(probs, row, window)
        if grid is not None:
            accuracy = [_right(_mix(fused, candidate, s), val.labels).mean() for s in grid]
            return row, float(grid[int(np.argmax(accuracy))]), candidate
        return row, best_share(*share_intervals(fused, candidate, val.labels))[0], candidate

    return _fuse_greedily(val, window, max_picks, propose)


def exhaustive_fusion(val: RunRecord, *, window: int = 1, max_picks: int | None = None) -> Fusion:
    """As `knowledge_fusion`, but each pick is the best of all epochs at their exact best shares.

    It selects among many more candidates on the same samples, so it follows the noise of the
    validation half more closely; compare the two on other samples.
    """
    probs = _probs(val)
    samples, labels = np.arange(len(val.labels))[:, None], val.labels

    def propose(fused: Probs, right: Right) -> tuple[int, float, Probs]:
        # Two rivals of each label, the mix's strongest and the class that the epoch predicts,
        # bound the epoch's count from above; few epochs then need all classes.
        rivals = fused.copy()
        rivals[samples[:, 0], labels] = -1
        strongest, bounds = rivals.argmax(axis=1), []
        for row, predicted in enumerate(val.predicted[val.kept]):
            few = samples, np.stack([labels, strongest, predicted], axis=1)
            candidate = _window_mean(probs, row, window, few)
            ends = share_intervals(fused[few], candidate, np.zeros_like(labels))
            bounds.append(best_share(*ends)[1])
        best = (-1, 0.0, 0, 0.0)
        for row in np.argsort(bounds)[::-1].tolist():
            if bounds[row] >= best[0]:
                ends = share_intervals(fused, _window_mean(probs, row, window), labels)
                share, count, width = best_share(*ends)
                best = max(best, (count, width, -row, share))
        return -best[2], best[3], _window_mean(probs, -best[2], window)

    return _fuse_greedily(val, window, max_picks, propose)


def _fuse_greedily(
    val: RunRecord,
    window: int,
    max_picks: int | None,
    propose: Callable[[Probs, Right], tuple[int, float, Probs]],
) -> Fusion:
    _refuse_test(val)
    probs = _probs(val)
    if not 0 <= 2 * window < len(probs):
        most = (len(probs) - 1) // 2
        raise InputError(f"window is {window} with {len(probs)} kept epochs; allow 0 to {most}")
    if max_picks is not None and max_picks < 1:
        raise InputError(f"max_picks is {max_picks}; allow 1 or more, or none for no limit")
    weights = single(val).weights
    fused = fuse(val, Fusion(weights))
    right = _right(fused, val.labels)
    picks: list[tuple[int, float]] = []
    while max_picks is None or len(picks) < max_picks:
        row, share, candidate = propose(fused, right)
        mixed = _mix(fused, candidate, share)
        now_right = _right(mixed, val.labels)
        if now_right.sum() <= right.sum():
            break
        fused, right = mixed, now_right
        chosen = val.kept[_clip(row, window, len(probs))]
        weights = (1 - share) * weights
        weights[chosen] += share / len(chosen)
        picks.append((int(val.kept[row]), share))
    return Fusion(weights, tuple(picks), window)


def _clip(row: int, window: int, rows: int) -> slice:
    return slice(max(0, row - window), min(rows, row + window + 1))


def _window_mean(
    probs: np.ndarray, row: int, window: int, where: slice | tuple[np.ndarray, ...] = slice(None)
) -> Probs:
    members = probs[_clip(row, window, len(probs))]
    total = _widen(members[0][where])
    for member in members[1:]:
        total += _widen(member[where])
    total /= len(members)
    return total


def _widen(values: np.ndarray) -> np.ndarray:
    # A table turns float16 into float64 three times as fast as numpy, which is slow at numbers
    # near 0, and softmax makes many.
    if values.dtype == np.float16:
        return _HALVES[values.view(np.uint16).astype(np.intp)]
    return values.astype(np.float64)


def _mix(fused: Probs, candidate: Probs, share: float) -> Probs:
    return (1 - share) * fused + share * candidate


def _right(probs: Probs, labels: Int[np.ndarray, " samples"]) -> Right:
    return probs.argmax(axis=1) == labels


def _probs(record: RunRecord) -> np.ndarray:
    if record.probs is None:
        raise InputError("this record holds no probabilities; load the run's own folder")
    return record.probs


def _refuse_test(record: RunRecord) -> None:
    if record.half == "test":
        raise InputError("this is a test half, which selects nothing; give the validation half")


def _enough(record: RunRecord, networks: int) -> int:
    kept = len(record.kept)
    if not 1 <= networks <= kept:
        raise InputError(f"{networks} networks of {kept} kept epochs; allow 1 to {kept}")
    return kept


def _rows(record: RunRecord, epochs: list[int]) -> list[int]:
    if lost := set(epochs) - set(record.kept.tolist()):
        raise InputError(f"epoch {min(lost)} is not kept; kept are {record.kept.tolist()}")
    return np.searchsorted(record.kept, epochs).tolist()


def _weigh(record: RunRecord, rows: range | list[int]) -> Fusion:
    weights = np.zeros(record.epochs)
    weights[record.kept[list(rows)]] = 1 / len(rows)
    return Fusion(weights)
