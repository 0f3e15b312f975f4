"""The search for what a run forgot: Knowledge Fusion, by the papers' rule or exhaustive.

Both find the weights of a `fmnlib.fusion.Fusion`, pick after pick, on the validation half. All
arithmetic that decides is elementwise, so that a search ends with the same bits on every machine.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from fmnlib.config import InputError
from fmnlib.fusion import (
    Fusion,
    Probs,
    Right,
    clip_window,
    fuse,
    kept_probs,
    refuse_test,
    right_samples,
    single,
    to_float64,
)
from fmnlib.record import RunRecord
from fmnlib.scores import forget_fraction
from fmnlib.shares import best_share, share_intervals

__all__ = ["exhaustive_fusion", "knowledge_fusion"]


def knowledge_fusion(
    val: RunRecord,
    *,
    window: int | None = None,
    max_picks: int | None = None,
    grid: Float[np.ndarray, " shares"] | None = None,
) -> Fusion:
    """Find what the final model forgot and mix it back in (Algorithm 1 of AAAI 2025).

    Repeats: pick the epoch with the largest forget fraction against the predictor fused so far,
    average the probabilities of its window, choose the share by validation accuracy, mix. Stops
    when validation accuracy no longer rises.

    Args:
        val: The validation half of a run.
        window: Kept epochs averaged on either side of a pick (clipped at the ends), w. Where not
            given, the papers' 1, or 0 if fewer than three epochs are kept.
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
    probs, wide = kept_probs(val), _window(val, window)
    correct = val.correct[val.kept]

    def propose(fused: Probs, right: Right) -> tuple[int, float, Probs]:
        row = int(forget_fraction(correct, right).argmax())
        candidate = _window_mean(probs, row, wide)
        if grid is not None:
            accuracy = [right_samples(_mix(fused, candidate, s), val.labels).mean() for s in grid]
            return row, float(grid[int(np.argmax(accuracy))]), candidate
        return row, best_share(*share_intervals(fused, candidate, val.labels))[0], candidate

    return _fuse_greedily(val, wide, max_picks, propose)


def exhaustive_fusion(
    val: RunRecord, *, window: int | None = None, max_picks: int | None = None
) -> Fusion:
    """As `knowledge_fusion`, but each pick is the best of all epochs at their exact best shares.

    It selects among many more candidates on the same samples, so it follows the noise of the
    validation half more closely; compare the two on other samples.
    """
    probs, wide = kept_probs(val), _window(val, window)
    samples, labels = np.arange(len(val.labels))[:, None], val.labels

    def propose(fused: Probs, right: Right) -> tuple[int, float, Probs]:
        # Two rivals of each label, the mix's strongest and the class that the epoch predicts,
        # bound the epoch's count from above; few epochs then need all classes.
        rivals = fused.copy()
        rivals[samples[:, 0], labels] = -1
        strongest, bounds = rivals.argmax(axis=1), []
        for row, predicted in enumerate(val.predicted[val.kept]):
            few = samples, np.stack([labels, strongest, predicted], axis=1)
            candidate = _window_mean(probs, row, wide, few)
            ends = share_intervals(fused[few], candidate, np.zeros_like(labels))
            bounds.append(best_share(*ends)[1])
        best = (-1, 0.0, 0, 0.0)
        for row in np.argsort(bounds)[::-1].tolist():
            if bounds[row] >= best[0]:
                ends = share_intervals(fused, _window_mean(probs, row, wide), labels)
                share, count, width = best_share(*ends)
                best = max(best, (count, width, -row, share))
        return -best[2], best[3], _window_mean(probs, -best[2], wide)

    return _fuse_greedily(val, wide, max_picks, propose)


def _fuse_greedily(
    val: RunRecord,
    window: int,
    max_picks: int | None,
    propose: Callable[[Probs, Right], tuple[int, float, Probs]],
) -> Fusion:
    refuse_test(val)
    probs = kept_probs(val)
    if max_picks is not None and max_picks < 1:
        raise InputError(f"max_picks is {max_picks}; allow 1 or more, or none for no limit")
    weights = single(val).weights
    fused = fuse(val, Fusion(weights))
    right = right_samples(fused, val.labels)
    picks: list[tuple[int, float]] = []
    while max_picks is None or len(picks) < max_picks:
        row, share, candidate = propose(fused, right)
        mixed = _mix(fused, candidate, share)
        now_right = right_samples(mixed, val.labels)
        if now_right.sum() <= right.sum():
            break
        fused, right = mixed, now_right
        chosen = val.kept[clip_window(row, window, len(probs))]
        weights = (1 - share) * weights
        weights[chosen] += share / len(chosen)
        picks.append((int(val.kept[row]), share))
    return Fusion(weights, tuple(picks), window)


def _window(val: RunRecord, window: int | None) -> int:
    most = (len(val.kept) - 1) // 2
    if window is None:
        return min(1, most)
    if not 0 <= window <= most:
        raise InputError(f"window is {window} with {len(val.kept)} kept epochs; allow 0 to {most}")
    return window


def _window_mean(
    probs: np.ndarray, row: int, window: int, where: slice | tuple[np.ndarray, ...] = slice(None)
) -> Probs:
    members = probs[clip_window(row, window, len(probs))]
    total = to_float64(members[0][where])
    for member in members[1:]:
        total += to_float64(member[where])
    total /= len(members)
    return total


def _mix(fused: Probs, candidate: Probs, share: float) -> Probs:
    return (1 - share) * fused + share * candidate
