"""Drawings of the ideas, as SVG: the table of definitions, Knowledge Fusion, and its student.

The first two show one example, eight samples of two classes over six epochs; every number in
them is computed from it by `fmnlib`. Colours are those of the page (`style.css`), and a mark or a
frame always says the same as the colour. A drawing is 360 units wide, so that its text is as
legible on a phone as on paper. It stands in the page itself, not in a file: only so does it take
the page's colours.

{drawing} definitions   one of `DRAWINGS` as a numbered figure, whose caption is the content
"""

from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fmnlib import fusion, scores
from fmnlib.paper.ablation import share_accuracy
from fmnlib.record import RunRecord

CORRECT_CLASS = np.array(
    [
        [0.80, 0.30, 0.20, 0.20, 0.30, 0.60, 0.70, 0.30],
        [0.80, 0.60, 0.30, 0.20, 0.30, 0.70, 0.80, 0.40],
        [0.90, 0.70, 0.40, 0.30, 0.30, 0.70, 0.80, 0.70],
        [0.90, 0.80, 0.60, 0.40, 0.40, 0.60, 0.40, 0.70],
        [0.90, 0.80, 0.80, 0.70, 0.40, 0.45, 0.40, 0.60],
        [0.90, 0.90, 0.90, 0.90, 0.90, 0.70, 0.40, 0.45],
    ]
)
"""The example: the probability of each sample's own class after each epoch."""

WIDTH, CELL, TEXT = 360, 24, 13
EPOCH = 2  # of the balance that is written out
SUBSCRIPT = '<tspan class="sub" dy="4">{}</tspan><tspan dy="-4">&#8203;</tspan>'


def example() -> RunRecord:
    """The example as a record."""
    probs = np.stack([CORRECT_CLASS, 1 - CORRECT_CLASS], axis=-1)
    return RunRecord.from_arrays(probs, [0] * CORRECT_CLASS.shape[1])


def definitions() -> str:
    """The table of epochs and samples from which every definition is read off."""
    correct = example().correct
    epochs, samples = correct.shape
    right = correct.sum(axis=1)
    forgotten = np.rint(samples * scores.forget_fraction(correct)).astype(int)
    learned = np.rint(samples * scores.learn_fraction(correct)).astype(int)
    left, top = 74, 44
    sums = [290, 319, 346]
    lines = [text(left + samples * CELL / 2, 14, "samples")]
    for x, (name, css) in zip(sums, (("acc", ""), ("L", "learned"), ("F", "lost")), strict=True):
        symbol = (
            "acc" if name == "acc" else f"<tspan class='i'>{name}</tspan>" + SUBSCRIPT.format("e")
        )
        lines.append(text(x, 34, symbol, css, raw=True))
    for n in range(samples):
        lines.append(text(left + (n + 0.5) * CELL, 34, str(n + 1), "quiet"))
    for e in range(epochs):
        y = top + e * CELL
        name = f"epoch {e}" if e < epochs - 1 else f"{e} = <tspan class='i'>E</tspan>, end"
        lines.append(text(left - 6, y + 17, name, anchor="end", raw=True))
        for n in range(samples):
            lines += cell(left + n * CELL, y, bool(correct[e, n]), bool(correct[-1, n]))
        counts = (right[e], learned[e], forgotten[e])
        for x, count, css in zip(sums, counts, ("", "learned", "lost"), strict=True):
            lines.append(text(x, y + 17, f"{count}/{samples}", css))
    bottom = top + epochs * CELL
    place = f'x="{left}" y="{bottom - CELL}" width="{samples * CELL}" height="{CELL}"'
    lines.append(f'<rect class="frame" {place} rx="3"/>')
    key = [
        (True, True, "right, and right at the end"),
        (True, False, "forgotten: right, wrong at the end"),
        (False, True, "learned later: wrong, right at the end"),
        (False, False, "wrong, and wrong at the end"),
    ]
    for row, (now, end, words) in enumerate(key):
        y = bottom + 16 + row * CELL
        lines += cell(left - CELL, y, now, end)
        lines.append(text(left + 8, y + 17, words, anchor="start"))
    y = bottom + 16 + len(key) * CELL + 26
    balance = (
        f"after epoch {EPOCH}: {right[-1]}/{samples} = {right[EPOCH]}/{samples} "
        f"<tspan class='learned'>+ {learned[EPOCH]}/{samples}</tspan> "
        f"<tspan class='lost'>− {forgotten[EPOCH]}/{samples}</tspan>"
    )
    lines.append(text(WIDTH / 2, y, balance, "strong", raw=True))
    told = "; ".join(
        f"epoch {e}: {right[e]} right, {learned[e]} learned later, {forgotten[e]} forgotten"
        for e in range(epochs)
    )
    about = f"A row for each of {epochs} epochs, a column for each of {samples} samples. {told}."
    return svg("definitions", "Which sample is right after which epoch", about, lines, y + 12)


