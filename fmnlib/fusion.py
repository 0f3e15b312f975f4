"""Checkpoint ensembles of one run: each is a vector of weights over epochs, of sum 1.

A single network is a one-hot vector, a horizontal ensemble is uniform over the last k, and
Knowledge Fusion (Algorithm 1 of AAAI 2025) is the vector that its search returns: the mix

    prob <- eps_i * mean(prob[A_i - w .. A_i + w]) + (1 - eps_i) * prob,    i = 1, 2, ...

is a nested convex combination, so the final model weighs prod_i (1 - eps_i) and the window of
pick i weighs eps_i * prod_{j > i} (1 - eps_j). Prediction is a weighted sum, whatever the method.

What selects takes the validation half and refuses the test half.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int

from fmnlib.config import InputError
from fmnlib.files import write_whole
from fmnlib.record import RunRecord

__all__ = [
    "Fusion",
    "accuracy",
    "around",
    "early_stopping",
    "fixed_jumps",
    "fuse",
    "horizontal",
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
        split: Seed of the halves on one of which it was chosen, where that is known.
    """

    weights: Float64[np.ndarray, " epochs"]
    picks: tuple[tuple[int, float], ...] = ()
    window: int = 0
    split: int | None = None

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
            weights, split = np.array(fields["weights"], np.float64), fields.get("split")
            if weights.ndim != 1 or not (weights >= 0).all() or abs(weights.sum() - 1) > 1e-6:
                raise ValueError("weights")
            return cls(
                weights, picks, int(fields["window"]), None if split is None else int(split)
            )
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
    probs = kept_probs(record)
    if len(fusion.weights) != record.epochs:
        given = f"{len(fusion.weights)} weights for {record.epochs} epochs"
        raise InputError(f"{given}; a fusion belongs to the run that it was found on")
    fused = np.zeros(probs.shape[1:])
    for epoch in np.flatnonzero(fusion.weights):  # in order, so that rounding is the same anywhere
        row = np.flatnonzero(record.kept == epoch)
        if not len(row):
            raise InputError(f"epoch {epoch} has weight but no probabilities; keep it in the run")
        fused += fusion.weights[epoch] * to_float64(probs[row[0]])
    return fused


def accuracy(record: RunRecord, fusion: Fusion) -> float:
    """Accuracy of a fusion on a record, from 0 to 1."""
    return float(right_samples(fuse(record, fusion), record.labels).mean())


def single(record: RunRecord, epoch: int | None = None) -> Fusion:
    """One network: the final one, or that of an epoch."""
    return _weigh(record, _rows(record, [record.epochs - 1 if epoch is None else epoch]))


def early_stopping(val: RunRecord) -> Fusion:
    """The network with the best validation accuracy, the earliest one at a tie."""
    refuse_test(val)
    _enough(val, 1)
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
    return _weigh(record, range(len(record.kept))[clip_window(row, window, len(record.kept))])


def uniform(record: RunRecord) -> Fusion:
    """All kept networks, equally weighted."""
    return _weigh(record, range(len(record.kept)))


def clip_window(row: int, window: int, rows: int) -> slice:
    return slice(max(0, row - window), min(rows, row + window + 1))


def to_float64(values: np.ndarray) -> np.ndarray:
    # A table turns float16 into float64 three times as fast as numpy, which is slow at numbers
    # near 0, and softmax makes many.
    if values.dtype == np.float16:
        return _HALVES[values.view(np.uint16).astype(np.intp)]
    return values.astype(np.float64)


def right_samples(probs: Probs, labels: Int[np.ndarray, " samples"]) -> Right:
    return probs.argmax(axis=1) == labels


def kept_probs(record: RunRecord) -> np.ndarray:
    if record.probs is None:
        raise InputError("this record holds no probabilities; load the run's own folder")
    return record.probs


def refuse_test(record: RunRecord) -> None:
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
