"""The exact share of a candidate in a mix: accuracy as a step function of eps, without a grid."""

import numpy as np
from jaxtyping import Float64, Int

__all__ = ["best_share", "share_intervals"]

_ROUNDING = 1e-12


def share_intervals(
    fused: Float64[np.ndarray, "samples classes"],
    candidate: Float64[np.ndarray, "samples classes"],
    labels: Int[np.ndarray, " samples"],
) -> tuple[Float64[np.ndarray, " samples"], Float64[np.ndarray, " samples"]]:
    """The open interval (lo, hi) of shares at which each sample is classified correctly.

    With a_c = q_y - q_c and b_c = p_y - p_c, class y beats its rival c at share eps iff
    (1 - eps) a_c + eps b_c > 0: a half-line with its end at a_c / (a_c - b_c). The shares that
    beat every rival are therefore one interval; it is empty where lo >= hi. Of two classes that
    tie at every share the lower index wins, as it does for argmax.

    >>> import numpy as np
    >>> q, p = np.array([[0.25, 0.75]]), np.array([[1.0, 0.0]])
    >>> [end.tolist() for end in share_intervals(q, p, np.array([0]))]
    [[0.3333333333333333], [1.0]]
    """
    samples, classes = np.arange(len(labels)), np.arange(fused.shape[1])
    fused_label = fused[samples, labels][:, None]
    candidate_label = candidate[samples, labels][:, None]
    ahead_before, ahead_after = fused > fused_label, candidate > candidate_label
    never = (fused >= fused_label) & (candidate >= candidate_label)
    never &= ahead_before | ahead_after | (classes < labels[:, None])
    live = ~never.any(axis=1)
    lo, hi = np.zeros(len(labels)), live.astype(np.float64)
    for end, ahead, tighten in ((lo, ahead_before, np.maximum), (hi, ahead_after, np.minimum)):
        sample, rival = np.nonzero(ahead & live[:, None])  # few, and only these need a division
        before = fused_label[sample, 0] - fused[sample, rival]
        after = candidate_label[sample, 0] - candidate[sample, rival]
        tighten.at(end, sample, before / (before - after))
    return lo, hi


def best_share(
    lo: Float64[np.ndarray, " samples"], hi: Float64[np.ndarray, " samples"]
) -> tuple[float, int, float]:
    """The middle of the widest interval of shares with the most samples inside their (lo, hi).

    Accuracy is an exact step function of the share, #{n: lo_n < eps < hi_n}, so that two sorts
    find its maximum. An interval as narrow as the rounding of its ends is no interval.

    Returns:
        The share, the number of samples right at it, the width of its interval.

    >>> import numpy as np
    >>> best_share(np.array([0.0, 0.25]), np.array([0.75, 1.0]))
    (0.5, 2, 0.5)
    """
    inside = hi - lo > _ROUNDING
    starts, stops = np.sort(lo[inside]), np.sort(hi[inside])
    steps = np.unique(np.concatenate([[0.0, 1.0], starts, stops]))
    begun = np.searchsorted(starts, steps[:-1], side="right")
    count = begun - np.searchsorted(stops, steps[:-1], side="right")
    width = np.diff(steps)
    count[width <= _ROUNDING] = -1
    widest = int(np.where(count == count.max(), width, -1.0).argmax())
    share = (steps[widest] + steps[widest + 1]) / 2
    return float(share), int(count[widest]), float(width[widest])
