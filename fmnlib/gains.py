"""What a fusion gains on the test half, as a table."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool

from fmnlib import intervals
from fmnlib.fusion import Fusion, early_stopping, fuse, right_samples, single
from fmnlib.intervals import Gain
from fmnlib.record import RunRecord

__all__ = ["gains", "in_rows", "picks"]


def gains(
    val: RunRecord,
    test: RunRecord,
    fusion: Fusion,
    others: Mapping[str, Bool[np.ndarray, " samples"]] | None = None,
) -> pd.DataFrame:
    """Test accuracies, and how much each is above the final network's, with an interval.

    Args:
        val: The half that chose the fusion; early stopping chooses on it too.
        test: The other half.
        fusion: What was chosen.
        others: Which test samples other predictors get right.

    Returns:
        A row a predictor (single, early_stopping, fused, others) with accuracy, gain over the
        final network, and the ends of its interval (`fmnlib.intervals.gain`), as shares of 1.
    """
    chosen = {"single": single(val), "early_stopping": early_stopping(val), "fused": fusion}
    right = {name: right_samples(fuse(test, f), test.labels) for name, f in chosen.items()}
    right |= others or {}
    rows = {}
    for name, mask in right.items():
        found = intervals.gain(mask, right["single"])
        ends = {"gain": found.value, "low": found.low, "high": found.high}
        rows[name] = {"accuracy": float(mask.mean())} | ends
    rows["single"] |= dict.fromkeys(("gain", "low", "high"), 0.0)
    return pd.DataFrame(rows).T


def in_rows(table: pd.DataFrame) -> dict[str, float | Gain]:
    """The same as named numbers, for one line each."""
    told: dict[str, float | Gain] = {
        f"test accuracy, {name}": float(value) for name, value in table["accuracy"].items()
    }
    for name, row in table.drop(index="single").iterrows():
        told[f"gain, {name}"] = Gain(*map(float, row[["gain", "low", "high"]]))
    return told


def picks(fusion: Fusion, names: Sequence[str]) -> dict[str, str]:
    """The picks of a fusion in order, each with its share.

    >>> picks(Fusion(np.array([0.25, 0.75]), ((0, 0.25),)), ["first", "last"])
    {'pick 1': 'first, share 0.250'}
    """
    return {
        f"pick {i + 1}": f"{names[epoch]}, share {share:.3f}"
        for i, (epoch, share) in enumerate(fusion.picks)
    }
