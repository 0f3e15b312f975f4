"""What the film of the decision regions shows: one network in the plane, and a still of its end.

The page draws the film from the predictions of every epoch on the lattice of `fmnlib.plane`. What
`fmnlib.scores` counts of them stands beside them, for the browser test to compare with. `fmn book`
makes the files for the book that it builds; `fmn book --update` commits them.
"""

import base64
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from fmnlib import runs, scores
from fmnlib.config import RunConfig
from fmnlib.data import load
from fmnlib.files import write_whole
from fmnlib.plane import SIDE, border
from fmnlib.record import RunRecord

FOLDER = Path("book", "_static", "film")
# The first run of notebook 01.
CONFIG = RunConfig.of_profile(
    "quick",
    **{"dataset": "wave", "model": "mlp", "train_samples": 200, "lr": 0.03, "epochs": 100},
    **{"keep_every": 100, "noise": "symmetric", "noise_rate": 0.1},
)
UNIT = 256 // SIDE  # of the square, along a side of a cell
COLORS = {"zero": "#dfe6ff", "one": "#fff0cc", "lost": "#cc3311", "ink": "#000000"}

Mask = Bool[np.ndarray, "side side"]


def write(root: Path, *, seed: int = 0, fresh: bool = False) -> list[Path]:
    """Write the film's data and its still into a copy of the book; return their paths.

    Args:
        root: Holds `book/`.
        seed: Of the run, as the first of notebook 01.
        fresh: Leave the committed record aside, as in `fmnlib.runs.obtain`.
    """
    [record] = runs.obtain([dataclasses.replace(CONFIG, seed=seed)], fresh=fresh, progress=False)
    about = json.dumps(data(record), separators=(",", ":"))
    files = {"wave.js": f"window.fmnFilm = {about};\n", "wave.svg": still(record)}
    for name, text in files.items():
        write_whole(root / FOLDER / name, text.encode())
    return [root / FOLDER / name for name in files]


def data(record: RunRecord) -> dict[str, Any]:
    """What the page reads: bits in base64, points, and the library's counts.

    Returns:
        `predicted` are bits of shape `epochs, side, side`, `classes` of `side, side`, the lowest
        row first; `points` hold x, y, class and whether the label is wrong. `right`, `forgotten`
        (F_e) and `lost` (right after an earlier epoch, wrong after this one) count places for
        each epoch.
    """
    correct, samples = record.correct, len(record.labels)
    trained = load(CONFIG)  # the points and their labels are the same for every seed
    assert isinstance(trained.images, Tensor)
    places = trained.images[:, :, 0, 0].long() / UNIT
    columns = (*places.T.tolist(), trained.labels.tolist(), trained.flipped.int().tolist())
    return {
        "epochs": record.epochs,
        "side": SIDE,
        "predicted": _base64(record.predicted == 1),
        "classes": _base64(record.labels == 1),
        "points": [list(point) for point in zip(*columns, strict=True)],
        "border": [round(float(y), 2) for y in border(np.arange(0, 257, 4)) / UNIT],
        "right": correct.sum(axis=1).tolist(),
        "forgotten": np.rint(samples * scores.forget_fraction(correct)).astype(int).tolist(),
        "lost": [int(lost(correct, epoch).sum()) for epoch in range(record.epochs)],
    }


def lost(correct: Bool[np.ndarray, "epochs samples"], epoch: int) -> Bool[np.ndarray, " samples"]:
    """What is wrong after an epoch and was right after an earlier one.

    >>> lost(np.array([[True, False], [False, False], [True, True]]), 1).tolist()
    [True, False]
    """
    return scores.forgotten_after(correct[: epoch + 1], -1)


def still(record: RunRecord) -> str:
    """The picture for readers without scripts: the regions at the end, and what is lost there."""
    regions = record.predicted[-1].reshape(SIDE, SIDE)
    gone = lost(record.correct, record.epochs - 1).reshape(SIDE, SIDE)
    xs = np.arange(0, 257, 4)
    true = "L".join(f"{x:g} {y:.2f}" for x, y in zip(xs / UNIT, border(xs) / UNIT, strict=True))
    line = f'fill="none" stroke="{COLORS["ink"]}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {SIDE}" '
            'width="512" height="512">',
            f'<g transform="matrix(1 0 0 -1 0 {SIDE})">',
            f'<rect width="{SIDE}" height="{SIDE}" fill="{COLORS["zero"]}"/>',
            f'<path fill="{COLORS["one"]}" d="{"".join(cells(regions == 1))}"/>',
            f'<path fill="{COLORS["lost"]}" d="{"".join(cells(gone))}"/>',
            f'<path {line} stroke-width="0.3" d="{"".join(edges(regions))}"/>',
            f'<path {line} stroke-width="0.35" stroke-dasharray="1.4 1" d="M{true}"/>',
            "</g></svg>\n",
        ]
    )


def cells(mask: Mask) -> Iterator[str]:
    """The cells of a mask as a path, those side by side in one piece.

    >>> "".join(cells(np.array([[True, True, False], [False, False, True]])))
    'M0 0h2v1h-2zM2 1h1v1h-1z'
    """
    for y, row in enumerate(mask):
        steps = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]]).astype(int)))
        for start, end in steps.reshape(-1, 2).tolist():
            yield f"M{start} {y}h{end - start}v1h-{end - start}z"


def edges(regions: Int[np.ndarray, "side side"]) -> Iterator[str]:
    """The border between two regions as a path along the sides of cells.

    >>> "".join(edges(np.array([[0, 1], [0, 0]])))
    'M1 0v1M1 1h1'
    """
    yield from (f"M{x + 1} {y}v1" for y, x in np.argwhere(np.diff(regions, axis=1)).tolist())
    yield from (f"M{x} {y + 1}h1" for y, x in np.argwhere(np.diff(regions, axis=0)).tolist())


def _base64(bits: Bool[np.ndarray, "..."]) -> str:
    return base64.b64encode(np.packbits(bits).tobytes()).decode()
