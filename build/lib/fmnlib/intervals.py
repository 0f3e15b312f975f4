"""Intervals for shares and for paired gains, over samples that chose nothing.

They say how far a number may be off because the samples are few. They say nothing of another
training run: that takes several seeds (`fmnlib.stats`).
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

__all__ = ["Gain", "Interval", "gain", "share"]

_EDGE = 1e-9


@dataclasses.dataclass(frozen=True)
class Interval:
    """A measured number and the ends of its interval, as shares of 1."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """In percent: the value, then the ends."""
        return f"{100 * self.value:.1f}% ({100 * self.low:.1f} to {100 * self.high:.1f})"


class Gain(Interval):
    """An interval of a difference."""

    def __str__(self) -> str:
        """In percentage points, with a sign: the value, then the ends."""
        ends = f"{100 * self.low:+.1f} to {100 * self.high:+.1f}"
        return f"{100 * self.value:+.1f} points ({ends})"


def share(count: int, samples: int, level: float = 0.95) -> Interval:
    """The share of samples with some property, with Wilson's interval.

    >>> print(share(0, 100))
    0.0% (0.0 to 3.7)
    """
    ends = binomtest(count, samples).proportion_ci(level, method="wilson")
    return Interval(count / samples, float(ends.low), float(ends.high))


def gain(
    right: Bool[np.ndarray, " samples"],
    baseline: Bool[np.ndarray, " samples"],
    level: float = 0.95,
) -> Gain:
    """How much more accurate one predictor is than another on the same samples.

    The score interval of Tango (1998) for a difference of paired shares: it rests on the
    samples on which the two differ, as McNemar's test does, and keeps a width where none do.

    Args:
        right: Which samples the predictor gets right.
        baseline: Which ones the other gets right.
        level: Of the interval.

    >>> right, baseline = np.ones(100, bool), np.arange(100) >= 10
    >>> print(gain(right, baseline))
    +10.0 points (+5.5 to +17.4)
    """
    won, lost = int((right & ~baseline).sum()), int((~right & baseline).sum())
    samples = len(right)
    value, z = (won - lost) / samples, float(norm.ppf((1 + level) / 2))

    def end(sign: int) -> float:
        def beyond(delta: float) -> float:
            return sign * _score(delta, won, lost, samples) + z

        limit = sign * (1 - _EDGE)
        if sign * value > 1 - _EDGE:  # every sample speaks for this end
            return float(sign)
        return float(brentq(beyond, value, limit))

    return Gain(value, end(-1), end(1))


def _score(delta: float, won: int, lost: int, samples: int) -> float:
    """Tango's statistic: how many deviations the wins exceed what a gain of delta explains."""
    b = (2 * samples - won + lost) * delta - won - lost
    c = -lost * delta * (1 - delta)
    lost_share = (math.sqrt(max(b * b - 8 * samples * c, 0)) - b) / (4 * samples)
    variance = samples * (2 * lost_share + delta * (1 - delta))
    excess = won - lost - samples * delta
    return excess / math.sqrt(variance) if excess else 0.0
