"""Figures of the notebooks on theory, forgetting, ablations and other selections.

Like `fmnlib.plots`: they draw arrays on a given Axes and compute nothing.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import NullFormatter

from fmnlib.plots import BLACK, BLUE, GREY, LINES, METHODS, RED, Curve, LineStyle, Runs, finish
from fmnlib.stats import Numbers

Components = Float[np.ndarray, "times components"]
_SQUARE = (0, 256, 0, 256)
_PALE = ListedColormap(["#dbe2ff", "#ffe3d6"])


def against(
    ax: Axes,
    values: Sequence[float],
    numbers: Sequence[Numbers],
    label: str,
    color: str,
    style: LineStyle,
    marker: str | None = None,
) -> Axes:
    """A curve of means in percent, with their standard errors, against values such as windows.

    By default each curve of an Axes has another marker.
    """
    mean, sem = (np.array([n[key] for n in numbers], float) for key in ("mean", "sem"))
    marker = marker or "oD^sv"[len(ax.containers) % 5]
    ax.errorbar(values, mean, sem, label=label, color=color, ls=style, marker=marker, capsize=2)
    ax.set_ylabel("test accuracy (%)")
    return ax


def by_class(ax: Axes, accuracy: Mapping[str, Float[np.ndarray, " classes"]], xlabel: str) -> Axes:
    """Test accuracy of each class, one marker a method."""
    for number, (method, values) in enumerate(accuracy.items()):
        look = METHODS[method]
        beside = np.arange(len(values)) + 0.18 * (number - (len(accuracy) - 1) / 2)
        ax.plot(beside, 100 * values, look.marker, color=look.color, label=look.name, ms=8)
    ax.set_xticks(range(max(map(len, accuracy.values()))))
    ax.set(xlabel=xlabel, ylabel="test accuracy (%)")
    ax.grid(alpha=0.4)
    return ax


def decision_regions(
    ax: Axes,
    predicted: Int[np.ndarray, "side side"],
    points: Float[np.ndarray, "samples 2"],
    labels: Int[np.ndarray, " samples"],
    flipped: Bool[np.ndarray, " samples"],
) -> Axes:
    """Two decision regions, their border, and the training points by label; wrong labels boxed."""
    ax.imshow(predicted, cmap=_PALE, vmin=0, vmax=1, origin="lower", extent=_SQUARE)
    ax.contour(predicted, [0.5], colors=BLACK, linewidths=1.2, origin="lower", extent=_SQUARE)
    for label, (marker, color) in enumerate([("o", BLUE), ("^", RED)]):
        x, y = points[labels == label].T
        ax.plot(x, y, ls="", marker=marker, ms=3, color=color)
    return _plane(mark_points(ax, points[flipped]))


def mark_points(ax: Axes, points: Float[np.ndarray, "samples 2"]) -> Axes:
    """Empty boxes around some points."""
    ax.plot(*points.T, ls="", marker="s", ms=9, mfc="none", mec=BLACK)
    return ax


def forget_map(ax: Axes, time: Float[np.ndarray, "side side"], epochs: int) -> Axes:
    """Map of `time`, the last epoch at which each point was right; NaN if right at the end."""
    image = ax.imshow(time, cmap="viridis", vmin=0, vmax=epochs, origin="lower", extent=_SQUARE)
    assert ax.figure is not None
    ax.figure.colorbar(image, ax=ax, label="last epoch at which it was right", shrink=0.9)
    return _plane(ax)


def paths(
    ax: Axes, closed: Components, descended: Components, names: Sequence[str], every: int
) -> Axes:
    """Components of a separator by step: closed form as lines, gradient descent as markers."""
    steps = np.arange(len(closed))
    for column, (name, (color, style)) in enumerate(zip(names, LINES, strict=False)):
        ax.plot(steps, closed[:, column], color=color, ls=style, label=name)
        ax.plot(steps[::every], descended[::every, column], color=color, ls="", marker="o", ms=4)
    ax.plot([], [], color=GREY, ls="", marker="o", ms=4, label="gradient descent")
    ylabel = "component of the separator"
    return finish(ax, outside=True, xlabel="step of gradient descent", ylabel=ylabel)


def order_of_error(
    ax: Axes, errors: Sequence[tuple[str, Curve, Curve]], order: int, xlabel: str
) -> Axes:
    """Errors against scales on logarithmic axes, with a guide line of the claimed order."""
    for (name, scale, error), (color, _), marker in zip(errors, LINES, "os^Dv", strict=False):
        ax.loglog(scale, error, color=color, ls="", marker=marker, label=name)
    _, scale, error = errors[0]
    guide = error[-1] * (scale / scale[-1]) ** order
    ax.loglog(scale, guide, color=GREY, ls="--", label=f"slope {order}".replace("-", "−"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return finish(ax, xlabel=xlabel, ylabel="largest relative error")


def matched_curves(
    ax: Axes, curves: Sequence[tuple[str, Runs, Float[np.ndarray, "2 epochs"]]], ylabel: str
) -> Axes:
    """A measure of overlap by epoch: mean over runs, and the band that chance would give."""
    for (name, values, chance), (color, style) in zip(curves, LINES[1:], strict=False):
        epochs = np.arange(values.shape[1])
        ax.plot(epochs, values.mean(axis=0), color=color, ls=style, label=name)
        ax.fill_between(epochs, *chance, color=color, alpha=0.15, lw=0, label=f"{name}, by chance")
        ax.plot(epochs, chance.T, color=color, ls=style, lw=0.7)
    return finish(ax, xlabel="epoch $n$ of the network", ylabel=ylabel)


def _plane(ax: Axes) -> Axes:
    ax.set(xlim=(0, 256), ylim=(0, 256), xticks=[0, 128, 256], yticks=[0, 128, 256])
    ax.set(xlabel="$x_1$ (units)", ylabel="$x_2$ (units)", aspect="equal")
    return ax
