"""What a fusion gains on the test half, told as named numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from fmnlib import intervals
from fmnlib.fusion import Fusion, early_stopping, fuse, right_samples, single
from fmnlib.record import RunRecord

__all__ = ["gains", "picks"]


def gains(
    val: RunRecord,
    test: RunRecord,
    fusion: Fusion,
    others: Mapping[str, Bool[np.ndarray, " samples"]] | None = None,
) -> dict[str, Any]:
    """Test accuracies, and how much each is above the final network's, with an interval.

    Args:
        val: The half that chose the fusion; early stopping chooses on it too.
        test: The other half.
        fusion: What was chosen.
        others: Which test samples other predictors get right.
    """
    chosen = {"single": single(val), "early_stopping": early_stopping(val), "fused": fusion}
    right = {name: right_samples(fuse(test, f), test.labels) for name, f in chosen.items()}
    right |= others or {}
    told: dict[str, Any] = {f"test accuracy, {n}": float(r.mean()) for n, r in right.items()}
    baseline = right.pop("single")
    return told | {f"gain, {name}": intervals.gain(r, baseline) for name, r in right.items()}


def picks(fusion: Fusion, names: Sequence[str]) -> dict[str, str]:
    """The picks of a fusion in order, each with its share.

    >>> picks(Fusion(np.array([0.25, 0.75]), ((0, 0.25),)), ["first", "last"])
    {'pick 1': 'first, share 0.250'}
    """
    return {
        f"pick {i + 1}": f"{names[epoch]}, share {share:.3f}"
        for i, (epoch, share) in enumerate(fusion.picks)
    }
