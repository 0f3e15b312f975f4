"""What a run forgot, and what to do about it, from the validation half alone.

Whatever is chosen (the epoch that knew most, the checkpoint to stop at, the fusion) is chosen on
four fifths of the half and scored on the rest, in turn: cross-fitting. What the folds choose
varies with the samples too, which about doubles the variance of a count; intervals are wider by
the square root of 2 for that. The test half is left for the report on what is then done.
"""

import dataclasses
import textwrap
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from scipy.stats import binomtest, norm

from fmnlib import scores
from fmnlib.fusion import early_stopping, fuse, knowledge_fusion, refuse_test, right_samples
from fmnlib.record import RunRecord
from fmnlib.stats import Gain, Interval, Mask, paired_gain, proportion

FOLDS = 5
LEVEL = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The result of `diagnose`.

    Attributes:
        samples: Validation samples it rests on.
        epochs: Epochs of the run.
        epoch: The epoch of the largest forget fraction.
        forget: The largest forget fraction, cross-fitted.
        chance: The forget fraction of guessing, which gets 1 / classes of the final errors right.
        p_value: How likely guessing would get as many of them right: an epoch is chosen on one
            half of the samples, the binomial test is of the other, both ways; twice the smaller.
        lost_by: The epoch by which half of what `epoch` knew and the end does not was lost.
        classes: A row a class, by name where the record knows names: samples, forget fraction
            with the ends of its interval, p-value; intervals and p-values hold for all classes
            together (Bonferroni).
        early_epoch: Where early stopping stops.
        networks: Networks that one prediction of the fusion takes.
        fused: Gain of Knowledge Fusion over the final network; None without probabilities.
        stopped: Gain of early stopping over the final network.
        over_stopped: Gain of Knowledge Fusion over early stopping.
    """

    samples: int
    epochs: int
    epoch: int
    forget: Interval
    chance: float
    p_value: float
    lost_by: int | None
    classes: pd.DataFrame
    early_epoch: int
    networks: int | None
    fused: Gain | None
    stopped: Gain
    over_stopped: Gain | None

    @property
    def overfits(self) -> bool:
        """Whether more is forgotten than guessing explains, at the level of 0.05."""
        return self.p_value < LEVEL

    @property
    def worst_classes(self) -> list[int | str]:
        """The classes that overfit by the same test, the most forgotten one first."""
        beyond = self.classes[self.classes["p_value"] < LEVEL]
        return beyond.sort_values("forgotten", ascending=False, kind="stable").index.tolist()

    @property
    def advice(self) -> str:
        """leave, stop early, or distil.

        stop early: its gain over the final network is certain (its interval lies above 0), and
        that the fusion is better still is not. distil: the fusion's gain is certain, over early
        stopping too where that has one. leave: neither gain is certain.
        """
        fused, over = self.fused, self.over_stopped
        fusion_gains = fused is not None and fused.low > 0 and (self.networks or 0) > 1
        if self.stopped.low > 0 and not (fusion_gains and over is not None and over.low > 0):
            return "stop early"
        return "distil" if fusion_gains else "leave"

    @property
    def sentences(self) -> list[str]:
        """The diagnosis in plain words, the advice last."""
        return [self._forgetting(), *self._since(), *self._recovery(), self._advice()]

    def __str__(self) -> str:
        """The sentences, in lines of at most 76 characters."""
        return "\n".join(
            textwrap.fill(sentence, 76, break_on_hyphens=False) for sentence in self.sentences
        )

    def summary(self) -> dict[str, Any]:
        """The diagnosis as plain numbers and texts, for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: vars(v) if isinstance(v, Interval) else v for k, v in fields.items()}
        derived = {"overfits": self.overfits, "worst_classes": self.worst_classes}
        derived |= {"advice": self.advice, "sentences": self.sentences}
        return plain | derived | {"classes": self.classes.reset_index().to_dict("records")}

    def _forgetting(self) -> str:
        answer = "yes" if self.overfits else "none beyond what guessing explains"
        forgotten = f"right after an earlier epoch (about {self.epoch}) and wrong at the end"
        share = f"{self.forget} of the samples are {forgotten} (guessing: {self.chance:.1%})"
        return f"Local overfitting: {answer}; {share}, judged by {self.samples} of them."

    def _since(self) -> list[str]:
        if not self.overfits:
            return []
        worst = [f"{c} ({self.classes['forgotten'][c]:.0%})" for c in self.worst_classes]
        listed = ", ".join(worst[:5]) + (f" and {len(worst) - 5} more" if worst[5:] else "")
        lost = f"Half of what epoch {self.epoch} knew and the end does not was lost for good"
        return [f"{lost} by epoch {self.lost_by}.", f"Classes that overfit: {listed or 'none'}."]

    def _recovery(self) -> list[str]:
        stopped = f"early stopping at epoch {self.early_epoch}: {self.stopped}, one network"
        if self.fused is None:
            return [f"Expected over the final network, {stopped}; fusion needs probabilities."]
        networks = "one network" if self.networks == 1 else f"{self.networks} networks"
        fused = f"Knowledge Fusion: {self.fused}, {networks} a prediction"
        return [f"Expected over the final network, {fused}; {stopped}."]

    def _advice(self) -> str:
        if self.advice == "leave":
            return "Leave the final network as it is: no gain is certain on these samples."
        if self.advice == "stop early":
            action = f"Take the checkpoint of epoch {self.early_epoch}"
            return f"{action}: that fusing and distilling beat it is not certain on these samples."
        reason = f"it beats early stopping by {self.over_stopped}"
        if self.stopped.low <= 0:
            reason = "its gain is certain on these samples, that of early stopping is not"
        return f"Fuse, and distil the fusion: {reason}; a student costs one network a prediction."


