"""Diagnose a run from its validation half: what it forgot, whether it overfits, what to do.

Predictions churn: any two epochs are right about different samples, even if nothing is lost. The
verdict therefore compares mixtures of equally many networks: late ones, ones around an earlier
epoch, and half of each. It measures what the earlier networks know that the late ones *together*
do not, and how much of that their accuracies show. If all epochs are equally good, and what one
gets wrong is not what epochs around it get wrong, both differences are zero on average; errors
that last for many epochs look like lost knowledge.

All choices (that epoch, the checkpoint to stop at, the fusion) are cross-fitted: made on four
fifths of the half and scored on the other fifth, in turn. The choices vary with the samples too,
which about doubles the variance of a count; intervals are wider by the square root of 2 for that,
by more with few groups. If the record has groups of dependent samples, folds and intervals are
formed over groups. The test half is not used: it is for the final report.
"""

import dataclasses
import textwrap
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool
from numpy.lib.stride_tricks import sliding_window_view
from scipy.stats import norm

from fmnlib import fusion, scores
from fmnlib.config import InputError
from fmnlib.fusion import Fusion, fuse, right_samples
from fmnlib.record import Columns, RunRecord, folds, refuse_test
from fmnlib.stats import MARGIN, Gain, Interval, Mask, mean_gain, paired_gain, proportion

FOLDS = 5
ALPHA = 0.05  # error probability of an interval
_KF = "Knowledge Fusion"
_LATE = 4  # most networks in one half of a mixture
_BLOCK = 2**22  # probabilities that are held in memory at a time

