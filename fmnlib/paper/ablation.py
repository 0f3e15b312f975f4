"""Score selection methods on the halves of recorded runs, and vary what they select from.

A selection method is a function from the validation half of a run to weights over its epochs.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from fmnlib.config import InputError
from fmnlib.fusion import Fusion, Search, around, fixed_jumps, fuse, share_intervals, single
from fmnlib.noise import noisy_labels
from fmnlib.record import Result, RunRecord, refuse_test
from fmnlib.scores import by_class
from fmnlib.stats import score


def scored(
    records: Sequence[RunRecord],
    splits: Sequence[int],
    ways: Mapping[str, Search],
    *,
    item: str,
    extra_seconds: float = 0.0,
) -> list[Result]:
    """Select by each method on the validation half of each split; score on the test half.

    `ways` has the methods by name. Setting and seed come from the records' configs; without
    `splits` each run has the split of its training seed. `extra_seconds` of training count for
    every method, besides the run's own.
    """
    results = []
    for record, split, val, test in _splits(records, splits):
        about: dict[str, Any] = {"item": item, "split": split}
        about["seconds"] = extra_seconds + float(record.provenance["seconds"])
        for method, choose in ways.items():
            fusion = choose(val)
            about |= {"method": method, "networks": fusion.networks}
            results.append(score(fuse(test, fusion), test, **about))
    return results


def on_changed(change: Callable[[RunRecord], RunRecord], choose: Search) -> Search:
    """The selection method `choose`, applied to a changed validation half.

    >>> record = RunRecord.from_arrays(np.full((6, 9, 2), 0.5), [0] * 9)
    >>> from fmnlib.fusion import uniform
    >>> on_changed(lambda val: spaced(val, 2), uniform)(record).networks
    2
    """
    return lambda val: choose(change(val))


def always(fusion: Fusion) -> Search:
    """The selection method that returns this fusion for any validation half."""
    return lambda val: fusion


def spaced(val: RunRecord, count: int) -> RunRecord:
    """The record with some equally spaced epochs alone, those of `fmnlib.fusion.fixed_jumps`.

    >>> spaced(RunRecord.from_arrays(np.full((6, 1, 2), 0.5), [0]), 3).kept.tolist()
    [1, 3, 5]
    """
    return val.keep(np.flatnonzero(fixed_jumps(val, count).weights))


def early(val: RunRecord, count: int) -> RunRecord:
    """The record reduced to `count` epochs, geometrically spaced: dense at the beginning.

    The first and the last are included; epochs that rounding would repeat move on by one.

    >>> early(RunRecord.from_arrays(np.full((16, 1, 2), 0.5), [0]), 5).kept.tolist()
    [0, 1, 3, 7, 15]
    """
    _check_count(count, len(val.kept))
    rows = np.round(np.geomspace(1, len(val.kept), count)).astype(int) - 1
    return val.keep(val.kept[np.maximum(rows, np.arange(count))])


def fewer(val: RunRecord, count: int) -> RunRecord:
    """A random subset of `count` samples of a validation half.

    >>> len(fewer(RunRecord.from_arrays(np.full((2, 9, 2), 0.5), [0] * 9), 4).labels)
    4
    """
    refuse_test(val)
    _check_count(count, len(val.labels))
    chosen = np.random.default_rng(0).permutation(len(val.labels))[:count]
    return val.take(np.sort(chosen), "val")


def mislabelled(val: RunRecord) -> RunRecord:
    """A validation half with the label noise of its run: symmetric, asymmetric or none."""
    refuse_test(val)
    if val.config is None:
        raise InputError("this record has no config; use the record of a trained run")
    if val.config.noise not in ("none", "symmetric", "asymmetric"):
        raise InputError(f"the run's noise is {val.config.noise}; choose symmetric or asymmetric")
    config, every = dataclasses.replace(val.config, noise_seed=0), np.arange(len(val.labels))
    labels, _ = noisy_labels(config, val.labels, every, val.classes)
    return dataclasses.replace(val, labels=labels)


def share_accuracy(
    record: RunRecord, epoch: int, window: int, shares: Float64[np.ndarray, " shares"]
) -> Float64[np.ndarray, " shares"]:
    """Accuracy of the final model mixed with an epoch's window, at shares above 0 and below 1.

    >>> probs = np.array([[[0.9, 0.1]], [[0.4, 0.6]]])
    >>> record = RunRecord.from_arrays(probs, [0])
    >>> share_accuracy(record, 0, 0, np.array([0.1, 0.5])).tolist()
    [0.0, 1.0]
    """
    final, candidate = fuse(record, single(record)), fuse(record, around(record, epoch, window))
    lo, hi = share_intervals(final, candidate, record.labels)
    return ((lo < shares[:, None]) & (shares[:, None] < hi)).mean(axis=1)


def class_accuracy(
    records: Sequence[RunRecord], splits: Sequence[int], choose: Search
) -> Float64[np.ndarray, " classes"]:
    """Test accuracy of each class, mean over runs and splits."""
    rows = []
    for _, _, val, test in _splits(records, splits):
        right = fuse(test, choose(val)).argmax(axis=1) == test.labels
        rows.append(by_class(right[None], test.labels, test.classes)[:, 0])
    return np.nanmean(rows, axis=0)  # a half may lack a class


def _splits(
    records: Sequence[RunRecord], splits: Sequence[int]
) -> Iterator[tuple[RunRecord, int, RunRecord, RunRecord]]:
    for record in records:
        for split in splits or [record.config.seed if record.config else 0]:
            yield record, split, *record.split(split)


def _check_count(count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise InputError(f"count is {count}; choose one from 1 to {most}")