def knowledge_fusion() -> str:
    """One step of Knowledge Fusion, in four parts from the mistakes to the mix."""
    record = example()
    found = fusion.knowledge_fusion(record, window=1)
    epoch, share = found.picks[0]
    correct, samples = record.correct, len(record.labels)
    after = fusion.right_samples(fusion.fuse(record, found), record.labels)
    shares = np.linspace(0.001, 0.999, 400)
    curve = share_accuracy(record, epoch, 1, shares)
    left = 44
    lines = [*_heading(0, 1, "What is wrong at the end?")]
    for n in range(samples):
        lines += cell(left + n * CELL, 30, bool(correct[-1, n]), bool(correct[-1, n]), missed=True)
    lines.append(text(left + samples * CELL + 8, 47, "<tspan class='i'>p</tspan>"
                      + SUBSCRIPT.format("E"), anchor="start", raw=True))  # fmt: skip
    lines += _bars(left, 74, scores.forget_fraction(correct), epoch)
    lines += _steps(left, 226, shares, curve, share)
    lines += _heading(354, 4, "Mix, and predict with the mix.")
    rule = (
        f"<tspan class='strong'>{1 - share:.2f}</tspan> × final network + "
        f"<tspan class='back'>{share:.2f}</tspan> × window"
    )
    lines.append(text(left, 396, rule, anchor="start", raw=True))
    for n in range(samples):
        back = bool(after[n] and not correct[-1, n])
        lines += cell(left + n * CELL, 406, bool(after[n]), True, back=back)
    lines.append(text(left + samples * CELL + 8, 423, "the mix", anchor="start"))
    lines.append('<path d="M44 418H18V42H36"/><path class="tip" d="M42 42l-9-5v10z"/>')
    lines.append(text(left, 452, "Repeat while validation accuracy rises.", anchor="start"))
    about = (
        f"Of {samples} validation samples the final network gets {(~correct[-1]).sum()} wrong. "
        f"Epoch {epoch} is right about most of these, so it is picked, with one neighbour on "
        f"either side. Accuracy as a function of their share is a step function; the share chosen "
        f"is the middle of its best plateau, {share:.2f}. The mix is right about {after.sum()} "
        f"of {samples}. The step is repeated while validation accuracy rises."
    )
    return svg("fusion", "One step of Knowledge Fusion", about, lines, 462)


def student() -> str:
    """The student: which networks see a training image, and what its loss compares."""
    lines = [
        *_box(10, 6, 150, "a training image", "quiet"),
        *_box(222, 6, 128, "its given label", "lost", "may be wrong"),
    ]
    for shift in (8, 4):
        lines += _box(10 + shift, 92 - shift, 142, "", "back")
    lines += _box(10, 92, 142, "teacher: the mix", "back", "several checkpoints")
    lines += _box(200, 92, 150, "student", "learned", "one new network")
    lines += _box(10, 172, 142, "its probabilities", "back", "at temperature T")
    lines += _box(200, 172, 150, "its probabilities", "learned", "at T and at 1")
    lines += _box(50, 252, 260, "loss", "", "soft share a: agree with the teacher;")
    lines.append(text(180, 305, "share 1 − a: agree with the label", "small"))
    for x, y, end in (
        (81, 50, 84),
        (81, 136, 172),
        (81, 216, 252),
        (275, 136, 172),
        (275, 216, 252),
    ):
        lines += _arrow(f"M{x} {y}V{end - 6}", x, end)
    lines += _arrow("M160 28H186V70H275V86", 275, 92)
    lines.append('<path class="dash" d="M350 28H356V284H319"/>')
    lines.append('<path class="tip" d="M311 284l9-5v10z"/>')
    lines.append(text(WIDTH / 2, 342, "Kept at the end: the student alone.", "strong"))
    about = (
        "A training image is shown to the teacher, which is the mix of several checkpoints, and "
        "to the student, one new network. The student's loss compares its probabilities with "
        "those of the teacher and, with a smaller share, with the given label, which may be "
        "wrong. At the end only the student is kept."
    )
    return svg("student", "How the student is trained", about, lines, 352)


def svg(name: str, title: str, about: str, lines: list[str], height: float) -> str:
    """A drawing for a page: its title and description are what a screen reader says."""
    ids = f"drawing-{name}-title drawing-{name}-desc"
    return "\n".join(
        [
            f'<svg class="drawing" role="img" aria-labelledby="{ids}" '
            f'viewBox="0 0 {WIDTH} {height:.0f}" font-size="{TEXT}" text-anchor="middle">',
            f'<title id="drawing-{name}-title">{escape(title)}</title>',
            f'<desc id="drawing-{name}-desc">{escape(about)}</desc>',
            *lines,
            "</svg>",
        ]
    )