def diagnose(record: RunRecord, *, split: int = 0) -> Diagnosis:
    """Measure whether a run overfits locally, where, and the gains of early stopping and fusion.

    Args:
        record: A run, or its validation half.
        split: Seed that draws the halves of a whole run; the test half is not used.

    Raises:
        InputError: If the record is a test half, or its validation half misses a class.

    >>> probs = np.tile([[[0.9, 0.1]], [[0.2, 0.8]]], (1, 200, 1))  # all right, then all wrong
    >>> diagnosis = diagnose(RunRecord.from_arrays(probs, np.zeros(200, int)))
    >>> diagnosis.overfits, diagnosis.epoch, diagnosis.advice
    (True, 0, 'stop early')
    """
    refuse_test(record)
    val = record.split(split)[0] if record.half == "all" else record
    correct, wrong = val.correct, ~val.correct[-1]
    lost, stopped, fused = _cross_fit(val, split)
    errors = _final_errors(val, split)
    epoch = int(scores.forget_fraction(correct).argmax())
    last_right = scores.last_correct_epoch(correct)[correct[epoch] & wrong]
    return Diagnosis(
        samples=len(val.labels),
        epochs=val.epochs,
        epoch=epoch,
        forget=proportion(int(lost.sum()), len(lost), _wide(LEVEL)),
        chance=float(wrong.mean()) / val.classes,
        p_value=_p_value(errors, val.classes),
        lost_by=int(np.median(last_right)) + 1 if last_right.size else None,
        classes=_by_class(val, lost, errors),
        early_epoch=int(early_stopping(val).weights.argmax()),
        networks=None if fused is None else knowledge_fusion(val).networks,
        fused=None if fused is None else paired_gain(fused, ~wrong, _wide(LEVEL)),
        stopped=paired_gain(stopped, ~wrong, _wide(LEVEL)),
        over_stopped=None if fused is None else paired_gain(fused, stopped, _wide(LEVEL)),
    )


Errors = tuple[Int[np.ndarray, " _"], Bool[np.ndarray, " _"]]
"""Of one half: labels of the final errors, and which of them the other half's epoch knew."""


def _wide(error: float) -> float:
    """The level at which an interval for counts covers 1 - error at twice their variance."""
    return float(1 - 2 * norm.sf(norm.isf(error / 2) * 2**0.5))


def _cross_fit(val: RunRecord, seed: int) -> tuple[Mask, Mask, Mask | None]:
    """Which samples are forgotten, and right by early stopping and by fusion, cross-fitted."""
    samples = len(val.labels)
    lost, stopped, fused = np.zeros((3, samples), bool)
    fold_of = np.random.default_rng(seed).permutation(samples) % FOLDS
    for fold in range(FOLDS):
        here = np.flatnonzero(fold_of == fold)
        chosen, rest = val.take(np.flatnonzero(fold_of != fold), "val"), val.take(here, "val")
        epoch = int(scores.forget_fraction(chosen.correct).argmax())
        lost[here] = rest.correct[epoch] & ~rest.correct[-1]
        stopped[here] = rest.correct[int(early_stopping(chosen).weights.argmax())]
        if val.probs is not None:
            fused[here] = right_samples(fuse(rest, knowledge_fusion(chosen)), rest.labels)
    return lost, stopped, None if val.probs is None else fused


def _final_errors(val: RunRecord, seed: int) -> list[Errors]:
    halves = np.array_split(np.random.default_rng(seed).permutation(len(val.labels)), 2)
    errors = []
    for chosen, rest in (halves, halves[::-1]):
        epoch = int(scores.forget_fraction(val.correct[:, chosen]).argmax())
        wrong = rest[~val.correct[-1, rest]]
        errors.append((val.labels[wrong], val.correct[epoch, wrong]))
    return errors


def _by_class(val: RunRecord, lost: Mask, halves: list[Errors]) -> pd.DataFrame:
    rows = []
    for label in range(val.classes):
        inside = val.labels == label
        count, level = int(inside.sum()), _wide(LEVEL / val.classes)
        share = proportion(int(lost[inside].sum()), max(1, count), level)
        p_value = min(1.0, val.classes * _p_value(halves, val.classes, label))
        row = {"samples": count, "forgotten": share.value, "low": share.low, "high": share.high}
        rows.append(row | {"p_value": p_value})
    names = val.provenance.get("classes") or range(val.classes)
    return pd.DataFrame(rows, index=list(names)).rename_axis("class")


def _p_value(halves: list[Errors], classes: int, label: int | None = None) -> float:
    """P-value that guessing gets as many of the final errors right, of one class or of all."""
    p_values = [1.0]
    for labels, known in halves:
        right = known if label is None else known[labels == label]
        if len(right):
            test = binomtest(int(right.sum()), len(right), 1 / classes, alternative="greater")
            p_values.append(float(test.pvalue))
    return min(1.0, 2 * min(p_values))
