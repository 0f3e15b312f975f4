"""From scores to claims: means with standard errors, paired differences with intervals, tables.

The replicate is the training seed: scores are averaged over the splits of a seed first, because
the halves of one run are not independent. Standard errors and intervals are over seeds.

For a single run, `proportion`, `paired_gain` and `gains` give intervals over samples on which
nothing was chosen: the uncertainty due to the number of samples. They do not cover run-to-run
variation.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.optimize import brentq
from scipy.stats import norm
from scipy.stats import t as student_t

from fmnlib.config import InputError
from fmnlib.fusion import (
    Fusion,
    best_epochs,
    early_stopping,
    early_stopping_window,
    fuse,
    right_samples,
    single,
)
from fmnlib.record import Result, RunRecord

MARGIN = 0.5
"""Smallest difference of interest, in percentage points."""
OUTCOMES = {
    "found": "found",
    "opposite": "the opposite",
    "equal": f"equal within {MARGIN} points",
    "not clear": "not clear",
    "one seed": "one seed",
}
"""The outcomes of a claim, as they are displayed."""
_EDGE = 1e-9  # the ends of a gain's interval are sought from -1 + _EDGE to 1 - _EDGE
_MIN_GROUPS = 5  # with fewer, see `_design_effect`

Mask = Bool[np.ndarray, " samples"]
Probs = Float[np.ndarray, "samples classes"]
Labels = Int[np.ndarray, " samples"]
Groups = np.ndarray | None  # one for each sample, equal where samples depend on each other
Values = Sequence[float] | np.ndarray  # one for each seed


class Numbers(TypedDict):
    """Mean, standard error over seeds, number of seeds and the value of each, in percent."""

    mean: float
    sem: float | None
    n: int
    seeds: list[float]


Summary = dict[str, dict[str, Numbers]]
"""The numbers of each setting and method."""


def mean_sem(values: Values) -> tuple[float, float]:
    """Mean and standard error of the mean; of a single value the error is NaN.

    >>> mean_sem([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896258)
    """
    values = np.asarray(values, float)
    sem = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(sem)


def nll(probs: Probs, labels: Labels) -> float:
    """Negative log-likelihood, in nats a sample; probabilities below 1e-12 count as 1e-12.

    >>> round(nll(np.array([[0.5, 0.5]]), np.array([0])), 4)
    0.6931
    """
    chosen = probs[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(chosen.clip(1e-12)).mean())


def calibration_error(probs: Probs, labels: Labels, bins: int = 15) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over equal bins.

    >>> calibration_error(np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]))
    0.25
    """
    confidence = probs.max(axis=1).astype(np.float64)
    gap = (probs.argmax(axis=1) == labels) - confidence
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(bin_of, gap, minlength=bins)).sum() / len(labels))


def score(
    probs: Probs,
    test: RunRecord,
    *,
    item: str,
    method: str,
    split: int,
    networks: int,
    seconds: float,
) -> Result:
    """Accuracy, likelihood and calibration of a method's predictions on a test half.

    Setting and seed come from the record's config. A prediction evaluates `networks` networks, and
    the method needs `seconds` of training in all.

    Raises:
        InputError: If the record has no config.

    >>> from fmnlib.config import RunConfig
    >>> probs = np.array([[0.75, 0.25]])
    >>> test = dataclasses.replace(RunRecord.from_arrays(probs[None], [1]), config=RunConfig())
    >>> result = score(probs, test, item="x", method="kf", split=0, networks=1, seconds=2.5)
    >>> result.setting, result.accuracy, result.ece, round(result.nll, 4)
    ('memorising_clean', 0.0, 0.75, 1.3863)
    """
    if test.config is None:
        raise InputError("this record has no config; give the record of a trained run")
    return Result(
        item=item,
        setting=test.config.condition,
        method=method,
        seed=test.config.seed,
        split_seed=split,
        accuracy=float((probs.argmax(axis=1) == test.labels).mean()),
        nll=nll(probs, test.labels),
        ece=calibration_error(probs, test.labels),
        networks=networks,
        train_seconds=round(seconds, 2),
    )


def summarize(results: Iterable[Result]) -> Summary:
    """Mean accuracy, standard error and number of seeds of each setting and method, in percent."""
    keys = ["setting", "method", "seed"]
    per_seed = _frame(results).groupby(keys, sort=False)["accuracy"].mean()
    summary: Summary = {}
    for key, values in per_seed.groupby(keys[:2], sort=False):
        setting, method = map(str, key)
        summary.setdefault(setting, {})[method] = percent(values.to_numpy())
    return summary


