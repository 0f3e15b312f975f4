"""From scores to claims: means with standard errors, paired differences with intervals, tables.

The replicate is the training seed: scores are averaged over the splits of a seed first, because
the halves of one run are not independent. Standard errors and intervals are over seeds.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import t as student_t

from fmnlib.config import InputError
from fmnlib.record import Result

__all__ = [
    "Summary",
    "calibration_error",
    "costs",
    "mean_sem",
    "nll",
    "paired_difference",
    "percent",
    "score",
    "summarize",
    "table",
]

Summary = dict[str, dict[str, dict[str, float]]]
"""Of each setting and method `mean`, `sem` and `n`; accuracies in percent."""


def mean_sem(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is not a number.

    >>> mean_sem([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896258)
    """
    values = np.asarray(values, float)
    sem = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(sem)


def nll(probs: Float[np.ndarray, "samples classes"], labels: Int[np.ndarray, " samples"]) -> float:
    """Negative log-likelihood, in nats a sample; probabilities below 1e-12 count as 1e-12.

    >>> round(nll(np.array([[0.5, 0.5]]), np.array([0])), 4)
    0.6931
    """
    chosen = probs[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(chosen.clip(1e-12, 1)).mean())


def calibration_error(
    probs: Float[np.ndarray, "samples classes"],
    labels: Int[np.ndarray, " samples"],
    bins: int = 15,
) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over equal bins.

    >>> calibration_error(np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]))
    0.25
    """
    confidence = probs.max(axis=1).astype(np.float64)
    gap = (probs.argmax(axis=1) == labels) - confidence
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(bin_of, gap, minlength=bins)).sum() / len(labels))


def score(
    probs: Float[np.ndarray, "samples classes"], labels: Int[np.ndarray, " samples"], **about: Any
) -> Result:
    """Accuracy, likelihood and calibration of some predictions, as a result.

    Args:
        probs: Class probabilities.
        labels: True classes.
        about: The other fields of `Result`: item, setting, method, seeds, networks, seconds.

    >>> about = {"item": "x", "setting": "clean", "method": "kf", "seed": 0, "split_seed": 0}
    >>> probs, labels = np.array([[0.75, 0.25]]), np.array([1])
    >>> result = score(probs, labels, **about, networks=1, train_seconds=2.5)
    >>> result.accuracy, result.ece, round(result.nll, 4)
    (0.0, 0.75, 1.3863)
    """
    return Result(
        accuracy=float((probs.argmax(axis=1) == labels).mean()),
        nll=nll(probs, labels),
        ece=calibration_error(probs, labels),
        **about,
    )


def summarize(results: Iterable[Result]) -> Summary:
    """Mean accuracy, standard error and number of seeds of each setting and method, in percent."""
    frame = _per_seed(results)
    summary: Summary = {}
    for key, values in frame.groupby(["setting", "method"], sort=False)["accuracy"]:
        setting, method = map(str, key)
        summary.setdefault(setting, {})[method] = percent(values.to_numpy())
    return summary


def percent(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean, standard error and number of values, in percent, as the book's summary holds them.

    >>> percent([0.5, 0.7])
    {'mean': 60.0, 'sem': 10.0, 'n': 2}
    """
    mean, sem = mean_sem(100 * np.asarray(values))
    return {"mean": round(mean, 4), "sem": round(sem, 4), "n": len(values)}


def paired_difference(
    results: Iterable[Result], setting: str, method: str, baseline: str, level: float = 0.95
) -> tuple[float, float, float]:
    """How much more accurate a method is than a baseline on the same runs and splits.

    Args:
        results: Scores of both.
        setting: Such as sym40.
        method: Such as kf.
        baseline: Such as single.
        level: Of the interval by Student's t over seeds.

    Returns:
        The mean difference and the ends of its interval, in percentage points.

    Raises:
        InputError: If a run or split has only one of the two.
    """
    frame = _frame(results)
    frame = frame[(frame["setting"] == setting) & frame["method"].isin([method, baseline])]
    pairs = frame.pivot_table(index=["seed", "split_seed"], columns="method", values="accuracy")
    if set(pairs.columns) != {method, baseline} or pairs.isna().any(axis=None):
        raise InputError(f"{method} and {baseline} are not paired in {setting}; score both on all")
    per_seed = 100 * (pairs[method] - pairs[baseline]).groupby("seed").mean()
    mean, sem = mean_sem(per_seed.to_numpy())
    half = float(student_t.ppf((1 + level) / 2, len(per_seed) - 1)) * sem
    return mean, mean - half, mean + half


def table(summary: Mapping[str, Mapping[str, Mapping[str, float]]]) -> pd.DataFrame:
    """A table for reading: methods down, settings across, mean ± standard error in percent."""
    columns = {
        setting: {method: f"{n['mean']:.1f} ± {n['sem']:.1f}" for method, n in methods.items()}
        for setting, methods in summary.items()
    }
    return pd.DataFrame(columns)


def costs(results: Iterable[Result], setting: str) -> pd.DataFrame:
    """What each method costs in a setting: networks a prediction, seconds of training, means."""
    frame = _frame(results)
    frame = frame[frame["setting"] == setting]
    return (
        frame.groupby("method", sort=False)[["networks", "train_seconds"]]
        .mean()
        .round(1)
        .rename_axis(None)
    )


def _frame(results: Iterable[Result]) -> pd.DataFrame:
    return pd.DataFrame([vars(result) for result in results])


def _per_seed(results: Iterable[Result]) -> pd.DataFrame:
    keys = ["setting", "method", "seed"]
    return _frame(results).groupby(keys, sort=False)["accuracy"].mean().reset_index()
