"""Draw arrays on a given Axes and return it; nothing is computed here.

A method keeps its name and marker in the whole book; its colour shows its cost, and is never the
only cue.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from fmnlib.stats import Numbers

PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g}%")

LineStyle = str | tuple[int, tuple[int, ...]]
Curve = Float[np.ndarray, " points"]
Runs = Float[np.ndarray, "runs epochs"]


@dataclasses.dataclass(frozen=True)
class MethodStyle:
    """How a method looks wherever it is drawn."""

    name: str
    color: str
    marker: str


# Contrast of at least 3 on white, told apart under the three common colour blindnesses.
BLACK, GREY, BLUE, GREEN, PINK, RED = (
    "#000000", "#595959", "#1845fb", "#009e73", "#cc78bc", "#cc3311"
)  # fmt: skip

LINES: list[tuple[str, LineStyle]] = [
    (BLACK, "-"), (BLUE, "--"), (RED, "-."), (GREEN, ":"), (PINK, (0, (5, 1, 1, 1, 1, 1)))
]  # fmt: skip
"""Colours with line styles, for curves that are not of methods."""

# Colour by cost: black one network, blue several, red a second training, green more runs.
METHODS = {
    "single": MethodStyle("Final network", BLACK, "o"),
    "early_stopping": MethodStyle("Early stopping", BLACK, "s"),
    "window": MethodStyle("Early-stopping window", BLUE, "s"),
    "best_probs": MethodStyle("Mean of 5 best", BLUE, "^"),
    "averaged_best": MethodStyle("Mean weights of 5 best", BLACK, "v"),
    "ema_stopped": MethodStyle("EMA with early stopping", BLACK, "d"),
    "knn": MethodStyle("15 nearest neighbours", GREY, "o"),
    "clean_half": MethodStyle("Clean half alone", GREY, "s"),
    "clean_half_added": MethodStyle("Clean half added", GREY, "P"),
    "horizontal_one": MethodStyle("Horizontal (i)", BLUE, "p"),
    "fixed_jumps_one": MethodStyle("Fixed jumps (i)", BLUE, "h"),
    "horizontal": MethodStyle("Horizontal", BLUE, "<"),
    "fixed_jumps": MethodStyle("Fixed jumps", BLUE, ">"),
    "snapshot": MethodStyle("Snapshot", BLUE, "*"),
    "fge": MethodStyle("FGE", BLUE, "H"),
    "swa": MethodStyle("SWA", BLACK, "X"),
    "ema": MethodStyle("EMA", BLACK, "P"),
    "kf_one": MethodStyle("KF (i)", BLUE, "d"),
    "kf": MethodStyle("KF (∞)", BLUE, "D"),
    "anchored_kf": MethodStyle("Anchored KF", BLUE, "o"),
    "averaged_kf": MethodStyle("Averaged KF", BLACK, "D"),
    "independent": MethodStyle("Independent ×3", GREEN, "P"),
    "student_single": MethodStyle("Distilled single", RED, "o"),
    "student_independent": MethodStyle("Distilled ×3", RED, "P"),
    "student_early": MethodStyle("Distilled early stopping", RED, "s"),
    "student_best": MethodStyle("Distilled 5 best", RED, "^"),
    "distilled_kf": MethodStyle("Distilled KF", RED, "*"),
    "refined_kf": MethodStyle("Distilled KF, refined", RED, "X"),
    "uniform": MethodStyle("Uniform", BLUE, "8"),
    "kf_grid": MethodStyle("KF (∞), grid of 0.01", BLUE, "X"),
    "exhaustive": MethodStyle("KF, all epochs tried", BLUE, "P"),
    "greedy": MethodStyle("Greedy selection", BLUE, "v"),
    "likelihood": MethodStyle("Maximum likelihood", BLUE, "p"),
}
"""The methods in the order in which tables and figures show them."""


def set_theme() -> None:
    """The look of every figure of the book."""
    rc = {"axes.spines.right": False, "axes.spines.top": False, "figure.dpi": 180}
    sns.set_theme("notebook", "ticks", rc=rc | {"legend.frameon": False, "savefig.dpi": 150})


def accuracy_and_retained(ax: Axes, accuracy: Runs, retained: Runs) -> Axes:
    """Accuracy by epoch and the part of it that the final network retains (AAAI Fig. 2a-b).

    The space between the two is what the final network forgot, F_e.
    """
    mean, kept = accuracy.mean(axis=0), retained.mean(axis=0)
    _band(ax, accuracy, BLUE, "-", "right after epoch $e$")
    _band(ax, retained, RED, "--", "… and still right at the end")
    epochs = np.arange(len(mean))
    forgotten: dict[str, Any] = {"color": GREY, "alpha": 0.12, "hatch": "///", "linewidth": 0}
    ax.fill_between(epochs, kept, mean, label="forgotten, $F_e$", **forgotten)
    return _percent_by_epoch(ax, "share of samples", bottom=None)


def forget_curve(ax: Axes, forget: Runs, label: str, color: str, style: LineStyle) -> Axes:
    """Forget fraction F_e by epoch: mean over runs, band from least to most."""
    _band(ax, forget, color, style, label)
    return _percent_by_epoch(ax, "forget fraction $F_e$")


def weights(ax: Axes, weight: Curve) -> Axes:
    """Weight of each epoch's network in an ensemble."""
    ax.bar(np.arange(len(weight)), weight, color=BLUE, width=0.9)
    ax.set(xlabel="epoch", ylabel="weight in the mix")
    return ax


def methods(ax: Axes, summary: Mapping[str, Numbers], order: Sequence[str]) -> Axes:
    """Accuracy of the methods of one setting, a dot each with its standard error."""
    rows = [(METHODS[method], summary[method]) for method in order]
    return _rows(ax, rows, "test accuracy (%)", size=9)


def dots(ax: Axes, rows: Mapping[str, Numbers], xlabel: str) -> Axes:
    """A dot with its standard error for each named row."""
    return _rows(ax, [(MethodStyle(name, BLUE, "D"), row) for name, row in rows.items()], xlabel)


def finish(ax: Axes, *, outside: bool = False, **labels: Any) -> Axes:
    """Label the axes and add the legend, on the right of the Axes where it is outside."""
    ax.set(**labels)
    ax.legend(**({"loc": "center left", "bbox_to_anchor": (1, 0.5)} if outside else {}))
    return ax


def _rows(
    ax: Axes, rows: Sequence[tuple[MethodStyle, Numbers]], xlabel: str, size: float | None = None
) -> Axes:
    for row, (look, numbers) in enumerate(rows):
        ax.errorbar(numbers["mean"], row, xerr=numbers["sem"], color=look.color,
                    marker=look.marker, ms=size, capsize=3)  # fmt: skip
    ax.set_yticks(range(len(rows)), [look.name for look, _ in rows])
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.4)
    ax.set_xlabel(xlabel)
    return ax


def _band(ax: Axes, values: Runs, color: str, style: LineStyle, label: str) -> None:
    epochs = np.arange(values.shape[1])
    ax.plot(epochs, values.mean(axis=0), color=color, ls=style, label=label)
    ax.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0)


def _percent_by_epoch(ax: Axes, ylabel: str, bottom: float | None = 0) -> Axes:
    ax.yaxis.set_major_formatter(PERCENT)
    ax.autoscale()  # anew, since a second curve may be higher than the first
    ax.set_ylim(bottom=bottom)
    return finish(ax, xlabel="epoch", ylabel=ylabel)
