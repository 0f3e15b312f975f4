"""Score ways of choosing on the halves of recorded runs, and vary what they may choose from.

A way of choosing is a function from the validation half of a run to weights over its epochs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from fmnlib import noise
from fmnlib.config import InputError, RunConfig
from fmnlib.fusion import Fusion, around, fuse, refuse_test, share_intervals, single
from fmnlib.record import Result, RunRecord
from fmnlib.scores import by_class
from fmnlib.stats import score

Choice = Callable[[RunRecord], Fusion]
"""A way of choosing, from the validation half to weights over the epochs."""


def scored(
    records: Sequence[RunRecord],
    splits: Sequence[int],
    ways: Mapping[str, Choice],
    *,
    item: str = "ablation",
) -> list[Result]:
    """Choose on the validation half of each split, in each way, and score on its test half.

    Args:
        records: Trained runs; their configs name setting and seed.
        splits: Seeds of the splits.
        ways: Ways of choosing, by name; the name is the method of the result.
        item: Name of the experiment.
    """
    results = []
    for record in records:
        cost = float(record.provenance["seconds"])
        for split in splits:
            val, test = record.split(split)
            for name, choose in ways.items():
                fusion = choose(val)
                result = score(
                    fuse(test, fusion),
                    test,
                    item=item,
                    method=name,
                    split=split,
                    networks=fusion.networks,
                    seconds=cost,
                )
                results.append(result)
    return results


def given(change: Callable[[RunRecord], RunRecord], choose: Choice) -> Choice:
    """The way that chooses from a changed validation half.

    >>> record = RunRecord.from_arrays(np.full((6, 9, 2), 0.5), [0] * 9)
    >>> from fmnlib.fusion import uniform
    >>> given(lambda val: spaced(val, 2), uniform)(record).networks
    2
    """
    return lambda val: choose(change(val))


def always(fusion: Fusion) -> Choice:
    """The way that takes a fusion found elsewhere, whatever the validation half says."""
    return lambda val: fusion


def spaced(val: RunRecord, count: int) -> RunRecord:
    """The record with some equally spaced epochs alone, the last one among them.

    >>> record = RunRecord.from_arrays(np.full((6, 1, 2), 0.5), [0])
    >>> spaced(record, 3).kept.tolist()
    [1, 3, 5]
    """
    kept = _enough(val.kept, count)
    return val.keep(kept[[(i + 1) * len(kept) // count - 1 for i in range(count)]])


def early(val: RunRecord, count: int) -> RunRecord:
    """The record with some epochs alone, dense at first: spaced as a geometric series.

    First and last are among them; numbers that the rounding would repeat move on by one.

    >>> record = RunRecord.from_arrays(np.full((16, 1, 2), 0.5), [0])
    >>> early(record, 5).kept.tolist()
    [0, 1, 3, 7, 15]
    """
    kept = _enough(val.kept, count)
    rows = np.round(np.geomspace(1, len(kept), count)).astype(int) - 1
    return val.keep(kept[np.maximum(rows, np.arange(count))])


def fewer(val: RunRecord, count: int, seed: int = 0) -> RunRecord:
    """Some samples of a validation half, drawn at random.

    >>> record = RunRecord.from_arrays(np.full((2, 9, 2), 0.5), [0] * 9)
    >>> len(fewer(record, 4).labels)
    4
    """
    refuse_test(val)
    chosen = _enough(np.random.default_rng(seed).permutation(len(val.labels)), count)[:count]
    return val.take(np.sort(chosen), "val")


def mislabelled(val: RunRecord, confused_with: Mapping[int, int], seed: int = 0) -> RunRecord:
    """A validation half whose labels are as wrong as those that its run was trained on.

    Args:
        val: The validation half of a run with symmetric, asymmetric or no noise.
        confused_with: For asymmetric noise, as `fmnlib.data.confused_with` gives it.
        seed: Draws which labels are flipped.
    """
    refuse_test(val)
    config = _config(val)
    if config.noise == "none":
        return val
    if config.noise == "symmetric":
        labels, _ = noise.symmetric(val.labels, val.classes, config.noise_rate, seed)
    elif config.noise == "asymmetric":
        labels, _ = noise.asymmetric(val.labels, confused_with, config.noise_rate, seed)
    else:
        raise InputError(f"the run's noise is {config.noise}; allow symmetric or asymmetric")
    return dataclasses.replace(val, labels=labels)


def share_accuracy(
    record: RunRecord, epoch: int, window: int, shares: Float64[np.ndarray, " shares"]
) -> Float64[np.ndarray, " shares"]:
    """Accuracy of the final model mixed with the window of an epoch, at shares between 0 and 1.

    >>> probs = np.array([[[0.9, 0.1]], [[0.4, 0.6]]])
    >>> record = RunRecord.from_arrays(probs, [0])
    >>> share_accuracy(record, 0, 0, np.array([0.1, 0.5])).tolist()
    [0.0, 1.0]
    """
    final, candidate = fuse(record, single(record)), fuse(record, around(record, epoch, window))
    lo, hi = share_intervals(final, candidate, record.labels)
    return ((lo < shares[:, None]) & (shares[:, None] < hi)).mean(axis=1)


def reliability(
    record: RunRecord, fusion: Fusion, bins: int = 10
) -> tuple[Float64[np.ndarray, " used"], Float64[np.ndarray, " used"]]:
    """Mean confidence and accuracy in equal bins of confidence; empty bins are left out.

    >>> probs = np.array([[[0.75, 0.25], [0.75, 0.25], [0.95, 0.05]]])
    >>> record = RunRecord.from_arrays(probs, [0, 1, 0])
    >>> [values.tolist() for values in reliability(record, single(record))]
    [[0.75, 0.95], [0.5, 1.0]]
    """
    from sklearn.calibration import calibration_curve

    probs = fuse(record, fusion)
    right = probs.argmax(axis=1) == record.labels
    accuracy, confidence = calibration_curve(right, probs.max(axis=1), n_bins=bins)
    return confidence, accuracy


def class_accuracy(
    records: Sequence[RunRecord], splits: Sequence[int], choose: Choice
) -> Float64[np.ndarray, " classes"]:
    """Test accuracy of each class, mean over runs and splits."""
    rows = []
    for record in records:
        for split in splits:
            val, test = record.split(split)
            right = fuse(test, choose(val)).argmax(axis=1) == test.labels
            rows.append(by_class(right[None], test.labels, test.classes)[:, 0])
    return np.mean(rows, axis=0)


def _config(record: RunRecord) -> RunConfig:
    if record.config is None:
        raise InputError("this record has no config; give the record of a trained run")
    return record.config


def _enough(values: np.ndarray, count: int) -> np.ndarray:
    if not 1 <= count <= len(values):
        raise InputError(f"{count} of {len(values)} are wanted; allow 1 to {len(values)}")
    return values
