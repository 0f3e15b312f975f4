"""What the forgetting explorer shows: one record, small enough for a page, and a still of it.

The page computes everything it shows from the record, as `fmnlib.scores` and `fmnlib.fusion` do.
The counts that they give stand beside it, for the browser test to compare with. `fmn book` makes
the files for the book that it builds; `fmn book --update` commits them.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fmnlib import fusion, plots, runs, scores
from fmnlib.data import load
from fmnlib.files import write_whole
from fmnlib.paper.compare import replicates
from fmnlib.record import RunRecord

FOLDER = Path("book", "_static", "explorer")
NOISE = "symmetric", 0.4
SPLIT = 0  # the quickstart's
WINDOW = 1
STEPS = 20  # of the shares that are counted here
LEVELS = 16  # of grey, in an image of the digits
PAPER, PALE = "#ffffff", "#8c8c8c"


def write(root: Path, *, seed: int = 0, fresh: bool = False) -> list[Path]:
    """Write the explorer's data and its still into a copy of the book; return their paths.

    Args:
        root: Holds `book/`.
        seed: Of the run, as in the quickstart.
        fresh: Leave the committed record aside, as in `fmnlib.runs.obtain`.
    """
    [config] = replicates("quick", [NOISE], [seed], ["augmented"])
    [record] = runs.obtain([config], fresh=fresh, progress=False)
    val, test = record.split(SPLIT)
    images = load(config).eval_images
    assert isinstance(images, Tensor)
    shown = images.numpy()[test.index, 0]
    picks = fusion.knowledge_fusion(val, window=WINDOW).picks
    epoch, share = picks[0] if picks else (int(test.kept[len(test.kept) // 5]), 0.0)
    about = data(test, shown) | {"chosen": [epoch, round(100 * share)]}
    content = f"window.fmnExplorer = {json.dumps(about, separators=(',', ':'))};\n"
    files = {"digits.js": content, "digits.svg": still(test, shown, epoch)}
    for name, text in files.items():
        write_whole(root / FOLDER / name, text.encode())
    return [root / FOLDER / name for name in files]


def data(test: RunRecord, images: np.ndarray) -> dict[str, Any]:
    """What the page reads: bytes in base64, and the library's counts of what it should find.

    Args:
        test: The half to show, with n samples, c classes and k kept epochs.
        images: Its images, `n, 8, 8`, of 0 to 255.

    Returns:
        `probs` are half-precision numbers of shape `k, n, c`, `predicted` are bytes of shape
        `k, n`, `images` bytes of shape `n, 8, 8`. `right`, `forgotten`, `learned` count images for
        each kept epoch; `mixed` those that the mix gets right, for each kept epoch and share.
    """
    correct, samples = test.correct[test.kept], len(test.labels)
    final = fusion.single(test).weights

    def mixed(epoch: int, share: float) -> int:
        window = fusion.around(test, epoch, WINDOW).weights
        mix = fusion.Fusion((1 - share) * final + share * window)
        return round(samples * fusion.accuracy(test, mix))

    forgotten, learned = scores.forget_fraction(correct), scores.learn_fraction(correct)
    return {
        "epochs": test.epochs,
        "kept": test.kept.tolist(),
        "classes": test.classes,
        "window": WINDOW,
        "labels": test.labels.tolist(),
        "images": _base64(images.astype(np.uint8)),
        "predicted": _base64(test.predicted[test.kept].astype(np.uint8)),
        "probs": _base64(np.asarray(test.probs, "<f2")),
        "right": correct.sum(axis=1).tolist(),
        "forgotten": np.rint(samples * forgotten).astype(int).tolist(),
        "learned": np.rint(samples * learned).astype(int).tolist(),
        "mixed": [[mixed(e, n / STEPS) for n in range(STEPS + 1)] for e in test.kept.tolist()],
    }


def still(test: RunRecord, images: np.ndarray, epoch: int) -> str:
    """The picture for readers without scripts: what the final network gets wrong, as SVG.

    The images that were right after the epoch, which are the forgotten ones, are framed.
    """
    wrong = np.flatnonzero(~test.correct[-1])
    forgotten = test.correct[epoch, wrong]
    order = np.argsort(~forgotten, kind="stable")
    columns, tile, gap = 12, 48, 10
    rows = -(-len(wrong) // columns)
    width, height = columns * (tile + gap) + gap, rows * (tile + 30) + gap
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="15" '
        'text-anchor="middle">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
    ]
    for place, number in enumerate(order):
        sample, known = wrong[number], bool(forgotten[number])
        x, y = gap + place % columns * (tile + gap), gap + place // columns * (tile + 30)
        ink = plots.RED if known else PALE
        early, late = test.predicted[[epoch, -1], sample]
        lines.append(f'<g transform="translate({x} {y})" fill="{ink}">')
        lines.append(f'<g transform="scale({tile // 8})">{"".join(_ink(images[sample]))}</g>')
        frame = f'stroke="{plots.RED}" stroke-width="3"' if known else f'stroke="{PALE}"'
        lines.append(f'<rect width="{tile}" height="{tile}" fill="none" {frame}/>')
        text = plots.RED if known else plots.GREY
        lines.append(
            f'<text x="{tile // 2}" y="{tile + 17}" fill="{text}">{early} → {late}</text>'
        )
        lines.append("</g>")
    return "\n".join([*lines, "</svg>"]) + "\n"


def _ink(image: np.ndarray) -> Iterator[str]:
    """One path for each grey of an image of `8, 8`, the whiter the more transparent."""
    greys = np.rint(image / 255 * LEVELS).astype(int)
    for grey in np.unique(greys[greys > 0]):
        squares = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(greys == grey))
        yield f'<path fill-opacity="{grey / LEVELS}" d="{squares}"/>'


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