Verdict = Literal["none", "local", "classic"]
Masks = Bool[np.ndarray, "candidates samples"]
Spans = tuple[tuple[int, int], ...]  # half-open ranges of rows, whose networks are mixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """Something to do in place of the final network."""

    name: str  #: Short description, such as early stopping
    networks: int  #: Networks evaluated for one prediction
    gain: Gain  #: Gain over the final network
    behind: Gain  #: Gain of the best option over this one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The result of `diagnose`."""

    samples: int  #: Validation samples it rests on
    epochs: int  #: Epochs of the run
    epoch: int  #: The epoch of the largest forget fraction
    forget: Interval  #: The largest forget fraction, cross-fitted
    #: The epoch by which half of the samples right after `epoch` and wrong at the end were lost
    lost_by: int | None
    networks: int  #: Number of networks in each mixture that the verdict compares
    around: int  #: Epoch in the middle of the best mixture of earlier networks
    #: Fall in the mean accuracy of single networks, from those around an earlier epoch to the last
    accuracy_drop: Gain
    #: Knowledge that the late networks together lack: the gain, over a mixture of late networks,
    #: of a mixture of networks around an earlier epoch, or of half of these and half of the last
    lost: Gain
    #: `lost` minus `accuracy_drop`: the lost knowledge that accuracy does not show
    hidden_loss: Gain
    #: One row per class, by name if the record has names: samples, the share forgotten, and `lost`
    #: within the class with the ends of its interval; the intervals hold for all classes together
    #: (Bonferroni)
    classes: pd.DataFrame
    early_epoch: int  #: The epoch that early stopping chooses
    options: tuple[Option, ...]  #: What can be done: early stopping first, Knowledge Fusion last
    #: Gain of Knowledge Fusion over the best option that needs no search; None without
    #: probabilities
    over_simple: Gain | None

    @property
    def verdict(self) -> Verdict:
        """Nothing beyond churn ("none"), local or classic overfitting.

        classic: accuracy fell. local: accuracy held, but knowledge was lost. The fall or the loss
        must be certain (its interval lies above 0) and at least `fmnlib.stats.MARGIN` points.
        """
        if _certain(self.accuracy_drop):
            return "classic"
        return "local" if _certain(self.lost) else "none"

    @property
    def overfits(self) -> bool:
        """Whether the run overfits, locally or classically."""
        return self.verdict != "none"

    @property
    def worst_classes(self) -> list[int | str]:
        """The classes whose loss is certain, the largest loss first."""
        lost = self.classes[self.classes["low"] > 0]
        return lost.sort_values("lost", ascending=False, kind="stable").index.tolist()

    @property
    def best(self) -> Option | None:
        """The cheapest option that is not certainly worse than the best; None if none gains.

        An option counts where its gain over the final network is certain, its interval above 0.
        """
        gaining = [option for option in self.options if option.gain.low > 0]
        enough = [option for option in gaining if option.behind.low <= 0]
        return min(enough, key=lambda option: option.networks, default=None)

    @property
    def advice(self) -> str:
        """leave, stop early (one checkpoint), or distil (a mixture)."""
        if self.best is None:
            return "leave"
        return "stop early" if self.best.networks == 1 else "distil"

    @property
    def sentences(self) -> list[str]:
        """The diagnosis in plain words: what to do, and why."""
        return [self._advice(), self._over_simple(), self._why(), *self._forgotten()]

    def __str__(self) -> str:
        """The first sentence, what each option gains, and why; lines of at most 76 characters."""
        first, *others = (textwrap.fill(s, 76, break_on_hyphens=False) for s in self.sentences)
        table = self.table().to_string(header=False, index_names=False)
        return "\n".join([first, table, *others])

    def table(self) -> pd.DataFrame:
        """What each option gains over the final network, and the networks it takes, as texts."""
        rows = {
            o.name: {"gain": str(o.gain), "networks": _networks(o.networks)} for o in self.options
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("option")

    def summary(self) -> dict[str, Any]:
        """The diagnosis as plain numbers and texts, for JSON."""
        plain = dataclasses.asdict(self) | {
            "classes": self.classes.reset_index().to_dict("records")
        }
        derived = ("verdict", "overfits", "worst_classes", "advice", "sentences")
        return plain | {name: getattr(self, name) for name in derived}

    def _advice(self) -> str:
        best = self.best
        if best is None:
            return "Leave the final network as it is: no gain over it is certain on these samples."
        action, how = f"Mix {best.name}", f", {best.networks} networks a prediction, or distil it"
        if best.networks == 1:
            action, how = f"Take the checkpoint of epoch {self.early_epoch} ({best.name})", ""
        others = "no option that costs more is certainly better on these samples"
        return f"{action}: {best.gain} over the final network{how}; {others}."

    def _over_simple(self) -> str:
        if self.over_simple is None:
            return "Mixtures are not scored: the record holds no probabilities."
        return f"Knowledge Fusion minus the best of those that need no search: {self.over_simple}."

    def _why(self) -> str:
        late = f"{self.networks} late ones together" if self.networks > 1 else "the last one"
        lost = f"with networks around epoch {self.around}, {late} would gain {self.lost}"
        drop, moved = self.accuracy_drop, "fell"
        if drop.value < 0:
            drop, moved = Gain(-drop.value, -drop.high, -drop.low), "rose"
        fell = f"the accuracy of a network {moved} by {100 * drop.value:.1f} points"
        fell += f" ({100 * drop.low:.1f} to {100 * drop.high:.1f})"
        if self.verdict == "classic":
            more = "more was lost than that shows: " if self.hidden_loss.low > 0 else ""
            return f"Classic overfitting: {fell}; {more}{lost}."
        if self.verdict == "local":
            return f"Local overfitting: accuracy held, but knowledge was lost; {lost}; {fell}."
        limit = "" if self.epochs > 3 else "; fewer than four epochs do not show more"
        return f"Nothing beyond churn is certain: {fell}; {lost}{limit}."

    def _forgotten(self) -> list[str]:
        share = f"{self.forget} of {self.samples} samples are right after an earlier epoch"
        first = f"Forget fraction: {share} and wrong at the end; most after epoch {self.epoch}."
        if not self.overfits:
            return [first]
        half = f"Half of these are lost for good by epoch {self.lost_by}."
        worst = [f"{c} ({self.classes['lost'][c]:.0%})" for c in self.worst_classes]
        listed = f", most of all {', '.join(worst[:5])}" if worst else ""
        classes = f"Of {len(self.classes)} classes, {len(worst)} lost for certain{listed}."
        return [first, classes] if self.lost_by is None else [first, half, classes]


def _networks(number: int) -> str:
    return "one network" if number == 1 else f"{number} networks"


def _certain(gain: Gain) -> bool:
    return gain.low > 0 and 100 * gain.value >= MARGIN


def diagnose(record: RunRecord, *, split: int = 0) -> Diagnosis:
    """Diagnose whether a run overfits, locally or classically, in which classes, and what to do.

    Args:
        record: A run, or its validation half.
        split: Seed that draws the halves of a whole run; the test half is not used.

    Raises:
        InputError: If the record is a test half, has one epoch, or is never better than chance.

    >>> probs = np.tile([[[0.9, 0.1]], [[0.2, 0.8]]], (1, 200, 1))  # all right, then all wrong
    >>> labels = np.zeros(200, int)
    >>> labels[::4], probs[:, ::4] = 1, probs[:, ::4, ::-1]
    >>> diagnosis = diagnose(RunRecord.from_arrays(probs, labels))
    >>> diagnosis.verdict, diagnosis.epoch, diagnosis.advice
    ('classic', 0, 'stop early')
    """
    refuse_test(record)
    val = record.split(split)[0] if record.half == "all" else record
    if val.epochs < 2:
        raise InputError("the record has one epoch; record two or more to see what is forgotten")
    if scores.at_chance(val.predicted, val.labels):
        problem = f"no epoch is better than chance: {val.accuracy.max():.1%} are right at most"
        raise InputError(f"{problem}; are the labels in the order of the predictions?")
    fold_of = folds(val, FOLDS, split)
    mixed_epochs = _epochs_of(val)
    before, after = _mixtures(len(mixed_epochs))
    right = _right_mixtures(val, before + after)
    past, late = right[: len(before)], _cross_fit(right[len(before) :], fold_of)
    around = int(np.mean(before[int(past.sum(axis=1).argmax())][0]))
    known = _cross_fit(past, fold_of)
    networks = sum(stop - start for start, stop in before[0])
    counts = sliding_window_view(val.correct[mixed_epochs], networks, axis=0).sum(axis=2)
    windows = [spans[0][0] for spans in before if len(spans) == 1]
    fewer = _cross_fit(counts[windows], fold_of) - counts[-1]  # integers: choices are exact
    fell = fewer / networks
    forgotten = _cross_fit(val.correct & ~val.correct[-1], fold_of)
    epoch = int(scores.forget_fraction(val.correct).argmax())
    last_right = scores.last_correct_epoch(val.correct)[val.correct[epoch] & ~val.correct[-1]]
    options, over_simple = _options(val, fold_of)
    level, groups = _widened_level(ALPHA), val.groups
    return Diagnosis(
        samples=len(val.labels),
        epochs=val.epochs,
        epoch=epoch,
        forget=proportion(forgotten, level, groups),
        lost_by=int(np.median(last_right)) + 1 if last_right.size else None,
        networks=networks,
        around=int(mixed_epochs[around]),
        accuracy_drop=mean_gain(fell, level, groups),
        lost=paired_gain(known, late, level, groups),
        hidden_loss=mean_gain(known * 1.0 - late - fell, level, groups),
        classes=_by_class(val, forgotten, known, late),
        early_epoch=int(fusion.early_stopping(val).weights.argmax()),
        options=options,
        over_simple=over_simple,
    )


def _epochs_of(val: RunRecord) -> np.ndarray:
    """The epochs to mix: those with probabilities; all if these are few or lack the last one."""
    enough = val.probs is not None and len(val.kept) >= min(4, val.epochs)
    return val.kept if enough and val.kept[-1] == val.epochs - 1 else np.arange(val.epochs)


def _mixtures(rows: int) -> tuple[list[Spans], list[Spans]]:
    """Candidate mixtures of equally many networks: with earlier networks, and of late ones alone.

    Both kinds have several candidates, some of two separate parts of the run: if the noise of
    neighbouring epochs is correlated, mixing separate parts gains from that alone.

    >>> _mixtures(9)[1]
    [((6, 7), (8, 9)), ((7, 8), (8, 9))]
    """
    if rows < 4:
        return [((row, row + 1),) for row in range(rows - 1)], [((rows - 1, rows),)]
    half = max(1, min(_LATE, rows // 10))
    late = rows - max(2 * half, rows // 3)
    last = (rows - half, rows)
    before: list[Spans] = []
    for start in range(0, late - 2 * half + 1, half):
        middle = start + half - half // 2
        before += [((start, start + 2 * half),), ((middle, middle + half), last)]
    return before, [((start, start + half), last) for start in range(late, last[0], half)]


def _right_mixtures(val: RunRecord, mixtures: list[Spans]) -> Masks:
    """Which samples each mixture classifies correctly.

    Probabilities are summed, or votes if there are none (later epochs decide ties). The sums are
    exact, so that their order does not matter: float16 numbers are multiples of 2^-24.
    """
    epochs = _epochs_of(val)
    rows, right = len(epochs), np.zeros((len(mixtures), len(val.labels)), bool)
    step = max(1, _BLOCK // (rows * val.classes))
    for block in np.split(np.arange(len(val.labels)), range(step, len(val.labels), step)):
        total = np.zeros((rows + 1, len(block), val.classes))
        if val.probs is not None and epochs is val.kept:
            total[1:] = np.asarray(val.probs[:, block], np.float16)
        else:
            later = 1 + np.arange(rows)[:, None, None] * 2.0**-20
            np.put_along_axis(total[1:], val.predicted[:, block, None], later, axis=2)
        np.cumsum(total, axis=0, out=total)
        for row, spans in enumerate(mixtures):
            summed = sum(total[stop] - total[start] for start, stop in spans)
            right[row, block] = right_samples(np.asarray(summed), val.labels[block])
    return right


def _cross_fit(candidates: np.ndarray, fold_of: np.ndarray) -> np.ndarray:
    """For the samples of each fold, the values of the candidate that is best on other folds."""
    values = np.zeros_like(candidates[0])
    for fold in range(FOLDS):
        inside = fold_of == fold
        values[inside] = candidates[candidates[:, ~inside].sum(axis=1).argmax(), inside]
    return values


def _options(val: RunRecord, fold_of: np.ndarray) -> tuple[tuple[Option, ...], Gain | None]:
    """The options, and the gain of Knowledge Fusion over the best of the others."""
    if val.probs is not None:  # of each fold few epochs are read, which is faster than a copy
        probs = val.probs
        if not isinstance(probs, Columns):
            probs = Columns(probs, np.arange(len(val.labels)))
        val = dataclasses.replace(val, probs=probs)
    chosen = _choose(val)
    right = {name: np.zeros(len(val.labels), bool) for name in chosen}
    for fold in range(FOLDS):
        inside = np.flatnonzero(fold_of == fold)
        held_out = val.take(inside, "val")
        for name, mixture in _choose(val.take(np.flatnonzero(fold_of != fold), "val")).items():
            right[name][inside] = _right(held_out, mixture)
    for name, mixture in chosen.items():
        if mixture.networks == 1:  # the checkpoint of early stopping, whatever finds it
            right[name] = right["early stopping"]
    final, level = val.correct[-1], _widened_level(ALPHA)
    best = max(right.values(), key=np.sum)
    options = tuple(
        Option(
            name=name,
            networks=mixture.networks,
            gain=paired_gain(right[name], final, level, val.groups),
            behind=paired_gain(best, right[name], level, val.groups),
        )
        for name, mixture in chosen.items()
    )
    fused = right.pop(_KF, None)
    if fused is None:
        return options, None
    return options, paired_gain(fused, max(right.values(), key=np.sum), level, val.groups)


def _choose(val: RunRecord) -> dict[str, Fusion]:
    """The fusion of each option, by name; for a light record early stopping alone."""
    stopped = {"early stopping": fusion.early_stopping(val)}
    if val.probs is None:
        return stopped
    count, fused = min(fusion.BEST, len(val.kept)), fusion.knowledge_fusion(val, start="best")
    recorded = "kept epochs" if val.kept[-count] < val.epochs - count else "epochs"
    return stopped | {
        f"the last {count} {recorded}": fusion.horizontal(val, count),
        f"the {count} best epochs": fusion.best_epochs(val, count),
        "the window of early stopping": fusion.early_stopping_window(val, fused.networks),
        _KF: fused,
    }


def _right(record: RunRecord, mixture: Fusion) -> Mask:
    if mixture.networks == 1:  # as it predicted, before float16 makes ties
        return record.correct[mixture.weights.argmax()]
    return right_samples(fuse(record, mixture), record.labels)


def _by_class(val: RunRecord, forgotten: Mask, known: Mask, late: Mask) -> pd.DataFrame:
    rows, present = {}, np.unique(val.labels).tolist()
    names = val.provenance.get("classes") or range(val.classes)
    for label in present:
        inside = val.labels == label
        groups = None if val.groups is None else val.groups[inside]
        lost = paired_gain(
            known[inside], late[inside], _widened_level(ALPHA / len(present)), groups
        )
        row = {"samples": int(inside.sum()), "forgotten": float(forgotten[inside].mean())}
        rows[names[label]] = row | {"lost": lost.value, "low": lost.low, "high": lost.high}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def _widened_level(error: float) -> float:
    """Confidence level whose interval for counts covers 1 - error if their variance is doubled."""
    return float(1 - 2 * norm.sf(norm.isf(error / 2) * 2**0.5))