def percent(values: Values) -> Numbers:
    """The `Numbers` of shares, one for each seed, as the book's summary holds them.

    >>> percent([0.5, 0.7])
    {'mean': 60.0, 'sem': 10.0, 'n': 2, 'seeds': [50.0, 70.0]}
    """
    seeds = 100 * np.asarray(values)
    mean, sem = mean_sem(seeds)
    error = round(sem, 4) if len(seeds) > 1 else None  # JSON has no NaN
    rounded = seeds.round(4).tolist()
    return {"mean": round(mean, 4), "sem": error, "n": len(seeds), "seeds": rounded}


def with_error(numbers: Numbers) -> str:
    """Format a mean and its standard error; for a single seed, the mean only.

    >>> with_error(percent([0.5, 0.7])), with_error(percent([0.5]))
    ('60.0 ± 10.0', '50.0')
    """
    error = "" if numbers["sem"] is None else f" ± {numbers['sem']:.1f}"
    return f"{numbers['mean']:.1f}{error}"


def interval(values: Values) -> tuple[float, float, float]:
    """Mean of values, one for each seed, and the ends of its 95% interval by Student's t.

    >>> [round(end, 2) for end in interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    mean, sem = mean_sem(values)
    half = float(student_t.ppf(0.975, len(values) - 1)) * sem
    return mean, mean - half, mean + half


def paired_difference(
    results: Iterable[Result], setting: str, method: str, baseline: str
) -> tuple[float, float, float]:
    """How much more accurate a method is than a baseline on the same runs and splits, in points.

    The mean difference, and the ends of its 95% interval by Student's t over seeds.

    Raises:
        InputError: If a run or split has only one of the two.
    """
    frame = _frame(results)
    frame = frame[(frame["setting"] == setting) & frame["method"].isin([method, baseline])]
    pairs = frame.pivot_table(index=["seed", "split_seed"], columns="method", values="accuracy")
    if set(pairs.columns) != {method, baseline} or pairs.isna().any(axis=None):
        raise InputError(f"{method} and {baseline} are not paired in {setting}; score both on all")
    per_seed = 100 * (pairs[method] - pairs[baseline]).groupby("seed").mean()
    return interval(per_seed.to_numpy())


def differences(
    results: Iterable[Result], pairs: Iterable[tuple[str, str]], names: Mapping[str, str]
) -> pd.DataFrame:
    """A table for display: rows method − baseline, columns settings; points with 95% intervals.

    `names` has the displayed names of the methods.
    """
    results, rows = list(results), {}
    for pair in pairs:
        row = {
            readable(s): points(*paired_difference(results, s, *pair)) for s in _settings(results)
        }
        rows[" − ".join(names.get(method, method) for method in pair)] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def points(mean: float, low: float, high: float) -> str:
    """Format a difference and its interval; for a single seed, the difference only.

    An end that is rounded to zero keeps its sign, which decides whether zero lies inside.

    >>> points(1.25, -0.04, 2.5), points(1.25, float("nan"), float("nan"))
    ('+1.2 [−0.0, 2.5]', '+1.2')
    """
    middle = round(mean, 1) + 0.0  # -0.0 becomes 0.0
    text = f"{middle:+.1f}" if np.isnan(low) else f"{middle:+.1f} [{low:.1f}, {high:.1f}]"
    return text.replace("-", "−")


def outcome(low: float, high: float) -> str:
    """The outcome of the claim that a difference is above zero, by its 95% interval in points.

    `MARGIN` was fixed before the runs: smaller differences are of no interest.

    Returns:
        equal (the whole interval lies within the margin), found (above zero), opposite (below
        zero), or not clear; one seed where there is no interval.

    >>> [outcome(*ends) for ends in [(-0.2, 0.4), (0.3, 2.0), (-2.0, -0.3), (-2.0, 2.0)]]
    ['equal', 'found', 'opposite', 'not clear']
    """
    if np.isnan(low):
        return "one seed"
    if -MARGIN < low and high < MARGIN:
        return "equal"
    return "found" if low > 0 else "opposite" if high < 0 else "not clear"


def finding(differences: Values) -> str:
    """Differences in points, one for each seed, in words: mean, interval and `outcome`.

    >>> finding([1.0, 2.0, 3.0]), finding([1.0])
    ('+2.0 [−0.5, 4.5], not clear', '+1.0, one seed')
    """
    mean, low, high = interval(differences)
    return f"{points(mean, low, high)}, {OUTCOMES[outcome(low, high)]}"


def verdict(results: Iterable[Result], method: str, baseline: str) -> str:
    """The settings with each `outcome` of the claim that a method is better than a baseline."""
    results = list(results)
    settings: dict[str, list[str]] = {key: [] for key in OUTCOMES}
    for setting in _settings(results):
        _, low, high = paired_difference(results, setting, method, baseline)
        settings[outcome(low, high)].append(readable(setting))
    lines = [f"{OUTCOMES[key]}: {', '.join(names)}" for key, names in settings.items() if names]
    return "; ".join(lines)


def readable(setting: str) -> str:
    """Format a setting: its noise, and its other properties in brackets.

    >>> readable("augmented_sym40"), readable("clean"), readable("augmented_clean100")
    ('40% symmetric (augmented)', 'clean', 'clean, 100 images (augmented)')
    >>> readable("memorising_sym12.5"), readable("augmented_sym40_constant_rate")
    ('12.5% symmetric (memorising)', '40% symmetric (augmented, constant rate)')
    """
    first, *rest = setting.split("_")
    regime = {"augmented": "augmented", "memorising": "memorising"}
    regime |= {"resnet8": "ResNet-8", "elr": "run of ELR"}
    about = [regime[first]] if first in regime else []
    noise, *extra = rest if about else [first, *rest]
    kind = noise.rstrip("0123456789.")
    words = {"sym": "symmetric", "asym": "asymmetric"}.get(kind)
    if amount := noise.removeprefix(kind):
        noise = f"{amount}% {words}" if words else f"{kind}, {amount} images"
    about += [" ".join(extra)] if extra else []
    return f"{noise} ({', '.join(about)})" if about else noise


def table(summary: Summary) -> pd.DataFrame:
    """A table for display: rows methods, columns settings; mean ± standard error in percent."""
    return pd.DataFrame(
        {readable(s): {m: with_error(n) for m, n in ms.items()} for s, ms in summary.items()}
    )


def costs(results: Iterable[Result], setting: str) -> pd.DataFrame:
    """Mean costs of each method in a setting: networks per prediction, seconds of training."""
    frame = _frame(results)
    frame = frame[frame["setting"] == setting]
    means = frame.groupby("method", sort=False)[["networks", "train_seconds"]].mean()
    return means.round(1).rename_axis(None)


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


def proportion(mask: Mask, level: float = 0.95, groups: Groups = None) -> Interval:
    """The share of samples with some property, with Wilson's interval.

    `groups` are as in `paired_gain`.

    >>> print(proportion(np.zeros(100, bool)))
    0.0% (0.0 to 3.7)
    """
    share, (effect, z) = float(mask.mean()), _design_effect(mask * 1.0, groups, level)
    if math.isinf(z):
        return Interval(share, 0.0, 1.0)
    weight = z**2 * effect / len(mask)
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return Interval(share, max(middle - half, 0.0), min(middle + half, 1.0))


def paired_gain(right: Mask, baseline: Mask, level: float = 0.95, groups: Groups = None) -> Gain:
    """How much more accurate one predictor is than another on the same samples.

    Tango's (1998) score interval for a difference of paired proportions, from the masks of the
    samples that each gets right. It compares the two on the samples on which they differ, as
    McNemar's test does; if there are none, the interval still has a width.

    Samples of one group depend on each other (pixels of an image, visits of a patient). Then all
    counts are divided by the design effect, the variance between groups over that of independent
    samples (Rao and Scott, 1992), with a t quantile of one degree of freedom less than groups.

    >>> right, baseline = np.ones(100, bool), np.arange(100) >= 10
    >>> print(paired_gain(right, baseline))
    +10.0 points (+5.5 to +17.4)
    >>> print(paired_gain(right, baseline, groups=np.arange(100) // 2))
    +10.0 points (+1.6 to +21.9)
    """
    differences = right * 1.0 - baseline
    value, (effect, z) = float(differences.mean()), _design_effect(differences, groups, level)
    won, lost = (differences > 0).sum() / effect, (differences < 0).sum() / effect
    samples = len(right) / effect

    def beyond(delta: float, sign: int) -> float:
        return sign * _score(delta, won, lost, samples) + z

    def end(sign: int) -> float:
        if beyond(sign * (1 - _EDGE), sign) >= 0:  # very few samples or groups, or all agree
            return float(sign)
        return float(brentq(beyond, value, sign * (1 - _EDGE), args=(sign,)))

    return Gain(value, end(-1), end(1))


def mean_gain(
    differences: Float[np.ndarray, " samples"], level: float = 0.95, groups: Groups = None
) -> Gain:
    """A mean over samples and its interval, by the central limit theorem.

    `groups` are as in `paired_gain`.

    >>> print(mean_gain(np.array([0.0, 0.1, 0.2])))
    +10.0 points (-1.3 to +21.3)
    """
    effect, z = _design_effect(differences, groups, level)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) * math.sqrt(effect / len(differences))
    half = z * error if error or math.isfinite(z) else z
    return Gain(mean, mean - half, mean + half)


def gains(
    val: RunRecord, test: RunRecord, fusion: Fusion, others: Mapping[str, Mask] | None = None
) -> pd.DataFrame:
    """Test accuracies, and how much each is above the final network's, with an interval.

    One row per predictor: single, early_stopping, window and best (mixtures that need no search),
    fused, and `others`, given as masks of the test samples that they get right. All choices are
    made on `val`. Columns are accuracy, gain over the final network and the ends of its interval
    (`paired_gain`), as shares of 1; `ahead`, `ahead_low` and `ahead_high` are the gain of the
    fusion over the predictor.
    """
    chosen = {
        "single": single(val),
        "early_stopping": early_stopping(val),
        "window": early_stopping_window(val, fusion.networks),
        "best": best_epochs(val),
        "fused": fusion,
    }
    right = {name: right_samples(fuse(test, f), test.labels) for name, f in chosen.items()}
    right |= others or {}
    rows = {}
    for name, mask in right.items():
        gain = paired_gain(mask, right["single"], groups=test.groups)
        ahead = paired_gain(right["fused"], mask, groups=test.groups)
        rows[name] = [mask.mean(), *dataclasses.astuple(gain), *dataclasses.astuple(ahead)]
    columns = ["accuracy", "gain", "low", "high", "ahead", "ahead_low", "ahead_high"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    table.loc["single", ["gain", "low", "high"]] = 0.0
    return table


def gain_rows(table: pd.DataFrame) -> dict[str, float | Gain]:
    """The table of `gains` as named numbers, one per line when they are displayed."""
    rows: dict[str, float | Gain] = {
        f"test accuracy, {name}": float(value) for name, value in table["accuracy"].items()
    }
    for name, row in table.drop(index="single").iterrows():
        rows[f"gain, {name}"] = Gain(*map(float, row[["gain", "low", "high"]]))
    for name, row in table.drop(index=["single", "fused"]).iterrows():
        ends = ["ahead", "ahead_low", "ahead_high"]
        rows[f"fused minus {name}"] = Gain(*map(float, row[ends]))
    return rows


def picks(fusion: Fusion, names: Sequence[str]) -> dict[str, str]:
    """The picks of a fusion in order, each with its share.

    >>> picks(Fusion(np.array([0.25, 0.75]), ((0, 0.25),)), ["first", "last"])
    {'pick 1': 'first, share 0.250'}
    """
    return {
        f"pick {i + 1}": f"{names[epoch]}, share {share:.3f}"
        for i, (epoch, share) in enumerate(fusion.picks)
    }


def _design_effect(
    values: Float[np.ndarray, " samples"], groups: Groups, level: float
) -> tuple[float, float]:
    """The design effect of a mean, at least 1, and the quantile of an interval of this level.

    If values other than the median occur in fewer than `_MIN_GROUPS` groups, the correlation
    within groups cannot be estimated, and the samples of a group count as one.
    """
    if groups is None:
        return 1.0, float(norm.ppf((1 + level) / 2))
    group_of = np.unique(groups, return_inverse=True)[1]
    sizes, deviations = np.bincount(group_of), values - values.mean()
    number = len(sizes)
    if number < 2:
        return 1.0, math.inf
    spread = float((deviations**2).sum())
    between = float((np.bincount(group_of, deviations) ** 2).sum()) * number / (number - 1)
    effect = between / spread if spread else 1.0
    if len(np.unique(group_of[values != np.median(values)])) < _MIN_GROUPS:
        effect = max(effect, float((sizes**2).sum() / len(values)))
    return max(1.0, effect), float(student_t.ppf((1 + level) / 2, number - 1))


def _score(delta: float, won: float, lost: float, samples: float) -> float:
    """Tango's score statistic: the excess of wins over a gain of delta, in standard deviations."""
    b = (2 * samples - won + lost) * delta - won - lost
    c = -lost * delta * (1 - delta)
    lost_share = (math.sqrt(max(b * b - 8 * samples * c, 0)) - b) / (4 * samples)
    variance = samples * (2 * lost_share + delta * (1 - delta))
    excess = won - lost - samples * delta
    return excess / math.sqrt(max(variance, math.ulp(0.0))) if excess else 0.0


def _settings(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(result.setting for result in results))


def _frame(results: Iterable[Result]) -> pd.DataFrame:
    return pd.DataFrame([vars(result) for result in results])