def text(
    x: float, y: float, words: str, css: str = "", *, anchor: str = "", raw: bool = False
) -> str:
    """A line of text; `raw` words hold markup."""
    where = f' text-anchor="{anchor}"' if anchor else ""
    look = f' class="{css}"' if css else ""
    return f'<text x="{x:g}" y="{y:g}"{look}{where}>{words if raw else escape(words)}</text>'


def cell(
    x: float, y: float, now: bool, end: bool, *, missed: bool = False, back: bool = False
) -> Iterator[str]:
    """One sample after one epoch: a tick where it is right, a cross where it is not."""
    css = "back" if back else "wrong" if missed and not now else _state(now, end)
    side, mark = CELL - 4, "M5 10.5l3.5 4L15 6" if now else "M7 7l6 6M13 7l-6 6"
    yield f'<g class="cell {css}" transform="translate({x + 2:g} {y + 2:g})">'
    yield f'<rect width="{side}" height="{side}" rx="3"/><path d="{mark}"/></g>'


def _state(now: bool, end: bool) -> str:
    return {(1, 1): "kept", (1, 0): "forgotten", (0, 1): "later", (0, 0): "wrong"}[now, end]


def _heading(y: float, number: int, words: str) -> Iterator[str]:
    yield f'<circle class="number" cx="54" cy="{y + 12}" r="10"/>'
    yield text(54, y + 16.5, str(number), "on-number")
    yield text(72, y + 17, words, "strong", anchor="start")


def _bars(left: int, top: int, forgotten: np.ndarray, epoch: int) -> Iterator[str]:
    """The forget fraction of each epoch, and the window of the largest."""
    yield from _heading(top, 2, "Which epoch knew most of it?")
    step, foot = 32, top + 92
    for e, share in enumerate(forgotten):
        height = max(1.5, share / forgotten.max() * 48)
        css = "bar here" if e == epoch else "bar"
        x = left + 4 + e * step
        yield f'<rect class="{css}" x="{x}" y="{foot - height}" width="24" height="{height}"/>'
        yield text(x + 12, foot + 15, str(e), "strong" if e == epoch else "quiet")
    yield text(left + 6 * step + 8, foot - 26, "forgotten since", "lost", anchor="start")
    first, last = left + 1 + (epoch - 1) * step, left + 31 + (epoch + 1) * step
    yield f'<path class="window" d="M{first} {foot + 20}v6H{last}v-6"/>'
    yield text((first + last) / 2, foot + 40, "pick and window", "back")


def _steps(
    left: int, top: int, shares: np.ndarray, accuracy: np.ndarray, chosen: float
) -> Iterator[str]:
    """Validation accuracy by the share of the window."""
    yield from _heading(top, 3, "How much of it to mix in?")
    width, foot, low = 192, top + 92, 0.5

    def at(share: float, value: float) -> str:
        return f"{left + share * width:.1f} {foot - (value - low) / (1 - low) * 52:.1f}"

    points = "L".join(at(s, a) for s, a in zip(shares, accuracy, strict=True))
    yield f'<path class="axis" d="M{left} {foot}H{left + width}"/>'
    yield f'<path class="curve" d="M{points}"/>'
    x = left + chosen * width
    yield f'<path class="chosen" d="M{x:.1f} {foot}V{foot - 60}"/>'
    yield text(left, foot + 15, "0", "quiet")
    yield text(left + width, foot + 15, "1", "quiet")
    yield text(x, foot + 15, f"{chosen:.2f}", "back")
    yield text(left + width + 8, foot - 42, "validation", "learned", anchor="start")
    yield text(left + width + 8, foot - 26, "accuracy", "learned", anchor="start")
    yield text(left + width + 16, foot + 15, "share", "quiet", anchor="start")


def _box(x: float, y: float, width: float, words: str, css: str, more: str = "") -> Iterator[str]:
    height = 60 if words == "loss" else 44
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    yield f'<rect class="box {css}" {place} rx="5"/>'
    yield text(x + width / 2, y + (19 if more else 27), words, "strong")
    if more:
        yield text(x + width / 2, y + 36, more, "small")


def _arrow(path: str, x: float, y: float) -> Iterator[str]:
    """A line that ends in a tip, downwards."""
    yield f'<path d="{path}"/><path class="tip" d="M{x} {y}l-5-9h10z"/>'


DRAWINGS = {"definitions": definitions, "fusion": knowledge_fusion, "student": student}


class Drawing(SphinxDirective):
    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(__file__)
        name = self.arguments[0]
        figure = nodes.figure("", nodes.raw("", DRAWINGS[name](), format="html"))
        words, messages = self.parse_inline(" ".join(self.content), lineno=self.lineno)
        figure += nodes.caption("", "", *words)
        figure["names"] = [f"fig-drawing-{name}"]
        self.state.document.note_explicit_target(figure)
        return [figure, *messages]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("drawing", Drawing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
