"""Draw what the notebooks on forgetting, ablations and other selections show, on a given Axes."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes

from fmnlib.stats import Numbers
from fmnlib.study.plots import (
    BLACK,
    BLUE,
    GREY,
    LINES,
    METHODS,
    PERCENT,
    RED,
    LineStyle,
    forget_curve,
)

__all__ = [
    "against",
    "by_class",
    "forget_curves",
    "logarithmic",
    "lost_by",
    "plateau",
    "reliability",
]

MARKERS = "oD^sv"


def against(
    ax: Axes,
    values: Sequence[float],
    numbers: Sequence[Numbers],
    label: str,
    color: str,
    style: LineStyle,
    marker: str | None = None,
) -> Axes:
    """A curve of means with their standard errors against the values of one setting.

    Args:
        ax: Where to draw.
        values: Such as windows; the horizontal axis.
        numbers: For each value, "mean" and "sem" in percent.
        label: Of the curve.
        color: Of the curve.
        style: Of the line.
        marker: Of the means; by the number of curves already there where not given.
    """
    marker = marker or MARKERS[len(ax.containers) % len(MARKERS)]
    mean, sem = (np.array([n[key] for n in numbers], float) for key in ("mean", "sem"))
    ax.errorbar(
        values, mean, yerr=sem, label=label, color=color, ls=style, marker=marker, capsize=2
    )
    ax.set_ylabel("test accuracy (%)")
    return ax


def logarithmic(ax: Axes, values: Sequence[float], label: str) -> Axes:
    """A logarithmic horizontal axis with a tick at each value, and a legend."""
    ax.set_xscale("log")
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()
    ax.set_xlabel(f"{label}, logarithmic")
    ax.legend()
    return ax


def forget_curves(
    ax: Axes, curves: Mapping[str, Float[np.ndarray, "runs epochs"]], title: str
) -> Axes:
    """Forget fraction by epoch of some variants: mean over runs, bands from least to most."""
    for (label, forget), (color, style) in zip(curves.items(), LINES, strict=False):
        forget_curve(ax, forget, label, color, style)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set_title(title)
    return ax


def lost_by(
    ax: Axes,
    last_correct: Int[np.ndarray, " samples"],
    epochs: int,
    label: str,
    color: str,
    style: LineStyle,
) -> Axes:
    """The share of forgotten samples whose last correct epoch has come, by epoch (AAAI Fig. 3b).

    Args:
        ax: Where to draw.
        last_correct: The last correct epoch of each forgotten sample.
        epochs: Length of the run.
        label: Of the curve.
        color: Of the curve.
        style: Of the line.
    """
    share = np.bincount(last_correct, minlength=epochs).cumsum() / max(1, len(last_correct))
    ax.step(np.arange(epochs), share, where="post", label=label, color=color, ls=style)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set(xlabel="epoch", ylabel="forgotten samples lost for good", ylim=(0, 1.02))
    ax.legend()
    return ax


def plateau(
    ax: Axes,
    shares: Float[np.ndarray, " shares"],
    val: Float[np.ndarray, " shares"],
    test: Float[np.ndarray, " shares"],
    near: Float[np.ndarray, " near"],
) -> Axes:
    """Accuracy of both halves against the share mixed in, and the shares that are as good."""
    ax.plot(shares, val, color=BLUE, ls="-", label="validation half")
    ax.plot(shares, test, color=RED, ls="--", label="test half")
    low = min(val.min(), test.min())
    ax.plot(near, np.full(len(near), low), "|", color=BLACK, ms=7)
    ax.plot([], [], color=BLACK, lw=6, label="within one standard error")
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set(xlabel="share of the epochs mixed in", ylabel="accuracy")
    ax.legend()
    return ax


def reliability(
    ax: Axes,
    confidence: Float[np.ndarray, " bins"],
    accuracy: Float[np.ndarray, " bins"],
    method: str,
) -> Axes:
    """Accuracy against confidence; below the diagonal confidence is too high."""
    look = METHODS[method]
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    ax.plot(confidence, accuracy, color=look.color, marker=look.marker, label=look.name)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(loc="lower right")
    return ax


def by_class(
    ax: Axes, accuracy: Mapping[str, Float[np.ndarray, " classes"]], xlabel: str = "class"
) -> Axes:
    """Test accuracy of each class, one marker a method."""
    for number, (method, values) in enumerate(accuracy.items()):
        look = METHODS[method]
        beside = np.arange(len(values)) + 0.18 * (number - (len(accuracy) - 1) / 2)
        ax.plot(beside, 100 * values, look.marker, color=look.color, label=look.name, ms=8)
    ax.set_xticks(range(max(map(len, accuracy.values()))))
    ax.set(xlabel=xlabel, ylabel="test accuracy (%)")
    ax.grid(alpha=0.4)
    return ax
